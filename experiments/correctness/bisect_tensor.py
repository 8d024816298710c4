"""Where do two engines part: the first request, position, layer and tensor of a step, and which of the two is wrong.

Both computed the same step on the same tokens and showed what they computed on the way. Sound engines differ by rounding, which
grows from layer to layer and with the dtype; so how far apart they may be is measured, not set: a tensor parts where the
engines are farther from each other than `SURE` times the distance of the nearer one from float64, and than a floor that
rounding may reach anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.batch import Batch
from common.config import Dtype
from experiments.correctness.reference import NumpyModel

Taps = Mapping[str, np.ndarray]
"""What a step computed, by the names of `ModelRunner.observe` and `experiments.correctness.observe.with_context`."""

PER_LAYER = ("attn_norm", "q", "k", "v", "keys", "values", "attention", "attn_residual", "mlp", "residual")
"""In the order of computation."""
WHOLE = ("embedding", "final_norm", "logits")
"""Before and after the layers."""
CONTEXT = {"keys": "k", "values": "v"}
"""What lies in pages, and what was to be put there."""
SURE = 8.0
"""How many times the error of the nearer engine, the largest within the tensor, no rounding makes the other's."""
OWN_FLOOR: Mapping[Dtype, float] = {"float32": 1e-6, "bfloat16": 1e-2}
"""The relative error that rounding may reach in one operation of any model."""
FLOOR: Mapping[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.1}
"""The relative error that rounding may reach anywhere in a model."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first tensor in which two engines part."""

    step: int
    request: int
    position: int
    """In the request's tokens, prompt first, from 0; of `keys` and `values`, that of the key."""
    layer: int | None
    tensor: str
    difference: float
    """Of the two engines, the largest within the position, relative to `scales`; inf where one is not finite."""
    errors: tuple[float, float]
    """Of each from float64, likewise."""
    inside: bool = False
    """Whether `errors` are those of the operation alone, from float64 on the engine's own inputs to it."""

    @property
    def wrong(self) -> tuple[bool, bool]:
        """Which of the two departs: the one that is farther from float64, or both if they are alike."""
        first, second = self.errors
        return not first * 4 < second, not second * 4 < first


def names(taps_a: Taps, taps_b: Taps, layers: int) -> list[tuple[int | None, str, str]]:
    """(layer, tensor, name) of all that both show, in the order of computation."""
    order: list[tuple[int | None, str, str]] = [(None, "embedding", "embedding")]
    order += [(layer, tensor, f"layers.{layer}.{tensor}") for layer in range(layers) for tensor in PER_LAYER]
    order += [(None, tensor, tensor) for tensor in ("final_norm", "logits")]
    return [entry for entry in order if entry[2] in taps_a and entry[2] in taps_b]


def locate(
    batch: Batch,
    step: int,
    requests: Sequence[int],
    histories: Sequence[Sequence[int]],
    taps: tuple[Taps, Taps],
    model: NumpyModel,
    dtype: Dtype,
    suspects: Sequence[int] | None = None,
    tensors: Collection[str] = (*PER_LAYER, *WHOLE),
) -> Finding | None:
    """The first tensor of a step in which the engines part, over the sequences `suspects` of the batch (default: all).

    `requests` names whose sequence each is, `histories` has the tokens of each up to the end of this step. Only tensors of the
    names `tensors` are compared.
    """
    found: list[tuple[int, Finding]] = []
    for seq in range(batch.num_seqs) if suspects is None else suspects:
        exact: dict[str, np.ndarray] = {}
        model.logits(histories[seq], exact.__setitem__)
        for place, (layer, tensor, name) in enumerate(names(*taps, model.config.num_layers)):
            if tensor not in tensors:
                continue
            truth = exact[name.replace(tensor, CONTEXT.get(tensor, tensor))]
            a, b, positions = (*(rows_of(batch, seq, tensor, tap[name])[0] for tap in taps), rows_of(batch, seq, tensor)[1])
            if not len(positions):
                continue
            if (parted := part(a, b, truth[positions], FLOOR[dtype])) is None:
                continue
            row, difference, errors = parted
            where = {"step": step, "request": requests[seq], "position": int(positions[row]), "layer": layer, "tensor": tensor}
            found.append((place, Finding(**where, difference=difference, errors=errors)))  # type: ignore[arg-type]
            break
    return min(found, key=lambda entry: entry[0])[1] if found else None


def locate_inside(
    batch: Batch,
    step: int,
    requests: Sequence[int],
    histories: Sequence[Sequence[int]],
    taps: tuple[Taps, Taps],
    model: NumpyModel,
    dtype: Dtype,
    suspects: Sequence[int],
) -> Finding | None:
    """Return the first tensor with an error that its inputs do not explain, however small, over the sequences `suspects`.

    Each operation is repeated in float64 on the engine's own inputs, so that errors of earlier operations do not count. An
    engine's error is too large if it exceeds `SURE` times that of the other engine, or `OWN_FLOOR` where that is larger.
    """
    found: list[tuple[int, Finding]] = []
    order = names(*taps, model.config.num_layers)
    # An operation must be the same for both: one engine's fused kernel is compared with all that it fuses of the other.
    shared = [{name: tap[name] for _, _, name in order} for tap in taps]
    for seq in suspects:
        both = [explained(batch, seq, histories[seq], tap, model) for tap in shared]
        for place, (layer, tensor, name) in enumerate(order):
            if name not in both[0] or not len(both[0][name]):
                continue
            exact, rows = [own[name] for own in both], [rows_of(batch, seq, tensor, tap[name])[0] for tap in taps]
            scale = scales(exact[0])
            errors = [distances(mine, own, scale) for mine, own in zip(rows, exact, strict=True)]
            limit = SURE * max(OWN_FLOOR[dtype], min(error.max() for error in errors))
            apart = np.flatnonzero(~(np.maximum(*errors) <= limit))
            if len(apart):
                row = int(apart[0])
                own_errors = float(errors[0][row]), float(errors[1][row])
                position = int(rows_of(batch, seq, tensor)[1][row])
                difference = float(distances(rows[0], rows[1], scale)[row])
                where = {"step": step, "request": requests[seq], "position": position, "layer": layer, "tensor": tensor}
                found.append((place, Finding(**where, difference=difference, errors=own_errors, inside=True)))  # type: ignore[arg-type]
                break
    return min(found, key=lambda entry: entry[0])[1] if found else None


def explained(batch: Batch, seq: int, history: Sequence[int], taps: Taps, model: NumpyModel) -> dict[str, np.ndarray]:
    """Repeat the operations of a step in float64, each on the engine's own inputs, for one sequence. Returns outputs by name.

    Where the engine does not show an input, as an operation inside a fused kernel, the repeated one takes its place."""
    rows, positions = rows_of(batch, seq, "embedding")
    asked = np.isin(rows, batch.logit_rows)
    exact: dict[str, np.ndarray] = {}

    def done(name: str, output: np.ndarray) -> np.ndarray:
        """Keep an operation's output; return the engine's own, the input of the next operation."""
        exact[name] = output
        if name not in taps:
            return output
        return rows_of(batch, seq, name.rpartition(".")[2], taps[name])[0].astype(np.float64)

    x_TD = done("embedding", model.embed(np.asarray(history)[positions]))
    for layer in range(model.config.num_layers):
        prefix = f"layers.{layer}."
        n_TD = done(prefix + "attn_norm", model.attn_norm(layer, x_TD))
        q_TNH, *_ = (done(prefix + name, x) for name, x in zip("qkv", model.project(layer, n_TD, positions), strict=True))
        k_CKH, v_CKH = (rows_of(batch, seq, name, taps[prefix + name])[0].astype(np.float64) for name in ("keys", "values"))
        out_TNH = done(prefix + "attention", model.attend(layer, q_TNH, k_CKH, v_CKH, positions))
        x_TD = done(prefix + "attn_residual", model.attn_residual(layer, x_TD, out_TNH))
        m_TD = done(prefix + "mlp", model.mlp(layer, x_TD))
        x_TD = done(prefix + "residual", x_TD + m_TD)
    x_TD = done("final_norm", model.final_norm(x_TD))
    done("logits", model.head(x_TD[asked]))
    return exact


def part(a: np.ndarray, b: np.ndarray, exact: np.ndarray, floor: float) -> tuple[int, float, tuple[float, float]] | None:
    """The first row in which two engines part, of arrays [n, …] whose rows are positions: its number, their difference, and the
    error of each. None if they do not."""
    scale = scales(exact)
    differences, *errors = (distances(*pair, scale) for pair in ((a, b), (a, exact), (b, exact)))
    limit = max(floor, SURE * min(error.max() for error in errors))
    apart = np.flatnonzero(~(differences <= (limit if np.isfinite(limit) else floor)))
    if not len(apart):
        return None
    row = int(apart[0])
    return row, float(differences[row]), (float(errors[0][row]), float(errors[1][row]))


def scales(exact: np.ndarray) -> np.ndarray:
    """float64, the shape of `exact`: the magnitude of each element, at least the root mean square of all. An element far larger
    than the others, as in the residuals of a trained model, is rounded at its own scale."""
    return np.maximum(np.abs(exact), float(np.sqrt(np.mean(exact * exact))) or 1.0)


def distances(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64[n]: how far apart two rows are at most, over `scale`; inf where one is not finite."""
    with np.errstate(invalid="ignore"):
        apart = (np.abs(a.astype(np.float64) - b) / scale).reshape(len(a), -1).max(axis=1)
    return np.where(np.isfinite(apart), apart, np.inf)


def rows_of(batch: Batch, seq: int, tensor: str, tap: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a tensor that belong to one sequence, and the position of each in its request's tokens."""
    if tensor in CONTEXT:
        first = int(batch.kv_lengths[:seq].sum())
        positions = np.arange(batch.kv_lengths[seq])
        rows = first + positions
    elif tensor in ("logits", "tokens"):
        rows = np.flatnonzero(batch.logit_owner == seq)
        positions = batch.positions[batch.logit_rows[rows]]
    else:
        rows = np.arange(batch.query_starts[seq], batch.query_starts[seq + 1])
        positions = batch.positions[rows]
    return rows if tap is None else tap[rows], positions
