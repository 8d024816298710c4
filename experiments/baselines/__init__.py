"""Which other engines does a run compare with, and how does each become an engine of ours?"""
