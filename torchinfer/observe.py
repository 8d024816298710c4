"""Run a step and return intermediate tensors: the step that serves, with a callback that keeps what it computes.

The kernels set the resolution: native layers show what lies between their three operators, and compiled blocks what they
return.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from common.batch import Batch
from torchinfer.arrays import to_host


class Keep(Protocol):
    """Is given what was just computed, by name: in a layer, or else before or after all of them."""

    def __call__(self, layer: int | None = None, /, **values: Tensor) -> None: ...


Names = frozenset[str] | None
"""Of what is kept; None is all."""


def ignore(layer: int | None = None, /, **values: Tensor) -> None:
    """Keeps nothing, and costs a step that serves nothing."""


def keeper(names: Names) -> tuple[dict[str, Tensor], Keep]:
    """What will be kept, as `ModelRunner.observe` names and orders it, and what keeps it: those of `names`, or all."""
    taps: dict[str, Tensor] = {}

    def keep(layer: int | None = None, /, **values: Tensor) -> None:
        prefix = "" if layer is None else f"layers.{layer}."
        for name, x in values.items():
            if names is None or prefix + name in names:
                taps[prefix + name] = x.clone()  # operators work in place

    return taps, keep


def observe(step: Any, state: Any, batch: Batch, names: Collection[str] | None) -> tuple[Any, dict[str, np.ndarray]]:
    """One step of a loaded `step.Step` or `kernels.Step`, and what it computed on the way: those of `names`, or all."""
    state, taps = step.observe(state, batch, None if names is None else frozenset(names))
    return state, {name: x.astype(np.int32 if name == "tokens" else np.float32) for name, x in to_host(taps).items()}
