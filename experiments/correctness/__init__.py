"""Do two engines compute the same, and where they part, which one is wrong?"""
