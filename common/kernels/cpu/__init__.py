"""C++ kernels for CPUs, built on first use with the machine's own compiler."""
