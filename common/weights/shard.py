"""A stage's or a rank's part of a checkpoint: itself one, of the smaller model that it computes (`common.model.partition`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.config import ModelConfig
from common.model.partition import Span, local_config, share, stage_config, stage_layers
from common.weights.checkpoint import Checkpoint, expected_shapes
from common.weights.entry import Entry


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(Entry):
    """What a rank has of a tensor: a span of one axis, of which no more is read and decoded. `raw` is the whole tensor's."""

    whole: Entry
    axis: int
    span: Span

    def slice(self, axis: int, start: int, stop: int) -> np.ndarray:
        """`dense()` with only the indices [start, stop) of `axis`."""
        axis = self._checked_axis(axis, start, stop)
        held = self.whole.slice(self.axis, self.span.start, self.span.stop)
        dense = np.zeros(self.shape, held.dtype)
        dense[tuple(map(slice, held.shape))] = held
        return np.ascontiguousarray(dense[(slice(None),) * axis + (slice(start, stop),)])


def stage_of(checkpoint: Checkpoint, stage: int, stages: int) -> Checkpoint:
    """The part of stage `stage` of `stages`, its layers counted from 0. Raises `ConfigError` if there are not enough layers."""
    if stages == 1:
        return checkpoint
    config = stage_config(checkpoint.config, stage, stages)
    first = stage_layers(checkpoint.config.num_layers, stages)[stage].start
    entries = {name: checkpoint[_moved(name, first)] for name in expected_shapes(config)}
    return Checkpoint(checkpoint.path, config, entries)


def shard(checkpoint: Checkpoint, rank: int, ranks: int) -> Checkpoint:
    """The part of rank `rank` of `ranks`. Raises `ConfigError` if they cannot share out the model."""
    if ranks == 1:
        return checkpoint
    local = local_config(checkpoint.config, ranks)
    cuts = _cuts(checkpoint.config, rank, ranks)
    entries = {name: _part(checkpoint[name], shape, cuts) for name, shape in expected_shapes(local).items()}
    return Checkpoint(checkpoint.path, local, entries)


def _moved(name: str, layers: int) -> str:
    """The name of the tensor so many layers further on."""
    words = name.split(".")
    if words[1] == "layers":
        words[2] = str(int(words[2]) + layers)
    return ".".join(words)


def _cuts(config: ModelConfig, rank: int, ranks: int) -> dict[str, tuple[int, Span]]:
    """The axis along which a tensor is cut and what the rank has of it, by the end of its name; all others are whole."""
    mine, D = share(config, rank, ranks), config.hidden_size
    queries, kv_heads = mine.queries.times(config.head_dim), mine.kv_heads.times(config.head_dim)
    outputs = {"q_proj": queries, "k_proj": kv_heads, "v_proj": kv_heads, "gate_proj": mine.features, "up_proj": mine.features}
    cuts = {f"{name}.{kind}": (0, span) for name, span in outputs.items() for kind in ("weight", "bias")}
    for name, span in (("o_proj", queries), ("down_proj", mine.features)):
        cuts[f"{name}.weight"] = 1, span
        cuts[f"{name}.bias"] = 0, Span(0, D if rank == 0 else 0, D)  # of a sum over ranks, which wants it once
    return cuts | {f"{name}.weight": (0, mine.tokens) for name in ("embed_tokens", "lm_head")}


def _part(whole: Entry, shape: tuple[int, ...], cuts: dict[str, tuple[int, Span]]) -> Entry:
    cut = cuts.get(".".join(whole.name.split(".")[-2:]))
    if cut is None:
        return whole
    axis, span = cut
    return Part(
        name=whole.name,
        shape=shape,
        encoding=whole.encoding,
        stored=whole.stored,
        source=whole.source,
        whole=whole,
        axis=axis,
        span=span,
    )
