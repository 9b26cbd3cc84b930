"""Which pages each request holds, of every KV group. Plain Python and numpy.

A column of a request's page table is a page of tokens. Its page of the first pool holds their ids, and their
K and V of the layers that reach back to the first token. Some models have layers that see a window only:
these have a pool of their own, where a request gives a page back as soon as all its slots are before the
window of the next token to compute.

    columns of the window's pool:

        |-- given back, or never held --|-- slots seen by the next token --|-- tokens to come --|
        0                          window_start                        computed               room

A step's pages are given back by the step after it at the earliest: within one, another request would
write what this one reads. The device need not be told: attention reads no page before the window.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pjengine.page_pool import NULL_PAGE, PageHash, PagePool, page_hashes
from pjengine.request import Request
from pjengine.row_table import RowTable


class Found(NamedTuple):
    """Pages of the prefix cache that hold a request's beginning: `pages`, one for each column.

    Those of the window are the last columns'.
    """

    pages: list[int]
    window_pages: list[int]


class PageUpdates(NamedTuple):
    """Entries of the page tables that a step changes: row, column, page."""

    full: list[tuple[int, int, int]]
    window: list[tuple[int, int, int]]


def window_pages(window: int, num_tokens: Any, page_size: int, *, num_new: Any) -> Any:
    """How many pages of a window a request of `num_tokens` holds at most, in steps of `num_new` tokens of it.

    The new tokens, and before the first of them the rest of its window, across as many borders as may be.
    Numbers or arrays of them.
    """
    return np.minimum(-(-num_tokens // page_size), 2 + (window + num_new - 3) // page_size)


class PageGroups:
    """Gives pages to requests and takes them back, in all groups in step.

    Without `window` there is one group. What is said of each pool is one number for each group.
    """

    def __init__(
        self,
        pool: PagePool,
        rows: RowTable,
        *,
        page_size: int,
        max_new_tokens: int,
        is_caching: bool,
        window_pool: PagePool | None = None,
        window: int | None = None,
        shares_outputs: bool = True,
    ) -> None:
        """`max_new_tokens`: of one request in one step. `window`: slots that a token sees, its own too.

        Without `shares_outputs`, only pages that are full of a prompt's tokens are shared.
        """
        if (window_pool is None) != (window is None):
            raise ValueError(f"window_pool and window go together, got {window_pool!r} and {window!r}")
        self.pool = pool
        self.window_pool = window_pool
        self.pools = [pool] if window_pool is None else [pool, window_pool]
        self._window = window
        self._rows = rows
        self._page_size = page_size
        self._max_new_tokens = max_new_tokens
        self._is_caching = is_caching
        self._shares_outputs = shares_outputs

    @property
    def num_free(self) -> int:
        """Columns that can be allocated."""
        return min(pool.num_free for pool in self.pools)

    def most_held(self, num_tokens: int) -> list[tuple[int, PagePool]]:
        """How many pages a request of so many tokens holds of each pool, at most at any time."""
        most = self._most_held(num_tokens, self._max_new_tokens)
        return [(int(pages), pool) for pages, pool in zip(most, self.pools, strict=True)]

    def _most_held(self, num_tokens: Any, num_new: Any) -> list[Any]:
        """The same for steps of at most `num_new` of its tokens; numbers or arrays of them."""
        pages = -(-num_tokens // self._page_size)
        if self._window is None:
            return [pages]
        return [pages, window_pages(self._window, num_tokens, self._page_size, num_new=num_new)]

    def _first_column(self, position: int) -> int:
        """The first column that the token at `position` sees of the window's pool."""
        assert self._window is not None
        return max(0, position - self._window + 1) // self._page_size

    def unpromised(self) -> np.ndarray:
        """Free pages of each pool that no running request needs for the tokens that it has now."""
        table = self._rows
        rows = np.flatnonzero(table.admissions)
        tokens = np.maximum(table.prefill_end[rows], table.computed[rows] + 1)
        most = self._most_held(tokens, np.minimum(tokens - table.computed[rows], self._max_new_tokens))
        needed = [
            np.maximum(pages - own, 0).sum() for pages, own in zip(most, self._held(rows), strict=False)
        ]
        return np.array([pool.num_free for pool in self.pools]) - needed

    def num_growing(self) -> np.ndarray:
        """How many running requests will hold more pages of each pool than they do now."""
        rows = np.flatnonzero(self._rows.admissions)
        most = self._most_held(self._rows.limit[rows], 1)
        return np.array(
            [np.count_nonzero(pages > own) for pages, own in zip(most, self._held(rows), strict=False)]
        )

    def _held(self, rows: np.ndarray) -> list[np.ndarray]:
        """Pages that rows hold of the first pool, and of a window's."""
        room = self._rows.room[rows] // self._page_size
        return [room, room - self._rows.window_start[rows] // self._page_size]

    def cost(self, request: Request, found: Found) -> np.ndarray:
        """Free pages of each pool that a waiting request needs for the tokens that it has now."""
        num_new = min(request.num_known - len(found.pages) * self._page_size, self._max_new_tokens)
        most = self._most_held(request.num_known, num_new)
        shared = [len(pages) - pool.num_cached(pages) for pool, pages in zip(self.pools, found, strict=False)]
        return np.array(most) - shared

    def find(self, request: Request) -> Found:
        """Pages of the cache that hold the request's beginning; at least one token is left to compute.

        The longest beginning of which one pool has every page, and the other those that its next token sees.
        """
        if self._chain(request) is None or not request.is_cache_read:
            return Found([], [])
        self._hash_pages(request)
        most = self._num_named(request) - 1 if request.max_cached is None else request.max_cached
        names = request.page_hashes[: most // self._page_size]
        pages = self.pool.match(names)
        if self.window_pool is None:
            return Found(pages, [])
        end = column = len(pages)
        window_pages: list[int] = []  # of columns from `column` to `end`, the last one first
        while column > self._first_column(end * self._page_size):
            column -= 1
            if found := self.window_pool.match(names[column : column + 1]):
                window_pages += found
            else:
                end, window_pages = column, []
        return Found(pages[:end], window_pages[::-1])

    def take(self, request: Request, found: Found, updates: PageUpdates) -> None:
        """Makes the pages found the first ones of a request, which has just got its row."""
        row, first = request.row, len(found.pages) - len(found.window_pages)
        request.pages = list(found.pages)
        self.pool.retain(found.pages)
        updates.full.extend((row, column, page) for column, page in enumerate(found.pages))
        request.num_registered = len(found.pages)
        if self.window_pool is not None:
            request.window_pages = [NULL_PAGE] * first + found.window_pages
            self.window_pool.retain(found.window_pages)
            updates.window.extend(
                (row, column, page) for column, page in enumerate(found.window_pages, first)
            )
            self._rows.window_start[row] = first * self._page_size

    def grow(self, request: Request, count: int, updates: PageUpdates) -> None:
        """Gives a running request `count` pages more of each pool."""
        row, columns = request.row, range(len(request.pages), len(request.pages) + count)
        pages = self.pool.allocate(count)
        request.pages += pages
        updates.full.extend((row, column, page) for column, page in zip(columns, pages, strict=True))
        if self.window_pool is not None:
            pages = self.window_pool.allocate(count)
            request.window_pages += pages
            updates.window.extend((row, column, page) for column, page in zip(columns, pages, strict=True))
        self._rows.room[row] += count * self._page_size

    def give_back_unseen(self) -> None:
        """Releases the pages that no token still to be computed sees. Before a step is put together."""
        if self.window_pool is None or self._window is None:
            return
        table = self._rows
        computed = table.computed - table.unsure  # at least
        unseen = computed - (self._window - 1) - table.window_start
        for row in np.flatnonzero((unseen >= self._page_size) & (table.admissions > 0)).tolist():
            first, request = int(table.window_start[row]) // self._page_size, table.owner(row)
            end = self._first_column(int(computed[row]))
            self.window_pool.release(request.window_pages[first:end])
            request.window_pages[first:end] = [NULL_PAGE] * (end - first)
            table.window_start[row] = end * self._page_size

    def release(self, request: Request) -> None:
        """Takes all pages of a running request, which still has its row."""
        self.pool.release(request.pages)
        request.pages = []
        if self.window_pool is not None:
            self.window_pool.release(self._held_window_pages(request))
            request.window_pages = []

    def _held_window_pages(self, request: Request) -> list[int]:
        return request.window_pages[int(self._rows.window_start[request.row]) // self._page_size :]

    def register(self, request: Request) -> None:
        """Tells others of the request's full pages, as far as the host knows their tokens.

        No step reads them before they are written: later ones run later, and within this one each
        layer writes before it attends.
        """
        if self._chain(request) is None:
            return
        self._hash_pages(request)
        table, names = self._rows, request.page_hashes
        full = min(int(table.computed[request.row]), self._num_named(request)) // self._page_size
        for column in range(request.num_registered, full):
            self.pool.register(request.pages[column], names[column])
        if self.window_pool is not None:
            first = int(table.window_start[request.row]) // self._page_size
            for column in range(max(request.num_registered, first), full):
                self.window_pool.register(request.window_pages[column], names[column])
        request.num_registered = max(full, request.num_registered)

    def _chain(self, request: Request) -> str | None:
        """The salt of the names of a request's pages; None: they have none, and nobody shares them."""
        return request.salt if self._is_caching else request.fork or None

    def _num_named(self, request: Request) -> int:
        """Tokens whose pages have names, once they are full."""
        return request.num_known if self._shares_outputs else len(request.prompt_token_ids)

    def _hash_pages(self, request: Request) -> None:
        names: list[PageHash] = request.page_hashes
        start, stop = len(names) * self._page_size, self._num_named(request)
        if start + self._page_size <= stop:
            tokens = request.known_tokens(start, stop)
            salt = self._chain(request)
            assert salt is not None
            names += page_hashes(tokens, self._page_size, salt, names[-1] if names else None)

    def forget(self, running: Iterable[Request]) -> None:
        """Empties the prefix cache; what runs keeps its pages, and neither they nor later ones are shared."""
        for pool in self.pools:
            pool.forget()
        for request in running:
            request.num_registered = sys.maxsize

    def check_integrity(self, running: list[Request]) -> None:
        """Recounts the pages.

        Raises:
          RuntimeError: an invariant of this class or of a pool is broken.
        """
        self.pool.check_integrity(request.pages for request in running)
        if self.window_pool is None or self._window is None:
            return
        self.window_pool.check_integrity(self._held_window_pages(request) for request in running)
        for request in running:
            computed, start = (int(x[request.row]) for x in (self._rows.computed, self._rows.window_start))
            if len(request.window_pages) != len(request.pages):
                raise RuntimeError(
                    f"{request.request_id} has {len(request.pages)} columns of one pool and "
                    f"{len(request.window_pages)} of the other"
                )
            if start > max(0, computed - self._window + 1):
                raise RuntimeError(
                    f"{request.request_id} has given back {start} slots, and its token at {computed} sees "
                    f"{self._window}"
                )
