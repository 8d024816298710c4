"""Checkpoints as lazy entries under canonical names, and the zoo of models by name."""
