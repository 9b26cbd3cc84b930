"""Which tokens run in the next step. Plain Python and numpy: it decides, the device computes.

A step is either all decodes or mixed: one token of every row that decodes, then chunks of prompts up to
`max_num_batched_tokens`. So a row that decodes gets on with every step, however many prompts wait, and
waits at most as long as a step of that many tokens takes.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pjengine.edits import NO_EDITS, Edits
from pjengine.page_pool import PagePool, page_hashes
from pjengine.request import Request, RequestStatus
from pjengine.row_table import RowTable
from pjengine.schedule import Chunk, Decodes, Schedule


@dataclass
class Scheduler:
    """Owns the queue, the rows and the page pool.

    Invariants, recounted by `check_integrity`: a running request owns one row and exactly the pages
    that its computed tokens need; a waiting or finished one owns neither.
    """

    pool: PagePool
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int  # at least max_num_seqs
    is_caching: bool = True  # prefixes
    decode_steps: int = 1  # tokens of a row in one step of decodes alone; at most a page
    # Whether there are programs for steps with all of the first; if not, they are made for the second.
    can_edit: Callable[[list[Edits], list[Edits]], bool] = lambda now, soon: True
    num_cache_queries: int = 0  # tokens looked up in the prefix cache
    num_cache_hits: int = 0  # tokens found there
    rows: RowTable = field(init=False)
    _waiting: list[tuple[tuple[int, int], Request]] = field(default_factory=list)  # a heap, by rank
    _orders: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.rows = RowTable(self.max_num_seqs)

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting) or self.rows.num_free < self.rows.num_rows

    @property
    def running(self) -> list[Request]:
        """Those with a row, in order of admission."""
        return self.rows.running()

    @property
    def waiting(self) -> list[Request]:
        """Those without a row, in the order in which they will be admitted."""
        return [request for _, request in sorted(self._waiting)]

    def add(self, request: Request) -> None:
        """Queues a request. Raises as `check_fits` does."""
        self.check_fits(request)
        request.order = next(self._orders)
        heapq.heappush(self._waiting, (request.rank, request))

    def check_fits(self, request: Request) -> None:
        """Makes sure that the request can run when it has the pool for itself.

        Raises:
          ValueError: it cannot; the text says by how much.
        """
        needed = self._pages_for(request.max_total_tokens - 1)  # the last token is never computed
        if needed > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id} may grow to {request.max_total_tokens} tokens, which need "
                f"{needed} pages of {self.page_size}; the KV cache has {self.pool.num_usable}. Lower "
                f"max_tokens, shorten the prompt ({len(request.prompt_token_ids)} tokens) or give the "
                f"cache more memory"
            )

    def schedule(self) -> Schedule:
        """The next step; without any sequences when nothing can run until a result is read."""
        chunks: list[Chunk] = []
        new_pages: list[tuple[int, int, int]] = []
        num_preempted = self._make_room_for_decodes()
        rows = self.rows.decoding()
        self._grow(rows[self.rows.computed[rows] == self.rows.room[rows]], new_pages)
        budget = self.max_num_batched_tokens - len(rows)
        for row in self.rows.prefilling():
            request = self.rows.requests[row]
            if request is None or budget == 0:
                continue  # preempted by one before it
            length = min(int(self.rows.prefill_end[row] - self.rows.computed[row]), budget)
            num_preempted += self._make_room(request, length, chunks)
            if request.row == row:
                chunks.append(self._take(request, length, new_pages))
                budget -= length
        if num_preempted == 0:
            self._admit(chunks, budget, new_pages)
        has_edits = bool(self.rows.has_edits[rows].any()) or any(
            c.request.edits is not NO_EDITS for c in chunks
        )
        # Several tokens where the host has no part in them.
        depth = 1 if chunks or has_edits else self.decode_steps
        return Schedule(self._book(rows, depth, new_pages), chunks, new_pages, has_edits, num_preempted)

    def _book(self, rows: np.ndarray, depth: int, new_pages: list[tuple[int, int, int]]) -> Decodes:
        """Counts up to `depth` tokens of each row as computed; at least one, for which there is room."""
        table = self.rows
        starts = table.computed[rows]
        lengths = np.minimum(depth, table.limit[rows] - starts)
        if depth > 1:
            short = rows[starts + lengths > table.room[rows]]
            self._grow(short[: self.pool.num_free], new_pages)
            lengths = np.minimum(lengths, table.room[rows] - starts)
        table.computed[rows] += lengths
        requests: Any = [table.requests[row] for row in rows.tolist()]
        return Decodes(requests, rows, table.admissions[rows], starts, lengths)

    def _grow(self, rows: np.ndarray, new_pages: list[tuple[int, int, int]]) -> None:
        """Gives each of these rows, whose pages are full, one more."""
        for row in rows.tolist():
            request = self.rows.owner(row)
            self._add_pages(request, 1, new_pages)

    def _add_pages(self, request: Request, count: int, new_pages: list[tuple[int, int, int]]) -> None:
        held = len(request.pages)
        request.pages += self.pool.allocate(count)
        self.rows.room[request.row] += count * self.page_size
        new_pages += [(request.row, column, request.pages[column]) for column in range(held, held + count)]

    def _make_room_for_decodes(self) -> int:
        """Preempts the highest ranks until every row that decodes has a page for its next token.

        Spares those that are about to finish: their pages return by themselves.
        """
        num_preempted, table = 0, self.rows
        while True:
            rows = table.decoding()
            if np.count_nonzero(table.computed[rows] == table.room[rows]) <= self.pool.num_free:
                return num_preempted
            candidates = [table.owner(row) for row in [*rows.tolist(), *table.prefilling()]]
            self._preempt(max(candidates, key=lambda other: other.rank))
            num_preempted += 1

    def _admit(self, chunks: list[Chunk], budget: int, new_pages: list[tuple[int, int, int]]) -> None:
        """Starts waiting requests while there are rows, tokens, and pages for all they have to compute."""
        if not self._waiting:
            return
        promised = self.rows.promised(self.page_size)
        held_back: list[tuple[tuple[int, int], Request]] = []
        while self._waiting and budget and self.rows.num_free:
            _, request = self._waiting[0]
            if request.edits is not NO_EDITS and (held_back or not self._can_run(request.edits)):
                held_back.append(heapq.heappop(self._waiting))
                continue
            found = self._find_cached(request)
            promised += self._pages_for(request.num_known) - len(found)
            if promised + self.pool.num_cached(found) > self.pool.num_free:
                break
            heapq.heappop(self._waiting)
            self._start(request, found, new_pages)
            length = min(request.num_known - len(found) * self.page_size, budget)
            chunks.append(self._take(request, length, new_pages, is_admitted=True))
            promised -= len(request.pages) - len(found)
            budget -= length
        for entry in held_back:
            heapq.heappush(self._waiting, entry)

    def _can_run(self, edits: Edits) -> bool:
        """Whether there are programs for these edits among those that run."""
        rows = np.flatnonzero(self.rows.has_edits & (self.rows.admissions > 0))
        running = [self.rows.owner(row).edits for row in rows.tolist()]
        waiting = [request.edits for _, request in self._waiting if request.edits is not NO_EDITS]
        return self.can_edit([*running, edits], [*running, *waiting][: self.max_num_seqs])

    def _find_cached(self, request: Request) -> list[int]:
        """The pages of the cache that hold the request's beginning; at least one token is left to compute."""
        if not self.is_caching or not request.is_cache_read:
            return []
        self._hash_pages(request)
        return self.pool.match(request.page_hashes[: (request.num_known - 1) // self.page_size])

    def _start(self, request: Request, found: list[int], new_pages: list[tuple[int, int, int]]) -> None:
        """Gives a waiting request a row and the cached pages of its beginning."""
        self.pool.retain(found)
        num_cached = len(found) * self.page_size
        request.status = RequestStatus.RUNNING
        request.pages = list(found)
        request.num_registered = len(found)
        request.row = self.rows.admit(request, num_cached, room=num_cached)
        new_pages += [(request.row, column, page) for column, page in enumerate(found)]
        self.num_cache_queries += request.num_known
        self.num_cache_hits += num_cached
        if request.metrics.scheduled_s is None:
            request.metrics.scheduled_s = time.perf_counter()
            request.num_cached_tokens = num_cached

    def _take(
        self,
        request: Request,
        length: int,
        new_pages: list[tuple[int, int, int]],
        *,
        is_admitted: bool = False,
    ) -> Chunk:
        """Books `length` known tokens of a running request: pages, counters, and the chunk that says so."""
        table, row = self.rows, request.row
        start = int(table.computed[row])
        self._add_pages(request, self._pages_for(start + length) - len(request.pages), new_pages)
        table.computed[row] += length
        if self.is_caching:
            self._register(request)
        return Chunk(
            request=request,
            row=row,
            admission=int(table.admissions[row]),
            start=start,
            length=length,
            is_sampled=start + length == table.prefill_end[row],
            is_admitted=is_admitted,
        )

    def _register(self, request: Request) -> None:
        """Tells the prefix cache of the request's full pages, as far as the host knows their tokens.

        Those of prompts at once, those of outputs when the request leaves its row.
        No step reads them before they are written: later ones run later, and within this one each
        layer writes before it attends.
        """
        self._hash_pages(request)
        full = min(int(self.rows.computed[request.row]), request.num_known) // self.page_size
        for index in range(request.num_registered, full):
            self.pool.register(request.pages[index], request.page_hashes[index])
        request.num_registered = max(full, request.num_registered)

    def _hash_pages(self, request: Request) -> None:
        names = request.page_hashes
        start, stop = len(names) * self.page_size, request.num_known
        if start + self.page_size <= stop:
            tokens = request.known_tokens(start, stop)
            names += page_hashes(tokens, self.page_size, request.salt, names[-1] if names else None)

    def _make_room(self, request: Request, length: int, chunks: list[Chunk]) -> int:
        """Preempts the highest ranks until `length` more known tokens of `request` fit; returns how many.

        Spares those that are in this step already; when only `request` itself is left, gives it up.
        """
        needed = self._pages_for(int(self.rows.computed[request.row]) + length) - len(request.pages)
        taken = {chunk.row for chunk in chunks}
        num_preempted = 0
        while request.row >= 0 and needed > self.pool.num_free:
            candidates = [self.rows.owner(row) for row in self.rows.prefilling() if row not in taken]
            self._preempt(max(candidates, key=lambda other: other.rank))
            num_preempted += 1
        return num_preempted

    def _preempt(self, request: Request) -> None:
        """Takes a request's row and pages; it will recompute its tokens, and sample the same ones."""
        self._free(request)
        request.status = RequestStatus.WAITING
        request.metrics.num_preemptions += 1
        heapq.heappush(self._waiting, (request.rank, request))

    def finish(self, requests: Iterable[Request]) -> None:
        """Frees what finished or aborted requests hold, wherever they are."""
        queued = set()
        for request in requests:
            if request.row >= 0:
                self._free(request)
            else:
                queued.add(request.request_id)
        if any(request.request_id in queued for _, request in self._waiting):
            self._waiting = [entry for entry in self._waiting if entry[1].request_id not in queued]
            heapq.heapify(self._waiting)

    def reset_prefix_cache(self) -> None:
        """Forgets all that has been computed; what runs goes on, and is not shared."""
        self.pool.forget()
        for request in self.running:
            request.num_registered = len(request.pages)

    def _free(self, request: Request) -> None:
        if self.is_caching:
            self._register(request)
        self.pool.release(request.pages)
        request.pages = []
        self.rows.vacate(request.row)
        request.row = -1

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check_integrity(self) -> None:
        """Recounts pages and rows.

        Raises:
          RuntimeError: an invariant of this class, of its rows or of the pool is broken.
        """
        running = self.running
        self.pool.check_integrity(request.pages for request in running)
        self.rows.check_integrity(self.page_size)
        for request in running:
            if request.status is not RequestStatus.RUNNING:
                raise RuntimeError(f"{request.request_id} is {request.status} and runs")
        for request in self.waiting:
            if request.pages or request.row >= 0 or request.status is not RequestStatus.WAITING:
                raise RuntimeError(
                    f"{request.request_id} waits but is {request.status}, holds {request.pages}"
                )
