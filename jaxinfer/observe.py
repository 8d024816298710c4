"""Run a step and return intermediate tensors: the step that serves, with a callback that keeps what it computes.

The kernels set the resolution: native layers show what lies between their three operators. Each set of names compiles a program
of its own, because XLA removes what is not requested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from jax import Array

from common.batch import Batch
from jaxinfer.arrays import to_host


class Keep(Protocol):
    """Is given what was just computed, by name: in a layer, or else before or after all of them."""

    def __call__(self, layer: int | None = None, /, **values: Array) -> None: ...


Names = frozenset[str] | None
"""Of what is kept; None is all."""


def ignore(layer: int | None = None, /, **values: Array) -> None:
    """Keeps nothing, and costs a step that serves nothing."""


def keeper(names: Names) -> tuple[dict[str, Array], Keep]:
    """What will be kept, as `ModelRunner.observe` names and orders it, and what keeps it: those of `names`, or all."""
    taps: dict[str, Array] = OrderedDict()

    def keep(layer: int | None = None, /, **values: Array) -> None:
        prefix = "" if layer is None else f"layers.{layer}."
        for name, x in values.items():
            if names is None or prefix + name in names:
                taps[prefix + name] = x

    return taps, keep


def observe(step: Any, state: Any, batch: Batch, names: Collection[str] | None) -> tuple[Any, dict[str, np.ndarray]]:
    """One step of a loaded `step.Step` or `kernels.Step`, and what it computed on the way: those of `names`, or all."""
    state, taps = step.observe(state, batch, None if names is None else frozenset(names))
    rows = dict.fromkeys(("logits", "tokens"), len(batch.logit_rows))
    return state, {name: _typed(x[: rows.get(name, batch.num_tokens)]) for name, x in to_host(taps).items()}


def _typed(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.int32 else x.astype(np.float32)
