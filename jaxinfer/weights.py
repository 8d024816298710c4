"""From a checkpoint to parameters on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.config import Dtype
from common.interface import Progress
from common.model.rope import rope_tables
from common.weights.checkpoint import Checkpoint
from common.weights.parameters import parameter
from common.weights.shard import shard
from jaxinfer.model import Decoder
from jaxinfer.parallel import ALONE, Group


def load_model(
    checkpoint: Checkpoint,
    dtype: Dtype,
    positions: int,
    device: jax.Device,
    progress: Progress | None = None,
    group: Group = ALONE,
) -> Decoder:
    """The checkpoint's decoder with its weights on `device`, one tensor at a time; room for `positions` rotary positions. In a
    `group` it is the decoder of each rank's part, as far as this process drives them."""
    parts = [shard(checkpoint, rank, group.ranks) for rank in group._here]
    model = nnx.eval_shape(lambda: Decoder(parts[0].config, jnp.dtype(dtype), positions, group))
    graph, abstract = nnx.split(model)
    flat = nnx.to_flat_state(abstract)
    leaves = []
    for done, (path, variable) in enumerate(flat):
        name = tuple(str(key) for key in path)
        arrays = [leaf(part, name, dtype, positions) for part in parts]
        leaves.append((path, variable.replace(group._put(arrays, variable.get_metadata().get("split"), device))))
        if progress:
            progress(done + 1, len(flat), "weights")
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def leaf(checkpoint: Checkpoint, path: tuple[str, ...], dtype: Dtype, positions: int) -> np.ndarray:
    """The array at `path` of the model: matrices but the embedding turned to [in, out], rotary tables computed."""
    if path[0] == "ropes":
        config = checkpoint.config
        return rope_tables(config.ropes[int(path[1])], config.head_dim, positions)[path[2] == "sin"]
    name = ".".join(path if path[0] == "lm_head" else ("model", *path))
    array = parameter(checkpoint, name, dtype)
    return np.ascontiguousarray(array.T) if array.ndim == 2 and path[0] != "embed_tokens" else array
