"""Find the steps of one trace at which two engines differ, and decide which differing choices are ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.batch import Batch
from common.config import Dtype
from common.schedule.trace import Kind, read_frames, unpack_arrays
from experiments.correctness.bisect_tensor import CONTEXT, Finding, locate, locate_inside
from experiments.correctness.judge import Divergence, log_softmax, weigh
from experiments.correctness.observe import Compared
from experiments.correctness.reference import NumpyModel
from experiments.display.progress import ProgressReporter
from experiments.engines.process import IsolatedEngine

LOGITS: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""How far apart two rows of logits may be, in their standard deviations, before a step is looked into."""
TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""The largest error of a log-probability that rounding explains."""
LOOKS = 3
"""Steps that are looked into at most, if none of them shows where it comes from."""
JUDGED = 12
"""Differing choices that are held against float64 at most."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where the engines chose differently on the same history, with logits that agree."""

    step: int
    request: int
    divergence: Divergence


class Ledger:
    """Which token lies in which slot, and since which step, as a trace goes by: how the history of a sequence is known."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._tokens: dict[int, tuple[int, int]] = {}

    def write(self, step: int, batch: Batch) -> None:
        """A step's page copies, then its tokens."""
        size = self._block_size
        for source, target in batch.copies[0].tolist():
            moved = {target * size + i: self._tokens.get(source * size + i) for i in range(size)}
            self._tokens |= {slot: held for slot, held in moved.items() if held is not None}
        self._tokens |= {
            slot: (token, step) for slot, token in zip(batch.slots[0].tolist(), batch.token_ids.tolist(), strict=True)
        }

    def history(self, batch: Batch) -> list[list[tuple[int, int]]]:
        """For each sequence of a step that was written: (token, step that wrote it) of every position."""
        return [list(self._read(batch.page_table[0][seq], int(length))) for seq, length in enumerate(batch.kv_lengths)]

    def _read(self, table: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
        size = self._block_size
        for position in range(length):
            yield self._tokens[int(table[position // size]) * size + position % size]


class Trace:
    """The recorded steps that had a result."""

    def __init__(self, path: str, requests: Sequence[Sequence[int]], block_size: int) -> None:
        self._block_size = block_size
        landed = [step for kind, step, _ in read_frames(path) if kind is Kind.RESULT]
        batches = {step: Batch.from_bytes(payload) for kind, step, payload in read_frames(path) if kind is Kind.SUBMIT}
        self.steps = [(step, batches[step], owners) for step, owners in zip(landed, requests, strict=True)]
        """Number in the trace, batch, and whose sequences it has."""

    def histories(self, index: int) -> list[list[tuple[int, int]]]:
        """For each sequence of a step: every token up to the end of it, and the step that wrote it."""
        ledger = Ledger(self._block_size)
        for step, (_, batch, _) in enumerate(self.steps[: index + 1]):
            ledger.write(step, batch)
        return ledger.history(self.steps[index][1])


class Search:
    """Two engines alive side by side over one trace."""

    def __init__(self, pair: Sequence[IsolatedEngine], trace: str, steps: Trace, model: NumpyModel, dtype: Dtype) -> None:
        self._pair, self._path, self._trace, self._model, self._dtype = pair, trace, steps, model, dtype

    def first(self, rows: Sequence[Compared], scratch: Path, narrator: ProgressReporter) -> Finding | None:
        """Look into the first steps whose logits part."""
        suspects: dict[int, list[int]] = {}
        for row in rows:
            if not row.error <= LOGITS[self._dtype]:
                suspects.setdefault(row.step, []).append(row.seq)
        for index in sorted(suspects)[:LOOKS]:
            found = self._look(index, suspects[index], scratch, narrator)
            if found:
                return found
        return None

    def inside(self, rows: Sequence[Compared], scratch: Path, narrator: ProgressReporter) -> Finding | None:
        """Look into the steps whose logits differ most, below the threshold, for errors that inputs do not explain.

        Cached keys and values of these steps are looked into too, of whatever step wrote them."""
        worst: dict[int, list[int]] = {}
        for row in sorted(rows, key=lambda row: -row.error):
            if row.error > 0 and (row.step in worst or len(worst) < LOOKS):
                worst.setdefault(row.step, []).append(row.seq)
        looks = (self._look(index, seqs, scratch, narrator, inside=True) for index, seqs in sorted(worst.items()))
        return next((found for found in looks if found), None)

    def _look(
        self, index: int, seqs: list[int], scratch: Path, narrator: ProgressReporter, inside: bool = False
    ) -> Finding | None:
        """Return the tensor that parts first in a step; if an earlier step wrote it as a key or value, then in that step."""
        number, batch, requests = self._trace.steps[index]
        taps = []
        for engine in self._pair:
            file = scratch / f"{engine.spec.label}-{number}"
            what = f"{engine.spec.label}: step {index}, with the outputs of its layers"
            narrator.say(what)
            if not file.exists():
                progress = narrator.progress(engine.spec.label)
                with narrator.waiting(f"{what}; the frameworks' kernels are compiled first"):
                    engine.observe("taps", progress, trace=self._path, step=number, file=str(file))
            taps.append(unpack_arrays(file.read_bytes()))
        narrator.say(f"float64: {len(seqs)} sequence{'s' * (len(seqs) > 1)} of step {index}")
        histories = self._trace.histories(index)
        tokens = [[token for token, _ in history] for history in histories]
        where = (batch, index, requests, tokens, (taps[0], taps[1]), self._model, self._dtype, seqs)
        # Below the threshold, rounding of earlier layers may explain a difference, so the operations are compared on their own
        # inputs. Cached keys and values are such inputs: they are compared with float64, as a step above the threshold is.
        found = (locate_inside(*where) or locate(*where, CONTEXT)) if inside else locate(*where)
        if found is None or found.tensor not in ("keys", "values"):
            return found
        seq = list(requests).index(found.request)
        writer = histories[seq][found.position][1]
        if writer == index:
            return found
        owners = self._trace.steps[writer][2]
        earlier = [i for i, owner in enumerate(owners) if owner == found.request] or list(range(len(owners)))
        return self._look(writer, earlier, scratch, narrator, inside) or found

    def choices(self, rows: Sequence[Compared], narrator: ProgressReporter) -> list[Choice]:
        """The first differing choices, each with its float64 margin."""
        differing = [row for row in rows if row.tokens[0] != row.tokens[1]][:JUDGED]
        found = []
        for done, row in enumerate(differing):
            narrator.progress("float64")(done, len(differing), "differing choices")
            history = [token for token, _ in self._trace.histories(row.step)[row.seq]]
            exact = log_softmax(self._model.logits(history)[-1])
            reported = [dict(zip(row.tokens, logprobs, strict=True)) for logprobs in row.logprobs]
            divergence = weigh(row.position, row.tokens, reported, exact, TOLERANCE[self._dtype])
            found.append(Choice(step=row.step, request=self._trace.steps[row.step][2][row.seq], divergence=divergence))
        return found
