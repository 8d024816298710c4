"""The packed batch: its bytes, and how it is gathered from the tables by row."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from common.batch import ALIGN, REQUIRED, VIEWS, Batch, BatchError, Want
from common.request import SamplingParams
from common.schedule.request_table import LogitsUpdate, Rows, Score

GREEDY = SamplingParams(temperature=0.0)


def make_rows(*params: SamplingParams, groups: int = 1) -> Rows:
    """Row r holds tokens 100 r, 100 r + 1, … and pages 10 r + 1, 10 r + 2, …, of 4 tokens each."""
    rows = Rows(max(4, len(params)), 32, 4, groups)
    for r, p in enumerate(params):
        assert rows.take(100 * r + np.arange(20), [10 * r + i for i in range(1, 6)], p, seed=(r << 32) + 7) == r
    return rows


def mixed_batch() -> Batch:
    """Row 1 decodes from position 9; row 0 runs a chunk of three from 6, its last; row 2 one of five from 0, not its last, of
    which two tokens are scored. Row 1 has edits, row 0 edits and allowed ids."""
    rows = make_rows(
        SamplingParams(temperature=0.5, top_k=3, min_p=0.25),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(temperature=1.0, top_p=0.5),
        groups=2,
    )
    changes = {
        0: LogitsUpdate(np.array([4]), np.array([[1, 2, 3]]), None),
        1: LogitsUpdate(np.array([7, 2]), np.eye(2, 3), np.array([5, 6])),
    }
    return rows.build([1, 0, 2], [9, 6, 0], [1, 3, 5], samples=[0, 1], fills=[0], scores=[Score(2, 1, 3, 4)], changes=changes)


def test_every_view_of_a_mixed_step() -> None:
    batch = mixed_batch()
    assert batch.num_seqs == 3 and batch.num_tokens == 9
    assert batch.token_ids.tolist() == [0, 6, 7, 8, 200, 201, 202, 203, 204]  # the first is the device's to fill
    assert batch.positions.tolist() == [9, 6, 7, 8, 0, 1, 2, 3, 4]
    assert batch.query_starts.tolist() == [0, 1, 4, 9]
    assert batch.kv_lengths.tolist() == [10, 9, 5]
    assert batch.num_decodes.tolist() == [1]
    assert batch.rows.tolist() == [1, 0, 2]
    table = [[11, 12, 13], [1, 2, 3], [21, 22, 23]]
    assert batch.page_table.tolist() == [table, table]
    slots = [13 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 3 * 4, 21 * 4, 21 * 4 + 1, 21 * 4 + 2, 21 * 4 + 3, 22 * 4]
    assert batch.slots.tolist() == [slots, slots]
    assert batch.copies.shape == (2, 0, 2)
    assert (batch.fill_at.tolist(), batch.fill_row.tolist()) == ([0], [1])
    assert (batch.logit_rows.tolist(), batch.logit_owner.tolist()) == ([0, 3, 5, 6], [0, 1, 2, 2])
    assert batch.want.tolist() == [Want.SAMPLE | Want.LOGPROBS, Want.SAMPLE, *[Want.SCORE | Want.LOGPROBS] * 2]
    assert batch.num_top is not None and batch.num_top.tolist() == [2, 0, 4, 4]
    assert batch.score_ids is not None and batch.score_ids.tolist() == [-1, -1, 202, 203]
    assert batch.edit_rows is not None and batch.edit_rows.tolist() == [0, 1, 1]
    assert batch.edit_ids is not None and batch.edit_ids.tolist() == [4, 7, 2]
    assert batch.edits is not None and batch.edits.tolist() == [[1, 2, 3], [1, 0, 0], [0, 1, 0]]
    assert batch.mask_rows is not None and batch.mask_rows.tolist() == [1]
    assert batch.masks is not None and batch.masks.tolist() == [[5, 6]]
    assert batch.seeds is not None and batch.seeds.tolist() == [[7, 1], [7, 0], [7, 2]]
    assert batch.temperature is not None and batch.temperature.tolist() == [0.0, 0.5, 1.0]
    assert batch.top_k is not None and batch.top_k.tolist() == [0, 3, 0]
    assert batch.top_p is not None and batch.top_p.tolist() == [1.0, 1.0, 0.5]
    assert batch.min_p is not None and batch.min_p.tolist() == [0.0, 0.25, 0.0]


CHANGES = {"score_ids", "edit_rows", "edit_ids", "edits", "mask_rows", "masks"}


@pytest.mark.parametrize(
    ("params", "absent"),
    [
        ([GREEDY, SamplingParams(temperature=1e-6, top_k=5)], {"num_top", "seeds", "temperature", "top_k", "top_p", "min_p"}),
        ([GREEDY, SamplingParams(temperature=0.7)], {"num_top", "top_k", "top_p", "min_p"}),
        ([GREEDY, SamplingParams(temperature=0.7, top_p=0.9)], {"num_top"}),
        ([GREEDY, SamplingParams(temperature=0.0, logprobs=0)], {"seeds", "temperature", "top_k", "top_p", "min_p"}),
    ],
    ids=["greedy", "sampled", "filtered", "logprobs"],
)
def test_what_nobody_in_the_step_uses_is_absent(params: list[SamplingParams], absent: set[str]) -> None:
    batch = make_rows(*params).build([0, 1], [4, 4], [1, 1], samples=[0, 1], fills=[])
    assert {name for name in VIEWS if getattr(batch, name) is None} == absent | CHANGES


def test_a_step_without_tokens_is_legal() -> None:
    batch = make_rows().build([], [], [], [], [])
    assert batch.num_tokens == batch.num_seqs == 0
    assert Batch.from_bytes(batch.buffer.tobytes()).query_starts.tolist() == [0]


def test_a_row_taken_again_has_nothing_left_of_the_request_before() -> None:
    rows = make_rows(SamplingParams(temperature=1.0, top_k=3, logprobs=5))
    rows.give_back(0)
    assert rows.take(np.arange(3), [9], GREEDY, seed=0) == 0
    assert rows.pages[0].tolist() == [9] + [0] * 7
    batch = rows.build([0], [0], [3], samples=[0], fills=[])
    assert batch.temperature is None and batch.num_top is None


def assert_equal(one: Batch, other: Batch) -> None:
    for name, (dtype, _) in VIEWS.items():
        view, copy = getattr(one, name), getattr(other, name)
        assert (view is None) == (copy is None), name
        if view is not None:
            assert view.dtype == copy.dtype == np.dtype(dtype) and view.shape == copy.shape and (view == copy).all(), name


def test_a_batch_is_the_same_after_a_trip_through_bytes() -> None:
    batch = mixed_batch()
    copy = Batch.from_bytes(batch.buffer.tobytes())
    assert_equal(batch, copy)
    assert copy.buffer.tobytes() == batch.buffer.tobytes()


def test_a_batch_is_the_same_after_a_trip_into_another_process() -> None:
    batch = mixed_batch()
    program = (
        "import sys; from common.batch import Batch; batch = Batch.from_bytes(sys.stdin.buffer.read());"
        "again = Batch.pack(**{name: getattr(batch, name) for name in Batch.__slots__[1:]});"
        "sys.stdout.buffer.write(again.buffer.tobytes())"
    )
    run = subprocess.run([sys.executable, "-c", program], input=batch.buffer.tobytes(), capture_output=True, check=True)
    assert_equal(batch, Batch.from_bytes(run.stdout))


def test_a_batch_is_one_aligned_owned_buffer_that_cannot_be_written() -> None:
    batch = mixed_batch()
    start = batch.buffer.__array_interface__["data"][0]
    for made in (batch, Batch.from_bytes(batch.buffer.tobytes())):
        start = made.buffer.__array_interface__["data"][0]
        for name in REQUIRED:
            view = getattr(made, name)
            place = view.__array_interface__["data"][0] - start
            assert view.size == 0 or (place % ALIGN == 0 and 0 <= place < made.buffer.nbytes)
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0
        with pytest.raises(ValueError, match="read-only"):
            made.buffer[0] = 0


def test_packing_copies_so_that_later_changes_of_a_table_do_not_show() -> None:
    rows = make_rows(GREEDY)
    batch = rows.build([0], [4], [1], samples=[0], fills=[])
    before = batch.buffer.tobytes()
    rows.tokens[:], rows.pages[:] = 99, 99
    assert batch.buffer.tobytes() == before


def test_damaged_bytes_are_refused_or_still_a_consistent_batch() -> None:
    """Every header byte, flipped; every length, cut. Values may change, shapes may not contradict each other."""
    data = mixed_batch().buffer.tobytes()
    header = 4 * (2 + 5 * len(VIEWS))
    refused = 0
    for at in range(header):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            Batch.from_bytes(bytes(damaged))
        except BatchError:
            refused += 1
    assert refused == header
    for length in range(0, len(data), ALIGN // 2):
        with pytest.raises(BatchError):
            Batch.from_bytes(data[:length])
    with pytest.raises(BatchError):
        Batch.from_bytes(data + bytes(ALIGN))
