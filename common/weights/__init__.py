"""Weights: where does a checkpoint lie, and which tensors does it hold under which canonical names?"""
