"""What both engines share: requests, scheduling, pages, text, checkpoints. Ints, strings and NumPy; neither jax nor torch."""
