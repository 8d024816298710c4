"""Seeds for requests that bring none."""

from __future__ import annotations


def mix64(seed: int, number: int) -> int:
    """Output `number` of SplitMix64 from `seed` (Steele et al. 2014): well mixed 64-bit seeds from two small numbers."""
    x = (seed + (number + 1) * 0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF
    x = (x ^ x >> 30) * 0xBF58_476D_1CE4_E5B9 & 0xFFFF_FFFF_FFFF_FFFF
    x = (x ^ x >> 27) * 0x94D0_49BB_1331_11EB & 0xFFFF_FFFF_FFFF_FFFF
    return x ^ x >> 31
