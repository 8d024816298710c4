"""Native kernels: one source for both frameworks."""
