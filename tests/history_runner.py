"""The history-hash runner: a `ModelRunner` whose next token is a hash of all it reads back through the page table.

Its KV of position p is a hash chain over the tokens up to p, taken from the KV of position p - 1 as the page table finds it.
Its next token is a hash over the KV of every position, each weighted by its place, and of how the request samples. So a wrong
page, row, position, token, length, sampling parameter or edit gives a wrong token, and `expected` says which would have been
right from the request alone. Of n tokens that are not masked, it is one. All arithmetic is in unsigned 64-bit integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.batch import Batch, Mask, Want, masked
from common.interface import Caps, KVGroup, ModelRunner, PageMemory, Progress, Result, StepHandle, make_result, rows_of
from common.request import Logprobs, Request, Status

MASK = (1 << 64) - 1
A, B, C = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB, 0x9E37_79B9_7F4A_7C15
UNWRITTEN = -1


def mix(x: int) -> int:
    """A good 64-bit hash of a 64-bit number."""
    x = (x ^ x >> 30) * A & MASK
    x = (x ^ x >> 27) * B & MASK
    return x ^ x >> 31


def mix_array(x: np.ndarray) -> np.ndarray:
    """`mix` of every element of a uint64 array."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(A)
    x = (x ^ x >> np.uint64(27)) * np.uint64(B)
    return x ^ x >> np.uint64(31)


def sampling_code(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> int:
    """One number for how a request samples; 0 if it is greedy."""
    if temperature == 0.0:
        return 0
    code = seed
    for value in (round(temperature * 4096), top_k, round(top_p * 4096), round(min_p * 4096)):
        code = mix((code + value + C) & MASK)
    return code


def edit_code(token: int, edit: Sequence[float]) -> int:
    """One number for what is done to the logit of a token."""
    code = mix(token + C)
    for bits in np.array(edit, np.float32).view(np.uint32).tolist():
        code = mix((code + bits) & MASK)
    return code


class HistoryRunner(ModelRunner):
    """`violations` lists what a correct engine never makes it do.

    Faults: `fail_submit` and `fail_result` are raised once, at the next chance; every step raises what `poison_of` finds in it,
    and does so in its result if `fails_late`; `faults` counts what was raised. Logits after `nan_token` are not finite. With
    `batches` set to a list, every batch is kept in it.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        block_size: int = 16,
        vocab_size: int = 64,
        max_seqs: int = 64,
        max_logits: int = 0,
        depth: int = 0,
        pipelined: bool = False,
        buckets: tuple[int, ...] = (),
        groups: int = 1,
        nan_token: int | None = None,
    ) -> None:
        self.num_pages, self.block_size, self.groups, self.nan_token = num_pages, block_size, groups, nan_token
        self._caps = Caps(
            backend="history",
            device="cpu",
            dtypes=("uint64",),
            kernels=("framework",),
            token_buckets=buckets,
            decode_buckets=buckets,
            max_tokens=buckets[-1] if buckets else 1 << 30,
            max_seqs=max_seqs,
            max_logits=max_logits,
            vocab_size=vocab_size,
            depth=depth,
            pipelined=pipelined,
        )
        self.violations: list[str] = []
        self.fail_submit: BaseException | None = None
        self.fail_result: BaseException | None = None
        self.poison_of: Callable[[Batch], BaseException | None] = lambda batch: None
        self.fails_late = False
        self.faults = 0
        self.batches: list[Batch] | None = None
        self._odd = np.arange(1, 1 << 17, 2, dtype=np.uint64)
        self.reset()

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def compilations(self) -> int:
        return 0

    def load(self, checkpoint: object, progress: Progress | None = None) -> None:
        pass

    def kv_groups(self) -> tuple[KVGroup, ...]:
        return tuple(KVGroup(layers=(g,), window=0, page_bytes=16 * self.block_size) for g in range(self.groups))

    def allocate(self, pages_per_group: Sequence[int]) -> None:
        self.num_pages = pages_per_group[0]
        self.reset()

    def warmup(self, progress: Progress | None = None) -> None:
        pass

    def reset(self) -> None:
        slots = self.num_pages * self.block_size
        self.chain = np.full(slots, 0xDEAD, np.uint64)
        self.at = np.full(slots, UNWRITTEN, np.int32)
        self.last = np.full(self._caps.max_seqs, UNWRITTEN, np.int64)

    def poison(self, pages: Sequence[int]) -> None:
        """Spoil pages that nobody may read before they are written anew."""
        spoiled = (np.array(pages, np.int64)[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        self.at[spoiled] = UNWRITTEN
        self.chain[spoiled] = 0xDEAD

    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        shape, where = (1, -1, self.block_size, 1, 1), list(pages)
        return {"k": self.chain.reshape(shape)[:, where].view(np.int64), "v": self.at.reshape(shape)[:, where]}

    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        shape, where = (1, -1, self.block_size, 1, 1), list(pages)
        self.chain.reshape(shape)[:, where] = arrays["k"].view(np.uint64)
        self.at.reshape(shape)[:, where] = arrays["v"]

    def page_memory(self, group: int) -> PageMemory | None:
        shape = 1, self.num_pages, self.block_size
        rows = {name: rows_of([x.ctypes.data], shape, x.itemsize) for name, x in (("k", self.chain), ("v", self.at))}
        return PageMemory(f"history {self.block_size}", rows)

    def close(self) -> None:
        pass

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        """Runs at once; what the engine cannot know before `result` it does not get before."""
        batch = masked(batch, mask)
        if self.batches is not None:
            self.batches.append(batch)
        poison = self.poison_of(batch)
        self._maybe_raise(self.fail_submit or (None if self.fails_late else poison))
        return _Done(self, self._run(batch), poison)

    def _maybe_raise(self, error: BaseException | None) -> None:
        if error is not None:
            self.fail_submit = self.fail_result = None
            self.faults += 1
            raise error

    def _run(self, batch: Batch) -> Result:
        size, vocab = self.block_size, self._caps.vocab_size
        sources, targets = batch.copies[0].T
        for kept in (self.chain.reshape(-1, size), self.at.reshape(-1, size)):
            kept[targets] = kept[sources]
        rows, starts, kv_lengths = batch.rows, batch.query_starts[:-1], batch.kv_lengths
        table, slots, positions = batch.page_table[0], batch.slots[0], batch.positions
        tokens = batch.token_ids.astype(np.uint64)
        if len(batch.fill_at) and self._caps.pipelined:
            self.violations.append("a stage is to compute with a token that a later one is yet to choose")
        if len(batch.fill_at):
            tokens[batch.fill_at] = self.last[batch.fill_row]
        num_seqs = len(rows)
        seqs = np.arange(num_seqs)

        # Write: the chain of the position before, then running sums over each sequence's tokens.
        before = positions[starts] - 1
        previous = table[seqs, np.maximum(before, 0) // size] * size + before % size
        self._check(before >= 0, self.at[previous] == before, "the position before a chunk", batch)
        base = np.where(before >= 0, self.chain[previous], np.uint64(0))
        links = mix_array(tokens * np.uint64(C) + positions.astype(np.uint64) + np.uint64(1))
        if len(tokens) == num_seqs:
            chain = base + links
        else:
            owner = np.repeat(seqs, np.diff(batch.query_starts))
            sums = np.cumsum(links)
            chain = sums + (base - (sums[starts] - links[starts]))[owner]
        self.chain[slots] = chain
        self.at[slots] = positions

        # Read: every position up to that of every logit row, through its sequence's pages.
        owner = batch.logit_owner
        sample = (batch.want & Want.SAMPLE) > 0
        lengths = positions[batch.logit_rows] + 1
        if not (lengths == kv_lengths[owner])[sample].all() or len(owner) > max(self._caps.max_seqs, self._caps.max_logits):
            self.violations.append(f"a token is sampled before the end, or {len(owner)} logit rows are too many")
        width = int(lengths.max(initial=0))
        span = np.arange(width)
        read = table[owner][:, span // size] * size + span % size
        inside = span < lengths[:, None]
        self._check(inside, self.at[read] == span, "a position in the history", batch)
        weighed = mix_array(self.chain[read]) * self._odd[:width]
        value = np.where(inside, weighed, np.uint64(0)).sum(axis=1, dtype=np.uint64)
        if batch.seeds is not None:
            value = value + np.where(sample, self._codes(batch)[owner], np.uint64(0))
        if batch.score_ids is not None:
            value = value + np.where(sample, 0, batch.score_ids).astype(np.uint64)
        if batch.adjusts:
            value = value + self._change_codes(batch)
        value = mix_array(value)
        sampled = (value % np.uint64(vocab)).astype(np.int32)
        if batch.adjusts:
            allowed = self._allowed(batch)
            place = value % np.maximum(allowed.sum(axis=1), 1).astype(np.uint64)
            sampled = (allowed.cumsum(axis=1) > place[:, None]).argmax(axis=1).astype(np.int32)
        self.last[rows[owner[sample]]] = sampled[sample]
        if batch.score_ids is not None:
            sampled = np.where(sample, sampled, batch.score_ids)

        finite = np.ones(len(owner), bool) if self.nan_token is None else tokens[batch.logit_rows] != self.nan_token
        return make_result(batch, sampled, finite, *self._logprobs(batch, value, sampled))

    def _codes(self, batch: Batch) -> np.ndarray:
        seeds, temperature = batch.seeds, batch.temperature
        assert seeds is not None and temperature is not None
        none, ones = np.zeros(batch.num_seqs, np.int32), np.ones(batch.num_seqs)
        top_k = none if batch.top_k is None else batch.top_k
        top_p = ones if batch.top_p is None else batch.top_p
        min_p = none if batch.min_p is None else batch.min_p
        codes = []
        for s in range(batch.num_seqs):
            seed = int(seeds[s, 0]) | int(seeds[s, 1]) << 32
            codes.append(sampling_code(float(temperature[s]), int(top_k[s]), float(top_p[s]), float(min_p[s]), seed))
        return np.array(codes, np.uint64)

    def _change_codes(self, batch: Batch) -> np.ndarray:
        codes = np.zeros(len(batch.want), np.uint64)
        if batch.edit_rows is not None and batch.edit_ids is not None and batch.edits is not None:
            code = mix_array(batch.edit_ids.astype(np.uint64) + np.uint64(C))
            for bits in batch.edits.view(np.uint32).T:
                code = mix_array(code + bits)
            np.add.at(codes, batch.edit_rows, code)
            if len(set(zip(batch.edit_rows.tolist(), batch.edit_ids.tolist(), strict=True))) < len(code):
                self.violations.append("a logit is edited twice")
        return codes

    def _allowed(self, batch: Batch) -> np.ndarray:
        """bool[R, V]: what is left to choose from."""
        allowed = np.ones((len(batch.want), self._caps.vocab_size), bool)
        if batch.mask_rows is not None and batch.masks is not None:
            bits = np.unpackbits(batch.masks.view(np.uint8), axis=1, bitorder="little")
            allowed[batch.mask_rows] = bits[:, : allowed.shape[1]]
        if batch.edit_rows is not None and batch.edit_ids is not None and batch.edits is not None:
            never = batch.edits[:, 0] == -np.inf
            allowed[batch.edit_rows[never], batch.edit_ids[never]] = False
        return allowed

    def _logprobs(
        self, batch: Batch, value: np.ndarray, sampled: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | tuple[None, None, None, None]:
        if batch.num_top is None:
            return None, None, None, None
        ranks = (value >> np.uint64(40)) % np.uint64(self._caps.vocab_size) + np.uint64(1)
        top_ids = (sampled[:, None] + np.arange(batch.num_top.max(initial=0))) % self._caps.vocab_size
        return (
            -(value >> np.uint64(48)).astype(np.float32),
            ranks.astype(np.int32),
            top_ids.astype(np.int32),
            -top_ids.astype(np.float32),
        )

    def _check(self, where: np.ndarray, good: np.ndarray, what: str, batch: Batch) -> None:
        if not (good | ~where).all():
            self.violations.append(f"{what} was read, but not written (rows {batch.rows.tolist()})")


class _Done(StepHandle):
    def __init__(self, runner: HistoryRunner, result: Result, poison: BaseException | None) -> None:
        self._runner, self._result, self._poison = runner, result, poison

    def result(self) -> Result:
        self._runner._maybe_raise(self._runner.fail_result or self._poison)
        return self._result


@dataclass(frozen=True)
class Expected:
    """What is right for a request: its tokens, the hash that each came from, how it ends, and what its prompt scores."""

    tokens: list[int]
    values: list[int]
    finish: Status
    prompt_logprobs: list[Logprobs | None] | None = None

    def logprobs(self, i: int, k: int, vocab_size: int) -> Logprobs:
        """What the runner reports of output token i when k are asked for."""
        return _logprobs(self.tokens[i], self.values[i], k, vocab_size)


def _logprobs(token: int, value: int, k: int, vocab_size: int) -> Logprobs:
    top_ids = [(token + j) % vocab_size for j in range(k)]
    rank = (value >> 40) % vocab_size + 1
    return Logprobs(-float(value >> 48), rank, top_ids, [-float(t) for t in top_ids])


def expected_edits(request: Request, output: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Token → bias, repetition factor and penalty, for the token behind an output; without those that change nothing."""
    params, counts = request.params, Counter(output)
    bias: dict[int, float] = dict(params.logit_bias or ())
    for *before, last in request.bad_words:
        if list(output[len(output) - len(before) :]) == before:
            bias[last] = -np.inf
    if len(output) < params.min_tokens:
        bias |= dict.fromkeys((*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)), -np.inf)
    edits = {}
    for token in {*bias, *request.prompt_token_ids, *output}:
        repetition = params.repetition_penalty if token in counts or token in request.prompt_token_ids else 1.0
        penalty = params.frequency_penalty * counts[token] + params.presence_penalty if token in counts else 0.0
        edits[token] = (bias.get(token, 0.0), repetition, penalty)
    return {token: edit for token, edit in edits.items() if edit != (0.0, 1.0, 0.0)}


def expected(request: Request, *, vocab_size: int, max_tokens: int, seed: int = 0, nan_token: int | None = None) -> Expected:
    """The judge: a pure function of the request. `max_tokens` holds where it names none, `seed` where it brings none."""
    params, code = request.params, 0
    if not params.greedy:
        temperature, top_p, min_p = (float(np.float32(x)) for x in (params.temperature, params.top_p, params.min_p))
        code = sampling_code(temperature, params.top_k, top_p, min_p, seed if (own := request.own_seed) is None else own)
    ids = range(vocab_size) if params.allowed_token_ids is None else sorted({*params.allowed_token_ids})
    changes = bool(request.bad_words or params.min_tokens or params.logit_bias or params.allowed_token_ids)
    changes |= (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)
    scores: list[Logprobs | None] | None = None if params.prompt_logprobs is None else [None]
    chain = total = position = 0
    tokens: list[int] = []
    values: list[int] = []
    fresh = list(request.prompt_token_ids)
    while True:
        for i, token in enumerate(fresh):
            chain = (chain + mix((token * C + position + 1) & MASK)) & MASK
            total = (total + mix(chain) * (2 * position + 1)) & MASK
            position += 1
            if token == nan_token and (i == len(fresh) - 1 or scores is not None):
                return Expected(tokens, values, Status.FINISHED_ERROR, scores)
            if scores is not None and not tokens and i + 1 < len(fresh):
                scores.append(
                    _logprobs(fresh[i + 1], mix((total + fresh[i + 1]) & MASK), params.prompt_logprobs or 0, vocab_size)
                )
        edits = expected_edits(request, tokens) if changes else {}
        values.append(mix((total + code + sum(edit_code(*edit) for edit in edits.items())) & MASK))
        allowed = [token for token in ids if edits.get(token, (0.0,))[0] != -np.inf]
        if not allowed:
            return Expected(tokens, values, Status.FINISHED_ERROR, scores)
        fresh = [allowed[values[-1] % len(allowed)]]
        tokens += fresh
        ends = (not params.ignore_eos and fresh[0] in request.eos_token_ids) or fresh[0] in params.stop_token_ids
        if ends and len(tokens) >= params.min_tokens:
            return Expected(tokens, values, Status.FINISHED_STOP, scores)
        if len(tokens) >= (params.max_tokens or max_tokens):
            return Expected(tokens, values, Status.FINISHED_LENGTH, scores)
