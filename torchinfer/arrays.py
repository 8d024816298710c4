"""NumPy arrays to the device and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def to_device(tree: Any, device: torch.device) -> Any:
    """Every NumPy array of a tree on `device`, in memory of its own: `from_numpy` alone aliases host memory."""

    def put(array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(array.copy()).to(device)

    return pytree.tree_map(put, tree)


def to_host(tree: Any) -> Any:
    """Every device array of a tree as a NumPy array; waits for the device."""

    def get(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.bfloat16:
            return x.contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
        return x.cpu().numpy()

    return pytree.tree_map(get, tree)


def nbytes(tree: Any) -> int:
    """Bytes of a tree's arrays on this rank's device."""
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
