"""Tables indexed by permanent row, and how a step's `Batch` is gathered from them: NumPy all the way, no loop over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.batch import Batch, Want
from common.request import SamplingParams
from common.text.grammar import Matcher


class Score(NamedTuple):
    """Tokens of a sequence to report on, given what is before them: those behind the positions `first` to `stop` - 1."""

    seq: int
    first: int
    stop: int
    num_top: int
    """How many of the likeliest to report beside each."""


class LogitsUpdate(NamedTuple):
    """What is done to the logits that a sequence is sampled from."""

    ids: np.ndarray
    """int32[n]"""
    values: np.ndarray
    """float32[n, 3]: of each id the bias, the repetition factor and the penalty."""
    allowed: np.ndarray | None = None
    """uint32[W], a bit a token; None allows all."""
    matcher: Matcher | None = None
    """Allows fewer tokens, and determines which only while the step runs."""


class Rows:
    """What the host knows of each row: its tokens, its pages, how it samples. One row a request while it runs.

    `max_len` is in tokens; `groups` (G) share one page numbering today, so each gets the same page table.
    """

    def __init__(self, num_rows: int, max_len: int, block_size: int, groups: int = 1) -> None:
        self.block_size, self.groups = block_size, groups
        self.tokens = np.zeros((num_rows, max_len), np.int32)
        self.pages = np.zeros((num_rows, -(-max_len // block_size)), np.int32)
        self.seeds = np.zeros((num_rows, 2), np.uint32)
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.filters = np.zeros(num_rows, bool)
        self.num_top = np.full(num_rows, -1, np.int32)  # -1: no logprobs wanted
        self.free = list(range(num_rows))[::-1]
        self._arange = np.arange(num_rows, dtype=np.int32)
        self._sample = np.full(num_rows, Want.SAMPLE, np.uint8)
        self._nothing = np.empty(0, np.int32)
        self._no_copies = np.empty((groups, 0, 2), np.int32)

    def take(self, tokens: np.ndarray, pages: Sequence[int], params: SamplingParams, seed: int) -> int:
        """A free row, filled. The caller has made sure that there is one."""
        row = self.free.pop()
        self.tokens[row, : len(tokens)] = tokens
        self.pages[row, : len(pages)] = pages
        self.pages[row, len(pages) :] = 0
        self.seeds[row] = seed & 0xFFFF_FFFF, seed >> 32
        self.temperature[row] = 0.0 if params.greedy else params.temperature
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.filters[row] = not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self.num_top[row] = -1 if params.logprobs is None else params.logprobs
        return row

    def give_back(self, row: int) -> None:
        self.free.append(row)

    def build(
        self,
        row_list: list[int],
        start_list: list[int],
        count_list: list[int],
        samples: list[int],
        fills: list[int],
        scores: Sequence[Score] = (),
        changes: Mapping[int, LogitsUpdate] | None = None,
        copies: Sequence[tuple[int, int]] = (),
    ) -> Batch:
        """The batch in which sequence s runs `count_list[s]` tokens from position `start_list[s]` of its row on.

        `samples`: the sequences whose last token asks for a next one, rising. `fills`: those whose last token only the device
        knows. `scores`: tokens to report on. `changes`: by sequence of `samples`, what is done to its logits. `copies`: pages
        (from, to) to copy first. Sequences of one token must come first.
        """
        rows, starts, counts = np.array(row_list, np.int32), np.array(start_list, np.int32), np.array(count_list, np.int32)
        size, num_seqs = self.block_size, len(rows)
        ends = starts + counts
        query_starts = np.zeros(num_seqs + 1, np.int32)
        counts.cumsum(out=query_starts[1:])
        last = query_starts[1:] - 1
        num_tokens = int(query_starts[-1])
        if num_tokens == num_seqs:  # decodes only
            owner, positions, token_rows = self._arange[:num_seqs], starts, rows
        else:
            owner = self._arange[:num_seqs].repeat(counts)
            positions = np.arange(num_tokens, dtype=np.int32) + (starts - query_starts[:-1])[owner]
            token_rows = rows[owner]
        token_ids = self.tokens[token_rows, positions]
        page_table = self.pages[rows, : -(-int(ends.max(initial=0)) // size)]
        slots = page_table[owner, positions // size] * size + positions % size
        logit_owner = np.array(samples, np.int32)
        fill_at = last[fills] if fills else self._nothing
        token_ids[fill_at] = 0
        views: dict[str, Any] = {
            "token_ids": token_ids,
            "positions": positions,
            "query_starts": query_starts,
            "kv_lengths": ends,
            "num_decodes": (count_list.count(1),),
            "rows": rows,
            "page_table": page_table[None].repeat(self.groups, 0),
            "slots": slots[None].repeat(self.groups, 0),
            "copies": np.array([copies] * self.groups, np.int32) if copies else self._no_copies,
            "fill_at": fill_at,
            "fill_row": token_rows[fill_at],
            "logit_rows": last[logit_owner],
            "logit_owner": logit_owner,
            "want": self._sample[: len(samples)],
        }
        num_top = self.num_top[rows[logit_owner]]
        if num_top.max(initial=-1) >= 0:
            views["want"] = np.where(num_top >= 0, Want.SAMPLE | Want.LOGPROBS, Want.SAMPLE)
            views["num_top"] = np.maximum(num_top, 0)
        if scores:
            views |= self._score(views, rows, starts, scores)
        if changes:
            views |= _change(views["want"] & Want.SAMPLE, views["logit_owner"], changes)
        temperature = self.temperature[rows]
        if temperature.any():
            views["seeds"], views["temperature"] = self.seeds[rows], temperature
            if self.filters[rows].any():
                views["top_k"], views["top_p"], views["min_p"] = self.top_k[rows], self.top_p[rows], self.min_p[rows]
        return Batch.pack(**views)

    def _score(
        self, views: Mapping[str, np.ndarray], rows: np.ndarray, starts: np.ndarray, scores: Sequence[Score]
    ) -> dict[str, np.ndarray]:
        """The views by logit row, with the tokens to score among those to sample."""
        counts = [score.stop - score.first for score in scores]
        each = np.arange(len(scores)).repeat(counts)
        seq, first, _, num_top = np.array(scores, np.int32)[each].T
        position = first + np.arange(len(each), dtype=np.int32) - (np.cumsum(counts) - counts)[each]
        samples = len(views["logit_rows"])
        logit_rows = np.concatenate([views["logit_rows"], views["query_starts"][seq] + position - starts[seq]])
        order = logit_rows.argsort()
        merged = lambda sampled, scored: np.concatenate([sampled, scored])[order]  # noqa: E731
        return {
            "logit_rows": logit_rows[order],
            "logit_owner": merged(views["logit_owner"], seq),
            "want": merged(views["want"], np.full(len(each), Want.SCORE | Want.LOGPROBS)),
            "num_top": merged(views.get("num_top", np.zeros(samples, np.int32)), num_top),
            "score_ids": merged(np.full(samples, -1), self.tokens[rows[seq], position + 1]),
        }


def _change(sampled: np.ndarray, owner: np.ndarray, changes: Mapping[int, LogitsUpdate]) -> dict[str, np.ndarray]:
    """The views of edits and masks."""
    place = dict(zip(owner[sampled > 0].tolist(), np.flatnonzero(sampled).tolist(), strict=True))
    made = [(place[seq], change) for seq, change in changes.items()]
    views = {}
    edited = [(row, change) for row, change in made if len(change.ids)]
    if edited:
        views["edit_rows"] = np.array([row for row, _ in edited], np.int32).repeat([len(c.ids) for _, c in edited])
        views["edit_ids"] = np.concatenate([change.ids for _, change in edited])
        views["edits"] = np.concatenate([change.values for _, change in edited])
    masked = [(row, change) for row, change in made if change.allowed is not None or change.matcher is not None]
    if masked:
        views["mask_rows"] = np.array([row for row, _ in masked], np.int32)
        if all(change.matcher is None for _, change in masked):
            views["masks"] = masks_of([change for _, change in masked])
    return views


def masks_of(changes: Sequence[LogitsUpdate]) -> np.ndarray:
    """uint32[M, W]: what each change that allows less than all does allow, their matchers asked."""
    rows = []
    for allowed, matcher in ((change.allowed, change.matcher) for change in changes):
        if matcher is not None:
            rows.append(matcher.mask() if allowed is None else matcher.mask() & allowed)
        elif allowed is not None:
            rows.append(allowed)
    return np.stack(rows)
