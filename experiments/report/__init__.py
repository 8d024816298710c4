"""How does a run or a sweep become tables, figures and sentences?"""
