"""One step as the kernels read it, and what they give back. `step.h` and `sample.h` have the same layouts in C++."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.batch import Batch
from common.request import MAX_LOGPROBS

HEADER = 8
SAMPLED = 5 + 2 * MAX_LOGPROBS
"""int32 words of a logit row's result: token, finite, digest, logprob, rank, then ids and logprobs of the likeliest."""


def pack_step(batch: Batch) -> np.ndarray:
    """A batch as int32[n]: a header of counts, then the arrays."""
    owner = batch.logit_owner
    words = lambda array: np.ascontiguousarray(array).reshape(-1).view(np.int32)  # noqa: E731
    arrays = [batch.token_ids, batch.positions, batch.slots[0], batch.query_starts, batch.kv_lengths]
    arrays += [words(batch.page_table[0]), batch.fill_at, batch.fill_row, batch.logit_rows, batch.rows[owner]]
    if batch.seeds is not None and batch.temperature is not None:
        arrays += [words(batch.seeds[owner]), words(batch.temperature[owner])]
    if batch.top_k is not None and batch.top_p is not None and batch.min_p is not None:
        arrays += [words(batch.top_p[owner]), words(batch.min_p[owner]), batch.top_k[owner]]
    logprobs = (batch.num_top is not None) + (batch.score_ids is not None)
    if batch.score_ids is not None:
        arrays.append(batch.score_ids)
    modes = (batch.seeds is not None, batch.top_k is not None, logprobs)
    counts = (batch.num_tokens, batch.num_seqs, len(owner), batch.page_table.shape[2], len(batch.fill_at), *modes)
    return np.concatenate([np.array(counts, np.int32), *arrays])


def without_modes(step: np.ndarray) -> np.ndarray:
    """A packed step that samples greedily and reports nothing. What it does not look at lies behind all else."""
    return np.concatenate([step[:5], np.zeros(3, np.int32), step[HEADER:]])


def pack_changes(batch: Batch, at: int = 0, most: int | None = None) -> np.ndarray:
    """What a batch does to its logits as int32[n]: a header of counts, its edits from place `at` on, `most` of them, and with
    the first edits all masks."""
    part = slice(at, None if most is None else at + most)
    none = np.empty(0, np.int32)
    rows, ids, edits = (
        none if array is None else np.ascontiguousarray(array[part]).reshape(-1).view(np.int32)
        for array in (batch.edit_rows, batch.edit_ids, batch.edits)
    )
    mask_rows, masks = (none if array is None or at else array for array in (batch.mask_rows, batch.masks))
    words = masks.shape[1] if masks.ndim > 1 else 0
    counts = np.array([len(rows), len(mask_rows), words, 0], np.int32)
    return np.concatenate([counts, rows, ids, edits, mask_rows, masks.reshape(-1).view(np.int32)])


def max_step_size(tokens: int, seqs: int, pages: int, rows: int) -> int:
    """Words of the largest step of `tokens` tokens, `seqs` sequences of `pages` pages each, and `rows` logit rows."""
    return HEADER + 5 * tokens + 2 * seqs + 1 + seqs * pages + 9 * rows


def unpack_sampled(sampled: np.ndarray, batch: Batch) -> tuple[Any, ...]:
    """int32[R, SAMPLED] as the arguments of `interface.make_result`."""
    columns = sampled.T
    finite, digests = columns[1] > 0, columns[2].view(np.uint32)
    if batch.num_top is None:
        return columns[0], finite, None, None, None, None, digests
    split = 5 + MAX_LOGPROBS
    floats = lambda part: np.ascontiguousarray(part).view(np.float32)  # noqa: E731
    logprobs = floats(columns[3])
    return columns[0], finite, logprobs, columns[4], sampled[:, 5:split], floats(sampled[:, split:]), digests
