"""Scheduling: which requests run in the next step, how many tokens of each, and on which KV pages?"""
