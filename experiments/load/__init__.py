"""Which requests does an engine receive and when, and what does the machine do meanwhile?"""
