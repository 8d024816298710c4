"""Record what an engine computes, step by step. It runs in the engine's process, by `IsolatedEngine.observe`.

A run is recorded as a trace, and any engine can repeat the trace with the same pages. So both engines compute the same steps on
the same tokens, whatever either would choose. Logits and tensors can then be compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.batch import Batch, Mask
from common.engine import Engine
from common.interface import ModelRunner, Progress, StepHandle
from common.schedule.trace import Kind, Recorder, pack_arrays, read_frames, retrace
from experiments.correctness import perplexity
from experiments.correctness.judge import log_softmax
from experiments.load.driver import drive
from experiments.load.workload import Item

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One logit row of a step as two engines computed it."""

    step: int
    """Of those that had a result, from 0."""
    seq: int
    """The sequence's place in the step."""
    position: int
    """Of the token that the row predicts, in its request's tokens."""
    tokens: tuple[int, int]
    """What each engine chose."""
    logprobs: tuple[tuple[float, float], tuple[float, float]]
    """Of these two tokens, by each engine."""
    error: float
    """The largest difference of two logits, in standard deviations of the first engine's; inf where one is not finite."""
    kld: float
    """Kullback-Leibler divergence of the second engine's distribution from the first's, in nats; inf likewise."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Compared:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        first, second = map(tuple, record["logprobs"])
        return cls(**dict(record) | {"tokens": tuple(record["tokens"]), "logprobs": (first, second)})


class Roll(Recorder):
    """A recorder that also notes whose sequences each step had: the runner itself never learns that."""

    def __init__(self, engine: Engine, path: Path) -> None:
        super().__init__(engine.runner, path)
        self._engine = engine
        self.requests: list[list[int]] = []

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        pending = super().submit(batch, mask)
        by_row = {seq.row: int(seq.request.request_id) for seq in self._engine.scheduler.running}
        self.requests.append([by_row[row] for row in batch.rows.tolist()])
        return pending


def on_record(engine: Engine, progress: Progress, items: list[Message], trace: str, logprobs: int | None) -> Message:
    """Run requests as `drive` does, and record the trace. Returns `rows`, and `requests`: whose sequences each step had, of
    those that had a result."""
    clear(engine)
    roll = Roll(engine, Path(trace))
    engine.runner = roll
    try:
        window = drive(engine, [*map(Item.of, items)], logprobs)
    finally:
        engine.runner = roll.stop()
    landed = [step for kind, step, _ in read_frames(trace) if kind is Kind.RESULT]
    return {"rows": [asdict(row) for row in window.rows], "requests": [roll.requests[step] for step in landed]}


def on_keep_logits(engine: Engine, progress: Progress, trace: str, file: str) -> Message:
    """Repeat a trace and write the logits and tokens of every step to a new file, for another engine to compare."""
    with open(file, "xb") as out:
        for _, taps in observed(engine, progress, trace, ("logits", "tokens")):
            out.write(taps["logits"].tobytes() + taps["tokens"].tobytes())
    return {}


def on_compare_logits(engine: Engine, progress: Progress, trace: str, file: str) -> Message:
    """Repeat a trace and compare with what the first engine wrote: `rows`, a `Compared` for each logit row, in order."""
    rows: list[Message] = []
    with open(file, "rb") as source:
        for step, (batch, taps) in enumerate(observed(engine, progress, trace, ("logits", "tokens"))):
            logits, tokens = taps["logits"], taps["tokens"]
            first = np.frombuffer(source.read(logits.nbytes), np.float32).reshape(logits.shape)
            chosen = np.frombuffer(source.read(tokens.nbytes), np.int32)
            for row, (seq, at) in enumerate(zip(batch.logit_owner, batch.logit_rows, strict=True)):
                pair = (int(chosen[row]), int(tokens[row]))
                place = {"step": step, "seq": int(seq), "position": int(batch.positions[at]) + 1, "tokens": pair}
                rows.append(place | compare_row(first[row], logits[row], pair))
    return {"rows": rows}


def compare_row(a: np.ndarray, b: np.ndarray, tokens: tuple[int, int]) -> dict[str, Any]:
    """`logprobs`, `error` and `kld` of a `Compared`, from two rows of logits [V]."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return {"logprobs": ((np.nan, np.nan), (np.nan, np.nan)), "error": np.inf, "kld": np.inf}
    p, q = log_softmax(a), log_softmax(b)
    logprobs = tuple((float(x[tokens[0]]), float(x[tokens[1]])) for x in (p, q))
    error = float(np.abs(a - b).max() / max(float(a.std()), 1e-30))
    return {"logprobs": logprobs, "error": error, "kld": max(0.0, float((np.exp(p) * (p - q)).sum()))}


def on_taps(engine: Engine, progress: Progress, trace: str, step: int, file: str) -> Message:
    """Repeat a trace up to one step, and write all that shows of that step to a new file, as `pack_arrays` packs it."""
    runner = engine.runner
    clear(engine)

    def run(number: int, batch: Batch) -> dict[str, np.ndarray] | None:
        progress(number, step, "repeating steps")
        if number != step:
            runner.submit(batch).result()
            return None
        return with_context(runner, batch, engine.config.block_size, runner.observe(batch))

    taps = next(taps for _, _, _, taps in retrace(trace, runner, run) if taps is not None)
    clear(engine)
    Path(file).write_bytes(pack_arrays(taps))
    return {}


def on_perplexity(engine: Engine, progress: Progress, tokens: list[int], context: int) -> Message:
    """`perplexity.surprise` of a text's tokens."""
    clear(engine)
    total, count = perplexity.surprise(engine.runner, engine.config, tokens, context, progress)
    clear(engine)
    return {"total": total, "count": count}


def observed(
    engine: Engine, progress: Progress, trace: str, names: Sequence[str]
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """The steps of a trace, repeated: each with the tensors of these names."""
    total = sum(kind is Kind.RESULT for kind, _, _ in read_frames(trace))
    clear(engine)
    runner = engine.runner
    for step, batch, _, taps in retrace(trace, runner, lambda _, batch: runner.observe(batch, names)):
        progress(step + 1, total, "repeating steps")
        yield batch, taps
    clear(engine)


def clear(engine: Engine) -> None:
    """Empty pages and rows, and no memory of what they held."""
    engine.reset_prefix_cache()
    engine.runner.reset()


def with_context(runner: ModelRunner, batch: Batch, block_size: int, taps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Beside what a step computed, `keys` and `values` of each layer, [sum of kv_lengths, K, H]: what lies in the pages of its
    sequences, one sequence after the other, as attention reads it."""
    pages, places = np.unique(batch.page_table[0], return_inverse=True)
    places = places.reshape(batch.page_table[0].shape)
    context = []
    for table, length in zip(places, batch.kv_lengths, strict=True):
        position = np.arange(length)
        context.append(table[position // block_size] * block_size + position % block_size)
    slots = np.concatenate(context) if context else np.empty(0, np.int64)
    held = runner.read_pages(0, pages.tolist())
    flat = {name: x.reshape(len(x), -1, *x.shape[-2:])[:, slots].astype(np.float32) for name, x in held.items()}
    for layer in range(len(flat["k"])):
        taps |= {f"layers.{layer}.keys": flat["k"][layer], f"layers.{layer}.values": flat["v"][layer]}
    return taps
