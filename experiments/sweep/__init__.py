"""How do the jobs of a sweep start, continue after an interruption and end?"""
