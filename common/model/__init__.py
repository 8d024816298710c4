"""Model arithmetic without a framework: which rotary frequencies, and which share of a model does each rank hold?"""
