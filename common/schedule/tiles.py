"""Query tiles: how the attention of a ragged step is cut into pieces of one shape.

A tile is up to C consecutive query tokens of one sequence; a decode is a tile of one. Both engines walk over tiles instead of
sequences. So a step that mixes a 500-token chunk with 60 decodes costs what its parts cost. It needs no block-diagonal mask and
no loop over sequences. PyTorch computes all tiles of similar context length in one call (`length_classes`). JAX, whose shapes
are compiled, walks over tiles sorted by length (`by_length`) in groups of a fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.batch import Batch


@dataclass(frozen=True)
class Tiles:
    """n tiles of at most C query tokens each."""

    seq: np.ndarray
    """int32[n]: the sequence of each tile."""
    first: np.ndarray
    """int32[n]: index of its first token in T."""
    count: np.ndarray
    """int32[n]: its tokens, 1..C."""
    position: np.ndarray
    """int32[n]: position of its first token."""

    def __len__(self) -> int:
        return len(self.seq)

    def by_length(self) -> Tiles:
        """The same tiles, longest context first, so that neighbours have like lengths."""
        order = np.argsort(-(self.position + self.count), kind="stable")
        return Tiles(self.seq[order], self.first[order], self.count[order], self.position[order])

    def key_range(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """First key position that any query of the tile sees, and one past the last: int32[n] each. Window 0 sees all."""
        start = np.maximum(self.position - window + 1, 0) if window else np.zeros_like(self.position)
        return start, self.position + self.count


def query_tiles(batch: Batch, size: int) -> tuple[Tiles, Tiles]:
    """The decodes of a batch as tiles of one token, and its chunks as tiles of at most `size` tokens."""
    decodes = int(batch.num_decodes[0])
    starts = batch.query_starts
    seq = np.arange(decodes, dtype=np.int32)
    decode = Tiles(seq, starts[:decodes], np.ones(decodes, np.int32), batch.positions[starts[:decodes]])
    begin, end = starts[decodes:-1], starts[decodes + 1 :]
    per_seq = -(-(end - begin) // size)
    which = np.repeat(np.arange(len(begin), dtype=np.int32), per_seq)
    nth = np.arange(len(which), dtype=np.int32) - np.repeat(np.cumsum(per_seq, dtype=np.int32) - per_seq, per_seq)
    first = begin[which] + nth * size
    count = np.minimum(end[which] - first, size)
    return decode, Tiles(which + decodes, first, count, batch.positions[first])


@dataclass(frozen=True)
class LengthClass:
    """Tiles whose visible keys fill about the same number of pages, padded to one width."""

    tiles: np.ndarray
    """int32[n]: which tiles."""
    page_start: np.ndarray
    """int32[n]: index into the tile's page table row of its first visible page."""
    pages: int
    """Pages gathered for each tile; those past a sequence's end read the null page."""


def length_classes(tiles: Tiles, page_size: int, window: int, most_pages: int) -> list[LengthClass]:
    """Group tiles by the number of pages they read, each group within a factor of about 1.4.

    The gather of every group is below `most_pages` pages, so that its scores stay in the cache.
    """
    if not len(tiles):
        return []
    start, stop = tiles.key_range(window)
    page_start = start // page_size
    pages = -(-stop // page_size) - page_start
    # Half-octaves above 8 pages; everything shorter is one group, since a gather that small costs less than another call.
    classes = np.ceil(2 * np.log2(np.maximum(pages, 8) / 8)).astype(np.int32)
    groups = []
    for which in np.unique(classes):
        members = np.flatnonzero(classes == which).astype(np.int32)
        width = int(pages[members].max())
        step = max(1, most_pages // width)
        for at in range(0, len(members), step):
            part = members[at : at + step]
            groups.append(LengthClass(part, page_start[part], int(pages[part].max())))
    return groups
