"""Set before NumPy starts: its BLAS threads spin while they wait, and take the cores from JAX's and PyTorch's."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
