"""KV transfer: how do KV pages go from one process to another?

The package holds the layout of a page, the transfer protocol, its connections and its shared memory.
"""
