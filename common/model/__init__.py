"""Model arithmetic without a framework: rotary frequencies, and the share of each rank of a parallel model."""
