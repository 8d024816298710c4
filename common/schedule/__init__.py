"""Who runs, how many tokens, on which pages: policy in plain Python, batches in NumPy."""
