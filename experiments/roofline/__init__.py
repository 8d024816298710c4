"""How close does a run come to the limits of this machine?"""
