"""Native CPU kernels: how do they compute, and when are they used? Both frameworks call the same source."""
