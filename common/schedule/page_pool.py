"""Allocate KV pages: which request holds which page, which pages hold reusable content, which page is allocated next.

The pool holds no KV: a page is an int, and its bytes lie in a runner. Page 0 is the null page, which is never allocated.
Here it is also the head of the free list. All state is in flat lists made once, so an operation allocates nothing.

A page with full, written content can be *published* under a `PageKey`. A later request with the same prefix then shares it.
Published pages that no request holds stay on the free list as a cache. The pool evicts from the front of the list: pages
without a key, then the least recently used. Of one request the tail goes first, because a prefix is of more use than what
follows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

ROOT = bytes(16)
"""The parent digest of a first page."""


class PageKey(NamedTuple):
    """What a page holds: its own tokens, and through the parent's digest all that came before them."""

    digest: bytes
    parent: bytes
    content: bytes
    """The tokens as int32 bytes, on a first page behind the request's cache salt. Compared on every hit."""


def next_key(secret: bytes, parent: PageKey | None, tokens: bytes, salt: str) -> PageKey:
    """Return the key of the page that holds `tokens` and follows `parent`. None starts a chain, and only there `salt` enters.

    The hash is keyed and cryptographic (BLAKE2b, RFC 7693). Behind the first page only the chain separates the pages of two
    salts. So the hash must resist a client that chooses tokens. It costs half a microsecond for each page filled.
    """
    above = parent.digest if parent else ROOT
    content = tokens if parent else salt.encode() + tokens
    return PageKey(blake2b(above + content, key=secret, digest_size=16).digest(), above, content)


class PageError(RuntimeError):
    """A page was given back twice, or the null page was: a bug of the caller, never of a user."""


class PagePool:
    """Reference counts, the free list and the prefix cache of `num_pages` pages, the null page included.

    A page is held (`refs > 0`) or on the free list, never both.
    """

    def __init__(self, num_pages: int, secret: bytes | None = None) -> None:
        self.num_pages = num_pages
        self.secret = os.urandom(32) if secret is None else secret
        self.refs = [0] * num_pages
        self.keys: list[PageKey | None] = [None] * num_pages
        self.cached: dict[bytes, dict[int, None]] = {}  # digest -> pages that hold it, oldest first: copies are not merged
        self.num_free = num_pages - 1
        # The free list, circular and doubly linked, from page 0's successor (the front) to its predecessor (the back).
        self._after = [*range(1, num_pages), 0]
        self._before = [num_pages - 1, *range(num_pages - 1)]

    def match(self, keys: Sequence[PageKey]) -> list[int]:
        """Pages that hold the longest published prefix of `keys`. Holds nothing: `allocate` them before anything else."""
        hits: list[int] = []
        for key in keys:
            page = next((page for page in self.cached.get(key.digest, ()) if self.keys[page] == key), None)
            if page is None:
                break
            hits.append(page)
        return hits

    def allocate(self, count: int, hits: Iterable[int] = ()) -> list[int] | None:
        """Hold `hits` once more and `count` fresh pages; return them in this order. None, and no change, if they do not fit."""
        pages = list(hits)
        idle = [page for page in pages if not self.refs[page]]
        if count > self.num_free - len(idle):
            return None
        for page in idle:  # before any page is popped, or a hit could be evicted by its own request
            self._unlink(page)
        for page in pages:
            self.refs[page] += 1
        for _ in range(count):
            page = self._after[0]
            self._unlink(page)
            self.unpublish(page)
            self.refs[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give back one hold on each of a request's pages, in the request's order."""
        for page in reversed(pages):
            if page == 0 or not self.refs[page]:
                raise PageError(f"Page {page} was given back, but nobody holds it.")
            self.refs[page] -= 1
            if not self.refs[page]:
                self._link(page, after=0 if self.keys[page] is None else self._before[0])

    def publish(self, page: int, key: PageKey) -> None:
        """Offer a held page, full and written, to later requests."""
        if self.keys[page] is None:
            self.keys[page] = key
            self.cached.setdefault(key.digest, {})[page] = None

    def unpublish(self, page: int) -> None:
        """Take a page out of the cache; other pages of the same content stay in it."""
        key = self.keys[page]
        if key is not None:
            self.keys[page] = None
            copies = self.cached[key.digest]
            del copies[page]
            if not copies:
                del self.cached[key.digest]

    def forget(self) -> bool:
        """Unpublish every page; False, and no change, while any page is held."""
        if self.num_free != self.num_pages - 1:
            return False
        self.keys = [None] * self.num_pages
        self.cached.clear()
        return True

    def _unlink(self, page: int) -> None:
        before, after = self._before[page], self._after[page]
        self._after[before], self._before[after] = after, before
        self.num_free -= 1

    def _link(self, page: int, after: int) -> None:
        behind = self._after[after]
        self._after[after] = self._before[behind] = page
        self._before[page], self._after[page] = after, behind
        self.num_free += 1
