"""KV transfer: how do KV pages go from one process to another?

The layout of a page, its copy, the transfer protocol, its connections and its shared memory.
"""
