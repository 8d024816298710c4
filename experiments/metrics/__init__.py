"""Which figures follow from the recorded requests and steps, and how certain are they?"""
