"""What both engines share: requests, scheduling, pages, text, checkpoints. Ints, strings and NumPy; neither jax nor torch."""

import sys

from common.process.exits import end_quietly_at_ctrl_c

if sys.argv[:1] == ["-m"]:  # `python -m` looks here for a command; a program that imports the library handles Ctrl-C itself
    end_quietly_at_ctrl_c()
