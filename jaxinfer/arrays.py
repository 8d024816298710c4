"""NumPy arrays to the device and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_device(tree: Any, device: jax.Device | jax.sharding.Sharding) -> Any:
    """Every NumPy array of a tree on `device`, in memory of its own: `device_put` alone may alias aligned host memory."""
    return jax.device_put(jax.tree.map(np.array, tree), device)


def to_host(tree: Any) -> Any:
    """Every device array of a tree as a NumPy array; waits for the device."""
    return jax.device_get(tree)


def gather_to_host(tree: Any) -> Any:
    """As `to_host`, of arrays that several processes may have parts of; all of them ask at once."""
    gather = partial(multihost_utils.process_allgather, tiled=True)
    return to_host(jax.tree.map(lambda x: x if x.is_fully_addressable else gather(x), tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one rank's device."""
    return sum(int(x.addressable_shards[0].data.nbytes) for x in jax.tree.leaves(tree))
