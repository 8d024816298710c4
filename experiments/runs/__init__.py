"""How is a run stored as a directory, and how is it read again?"""
