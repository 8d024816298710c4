"""Sampling parameters as the engines need them: logit updates, seeds, and beam search over single steps."""
