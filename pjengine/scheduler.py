"""Which tokens run in the next step. Plain Python: it decides, the device computes.

A step is either all decodes (one token of every running request) or mixed: the decodes first,
then chunks of prompts up to `max_num_batched_tokens`, so that a long prompt never stalls the others.
"""

import heapq
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pjengine.page_pool import PagePool, page_hashes
from pjengine.request import Request, RequestStatus


class Chunk(NamedTuple):
    """Tokens start to start + length of one request, to be computed in one step."""

    request: Request
    epoch: int  # the request's when scheduled
    row: int
    start: int
    length: int
    is_decode: bool  # its one token is known to the device only
    is_sampled: bool  # it reaches the end of the request's tokens, so the next one is sampled
    is_admitted: bool  # the row is new to the request: its parameters must be set
    new_pages: tuple[tuple[int, int], ...]  # (column of the page table, page)

    @property
    def num_outputs(self) -> int:
        """Outputs before the one that this chunk's last token leads to."""
        return self.start + self.length - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The chunks of one step, decodes first."""

    chunks: list[Chunk]
    num_preempted: int = 0

    @property
    def is_decode(self) -> bool:
        return all(chunk.is_decode for chunk in self.chunks)

    @property
    def is_past_prompts(self) -> bool:
        return all(chunk.start >= len(chunk.request.prompt_token_ids) for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass
class Scheduler:
    """Owns the queues, the rows and the page pool.

    Invariants, recounted by `check_integrity`: a running request owns one row and exactly the pages
    that its computed tokens need; a waiting or finished one owns neither.
    """

    pool: PagePool
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    is_caching: bool = True  # prefixes
    running: list[Request] = field(default_factory=list)  # in order of admission
    num_cache_queries: int = 0  # tokens looked up in the prefix cache
    num_cache_hits: int = 0  # tokens found there
    _waiting: list[tuple[tuple[int, int], Request]] = field(default_factory=list)  # a heap, by rank
    _orders: Iterator[int] = field(default_factory=itertools.count)
    _free_rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free_rows = list(range(self.max_num_seqs))  # a heap: low rows first

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting or self.running)

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
        """The next step's chunks; empty when nothing can run until a result is read."""
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        num_preempted = 0
        # Decodes first, then unfinished prompts, each in order of admission.
        ready = [
            request for request in self.running if request.num_to_compute > 0 and not request.is_at_limit
        ]
        for request in sorted(ready, key=lambda request: not request.is_decoding):
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue  # preempted by one before it
            length = min(request.num_to_compute, budget)
            if self._shortfall(request, length) > 0:
                num_preempted += self._make_room(request, length, chunks)
            if request.status is RequestStatus.RUNNING:
                chunks.append(self._take(request, length, is_admitted=False))
                budget -= length
        if num_preempted == 0:
            self._admit(chunks, budget)
        return Schedule(chunks, num_preempted)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Starts waiting requests while there are rows, tokens, and pages for all they have to compute."""
        if not self._waiting:
            return
        promised = sum(self._pages_for(other.num_tokens) - len(other.pages) for other in self.running)
        while self._waiting and budget and self._free_rows:
            _, request = self._waiting[0]
            found = self._find_cached(request)
            promised += self._pages_for(request.num_tokens) - len(found)
            if promised + self.pool.num_cached(found) > self.pool.num_free:
                return
            heapq.heappop(self._waiting)
            self._start(request, found)
            length = min(request.num_to_compute, budget)
            chunks.append(self._take(request, length, is_admitted=True))
            promised -= len(request.pages) - len(found)
            budget -= length

    def _find_cached(self, request: Request) -> list[int]:
        """The pages of the cache that hold the request's beginning; at least one token is left to compute."""
        if not self.is_caching or not request.is_cache_read:
            return []
        self._hash_pages(request)
        return self.pool.match(request.page_hashes[: (request.num_tokens - 1) // self.page_size])

    def _start(self, request: Request, found: list[int]) -> None:
        """Gives a waiting request a row and the cached pages of its beginning."""
        self.pool.retain(found)
        request.status = RequestStatus.RUNNING
        request.row = heapq.heappop(self._free_rows)
        request.pages = list(found)
        request.num_registered = len(found)
        request.num_computed = len(found) * self.page_size
        self.num_cache_queries += request.num_tokens
        self.num_cache_hits += request.num_computed
        if request.metrics.scheduled_s is None:
            request.metrics.scheduled_s = time.perf_counter()
            request.num_cached_tokens = request.num_computed
        self.running.append(request)

    def _take(self, request: Request, length: int, *, is_admitted: bool) -> Chunk:
        """Books `length` tokens of a running request: pages, counters, and the chunk that says so."""
        start = request.num_computed
        # An admitted row learns of the cached pages, too.
        held = told = len(request.pages)
        if is_admitted:
            told = 0
        if (needed := self._pages_for(start + length)) > held:
            request.pages += self.pool.allocate(needed - held)
        is_sampled = start + length == request.num_tokens
        chunk = Chunk(
            request=request,
            epoch=request.epoch,
            row=request.row,
            start=start,
            length=length,
            is_decode=request.is_decoding,
            is_sampled=is_sampled,
            is_admitted=is_admitted,
            new_pages=tuple(enumerate(request.pages[told:], told)) if needed > told else (),
        )
        request.num_computed += length
        if self.is_caching and (start + length) // self.page_size > request.num_registered:
            self._register(request)
        if is_sampled:
            request.num_pending += 1
            request.is_decoding = True
        return chunk

    def _register(self, request: Request) -> None:
        """Tells the prefix cache of the request's full pages, as far as the host knows their tokens.

        No step reads them before they are written: later ones run later, and within this one each
        layer writes before it attends.
        """
        self._hash_pages(request)
        full = min(request.num_computed, request.num_known) // self.page_size
        for index in range(request.num_registered, full):
            self.pool.register(request.pages[index], request.page_hashes[index])
        request.num_registered = max(full, request.num_registered)

    def _hash_pages(self, request: Request) -> None:
        if (len(request.page_hashes) + 1) * self.page_size <= request.num_known:
            tokens = request.known_tokens(0, request.num_known)
            request.page_hashes = page_hashes(tokens, self.page_size, request.salt, request.page_hashes)

    def _shortfall(self, request: Request, length: int) -> int:
        """Pages that must be freed before `length` more tokens of `request` fit."""
        return self._pages_for(request.num_computed + length) - len(request.pages) - self.pool.num_free

    def _make_room(self, request: Request, length: int, chunks: list[Chunk]) -> int:
        """Preempts the highest ranks until `length` more tokens of `request` fit; returns how many.

        Spares those that have a chunk in this step already and those that are about to finish; when
        only `request` itself is left, gives it up.
        """
        spared = {chunk.request.request_id for chunk in chunks}
        num_preempted = 0
        while request.status is RequestStatus.RUNNING and self._shortfall(request, length) > 0:
            candidates = (
                other
                for other in self.running
                if other.request_id not in spared and (other is request or not other.is_at_limit)
            )
            self._preempt(max(candidates, key=lambda other: other.rank))
            num_preempted += 1
        return num_preempted

    def _preempt(self, request: Request) -> None:
        """Takes a request's row and pages; it will recompute its tokens, and sample the same ones."""
        self._free(request)
        self.running.remove(request)
        request.status = RequestStatus.WAITING
        request.epoch += 1
        request.num_computed = request.num_pending = 0
        request.is_decoding = False
        request.metrics.num_preemptions += 1
        heapq.heappush(self._waiting, (request.rank, request))

    def finish(self, requests: Iterable[Request]) -> None:
        """Frees what finished or aborted requests hold, wherever they are."""
        ended = {request.request_id for request in requests}
        for request in self.running:
            if request.request_id in ended:
                self._free(request)
        self.running = [request for request in self.running if request.request_id not in ended]
        if any(request.request_id in ended for _, request in self._waiting):
            self._waiting = [entry for entry in self._waiting if entry[1].request_id not in ended]
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
        heapq.heappush(self._free_rows, request.row)
        request.row = -1

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check_integrity(self) -> None:
        """Recounts pages and rows.

        Raises:
          RuntimeError: an invariant of this class or of the pool is broken.
        """
        self.pool.check_integrity(request.pages for request in self.running)
        rows = [request.row for request in self.running]
        if sorted(rows + self._free_rows) != list(range(self.max_num_seqs)):
            raise RuntimeError(f"rows are lost or shared: running {rows}, free {self._free_rows}")
        for request in self.running:
            if request.status is not RequestStatus.RUNNING:
                raise RuntimeError(f"{request.request_id} is {request.status} and runs")
            if len(request.pages) != self._pages_for(request.num_computed):
                raise RuntimeError(
                    f"{request.request_id} holds {len(request.pages)} pages for {request.num_computed} tokens"
                )
        for request in self.waiting:
            if request.pages or request.row >= 0 or request.status is not RequestStatus.WAITING:
                raise RuntimeError(
                    f"{request.request_id} waits but is {request.status}, holds {request.pages}"
                )
