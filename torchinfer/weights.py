"""From a checkpoint to parameters on the device."""

from __future__ import annotations

import numpy as np
import torch

from common.config import Dtype
from common.interface import Progress
from common.model.rope import rope_tables
from common.weights.checkpoint import Checkpoint
from common.weights.parameters import parameter
from common.weights.shard import shard
from torchinfer.arrays import to_device
from torchinfer.model import Decoder
from torchinfer.parallel import ALONE, Group


def load_model(
    checkpoint: Checkpoint,
    dtype: Dtype,
    positions: int,
    device: torch.device,
    progress: Progress | None = None,
    group: Group = ALONE,
) -> Decoder:
    """The checkpoint's decoder with its weights on `device`, one tensor at a time; room for `positions` rotary positions. In a
    `group` it is the decoder of this rank's part."""
    part = shard(checkpoint, group.rank, group.ranks)
    with torch.device("meta"):
        model = Decoder(part.config, getattr(torch, dtype), positions, group)
    model.to_empty(device=device)
    flat = list(model.state_dict(keep_vars=True).items())
    for done, (path, variable) in enumerate(flat):
        variable.copy_(to_device(leaf(part, tuple(path.split(".")), dtype, positions), device))
        if progress:
            progress(done + 1, len(flat), "weights")
    return model.eval()


def leaf(checkpoint: Checkpoint, path: tuple[str, ...], dtype: Dtype, positions: int) -> np.ndarray:
    """The array at `path` of the model, rotary tables computed."""
    if path[0] == "ropes":
        config = checkpoint.config
        return rope_tables(config.ropes[int(path[1])], config.head_dim, positions)[path[2] == "sin"]
    name = ".".join(path if path[0] == "lm_head" else ("model", *path))
    array = parameter(checkpoint, name, dtype)
    return array
