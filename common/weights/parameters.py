"""From a checkpoint's tensors to the parameters that both engines hold: some fused, all rounded here and only here.

Fusing q, k, v and gate, up into one matrix each saves matmuls; rounding in one place starts both engines from the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from common.errors import CheckpointError

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def sources(name: str) -> tuple[str, ...]:
    """The checkpoint's tensors that make up parameter `name`, in order along their first axis."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return tuple(name.replace(f".{fused}.", f".{part}.") for part in parts)
    return (name,)


def parameter(checkpoint: Checkpoint, name: str, dtype: str) -> np.ndarray:
    """Return parameter `name` with the checkpoint's axes, [out, in] for matrices. Norms stay in float32, their offset added.

    Raises `CheckpointError` where a weight is beyond the range of `dtype`.
    """
    dense = np.concatenate([checkpoint[source].dense() for source in sources(name)])
    if "norm" in name:
        return dense + np.float32(checkpoint.config.norm_offset)
    with np.errstate(over="ignore"):
        rounded = dense.astype(NUMPY_DTYPES[dtype])
    if dtype == "float16" and not np.isfinite(rounded).all():  # `Entry.dense` checks the range of the other dtypes
        raise CheckpointError(
            f"{checkpoint.path}: {name} holds {np.abs(dense).max():g}, beyond the range of float16. Use dtype=bfloat16."
        )
    return rounded
