"""Which tokens run in the next step. Plain Python and numpy: it decides, the device computes.

A step is either all decodes or mixed: one token of every row that decodes, then chunks of prompts up to
`max_num_batched_tokens`, or up to a smaller step that they fill. So a row that decodes gets on with every
step, however many prompts wait, and waits at most as long as a step of that many tokens takes. With
`prefill_first`, for work whose answers are waited for whole, rows that decode wait while prompts fill whole
steps, as long as each of these has a row.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pjengine.beam_rows import BeamRows
from pjengine.edits import NEEDS, NO_EDITS, Edits, join_needs, past_prompts
from pjengine.page_groups import Found, PageGroups, PageUpdates
from pjengine.page_pool import PagePool
from pjengine.processors import MAX_CHAINS, NO_CHAINS, Chains
from pjengine.programs import CompilationError
from pjengine.request import Request, RequestStatus
from pjengine.row_table import RowTable
from pjengine.schedule import Chunk, Decodes, Schedule, TokenBudget, step_limit
from pjengine.speculation import Speculation
from pjengine.step_turns import StepTurns

_WITH_FUNCTIONS = [NEEDS.index("processed"), NEEDS.index("edited")]


@dataclass
class Scheduler:
    """Owns the queue, the rows and the pages.

    Invariants, recounted by `check_integrity`: a running request owns one row and exactly the pages
    that its computed tokens need; a waiting or finished one owns neither.
    """

    pool: PagePool
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int  # at least max_num_seqs
    is_caching: bool = True  # prefixes
    decode_steps: int = 1  # tokens of a row in one step of decodes alone; at most a page
    max_prompt_logprob_tokens: int | None = None  # in a step with logprobs of a prompt; None: no limit
    max_states: int | None = None  # hidden ones that a step keeps: its tokens times layers; None: no limit
    mixed_sizes: Sequence[int] = ()  # tokens that mixed steps are padded to, in order; none: any number
    window_pool: PagePool | None = None  # of the layers that see a window, if they have one of their own
    window: int | None = None  # slots that a token sees there, its own included
    # Whether there are programs for steps that need so much; if not, they are made for what comes soon.
    can_edit: Callable[..., bool] = lambda now, soon, chains=NO_CHAINS: True  # as Runner.can_edit
    speculation: Speculation | None = None  # which steps draft tokens; None: none does
    # A token is computed in one way only, whatever happens: those of prompts in steps of prompts, outputs in
    # decodes, also once more after a preemption; pages with outputs are not shared.
    is_deterministic: bool = False
    prefill_first: bool = False  # steps that prompts fill have no decodes
    # Free pages for each row that still grows, when another request is admitted. Without, a full pool admits
    # requests that are pushed out some tokens later, and computed again: 151 of sharegpt-like's 1,000 in the
    # 7,500 pages that an H200 has for llama2-13b, 152 by simulation; with one page 5, in 4 % less time.
    num_spare_pages: int = 1
    num_cache_queries: int = 0  # tokens of requests that were looked up in the prefix cache
    num_cache_hits: int = 0  # tokens found there
    num_prompt_tokens: int = 0  # of requests that have got a row
    num_preemptions: int = 0
    rows: RowTable = field(init=False)
    beams: BeamRows = field(init=False)
    turns: StepTurns | None = field(init=False)  # None: a step holds decodes and prompts
    _pages: PageGroups = field(init=False)
    _waiting: list[tuple[tuple[int, int], Request]] = field(default_factory=list)  # a heap, by rank
    _orders: Iterator[int] = field(default_factory=itertools.count)
    _approved: np.ndarray = field(default_factory=lambda: np.zeros(len(NEEDS)))  # by `can_edit`, last
    _approved_chains: frozenset[Any] = frozenset()

    def __post_init__(self) -> None:
        self.rows = RowTable(self.max_num_seqs)
        self.turns = StepTurns() if self.is_deterministic else None
        self._pages = PageGroups(
            self.pool,
            self.rows,
            page_size=self.page_size,
            # With drafts: those of a step that is not read yet, and those of the next.
            max_new_tokens=max(self.max_num_batched_tokens, self.decode_steps, 2 * self.num_drafts + 1),
            is_caching=self.is_caching,
            window_pool=self.window_pool,
            window=self.window,
            shares_outputs=not self.is_deterministic,
        )
        self.beams = BeamRows(self.rows, self._pages, self.page_size)

    @property
    def num_drafts(self) -> int:
        """Tokens drafted for a row in a step that speculates."""
        return 0 if self.speculation is None else self.speculation.config.num_drafts

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting) or self.rows.num_free < self.rows.num_rows

    @property
    def pools(self) -> list[PagePool]:
        """Those of each group of layers."""
        return self._pages.pools

    @property
    def running(self) -> list[Request]:
        """Those with a row, in order of admission."""
        return self.rows.running()

    @property
    def waiting(self) -> list[Request]:
        """Those without a row, in the order in which they will be admitted."""
        return [request for _, request in sorted(self._waiting)]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

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
        # The last token is never computed.
        num_rows = len(request.row_requests)
        if num_rows > self.max_num_seqs:
            raise ValueError(
                f"{request.params.num_field}={num_rows} beams run at once, and max_num_seqs="
                f"{self.max_num_seqs}: ask for fewer, or create the engine with a higher max_num_seqs"
            )
        for most, pool in self._pages.most_held(request.max_total_tokens - 1):
            num_shared = len(request.prompt_token_ids) // self.page_size if pool is self.pool else 0
            needed = num_shared + num_rows * (most - num_shared)
            if needed > pool.num_usable:
                beams = f" in each of {num_rows} beams" if num_rows > 1 else ""
                raise ValueError(
                    f"request {request.request_id} may grow to {request.max_total_tokens} tokens{beams}, "
                    f"which need {needed} pages of {self.page_size}; the KV cache has {pool.num_usable}. "
                    f"Lower max_tokens, shorten the prompt ({len(request.prompt_token_ids)} tokens) or give "
                    f"the cache more memory"
                )

    def schedule(self) -> Schedule:
        """The next step; without any sequences when nothing can run until a result is read."""
        chunks: list[Chunk] = []
        updates = PageUpdates([], [])
        refused: list[tuple[Request, str]] = []
        self._pages.give_back_unseen()
        is_mixed = self.turns is None and not self._are_prompts_first()
        num_preempted = self._make_room(is_mixed)
        rows, turns = self.rows.decoding(), self.turns
        if is_mixed:
            self._grow(rows, updates)
        if turns is None or turns.is_for_prompts(len(rows), self._num_wanted(0), self.max_num_batched_tokens):
            budget = self._budget(len(rows) if is_mixed else 0)
            for row, length in self._prompt_lengths(budget):
                chunks.append(self._take(self.rows.owner(row), length, updates))
            if num_preempted == 0:
                self._admit(budget, chunks, updates, refused)
        if turns is not None:
            turns.see(sum(chunk.length for chunk in chunks))
        if not is_mixed:
            # Prompts that are cached, or have no pages, may leave room: all decodes go along that have it.
            is_joined = turns is None and budget.num_left >= len(rows)
            rows = rows[:0] if chunks and not is_joined else rows
            self._grow(rows, updates)
        needs = self._needs(rows, chunks)
        # Several tokens where the host has no part in them.
        depth, num_drafts = 1 if chunks or needs.any() else self.decode_steps, 0
        if self.speculation is not None and not chunks:
            num_drafts = self.speculation.choose(self.rows, rows, needs, depth)
        decodes = self._book(rows, 1 + num_drafts if num_drafts else depth, updates)
        if num_drafts:
            self.rows.unsure[rows] += decodes.lengths - 1
        return Schedule(
            decodes=decodes,
            chunks=chunks,
            page_updates=updates,
            needs=needs,
            edits=self._edits(decodes, chunks),
            masked=self._masked(decodes, chunks),
            refused=refused,
            beams=self.beams.steps(decodes, chunks),
            num_preempted=num_preempted,
            num_drafts=num_drafts,
            has_filters=bool(chunks) or bool(self.rows.has_filters[rows].any()),
        )

    def _needs(self, rows: np.ndarray, chunks: list[Chunk]) -> np.ndarray:
        """The room that the edits of a step take together."""
        table = self.rows
        own = [past_prompts(table.needs[rows])]
        for chunk in chunks:
            is_prompt = chunk.start < len(chunk.request.prompt_token_ids)
            own.append((table.needs if is_prompt else past_prompts(table.needs))[[chunk.row]])
        return join_needs(np.concatenate(own))

    def _edits(self, decodes: Decodes, chunks: list[Chunk]) -> list[tuple[int, Edits, int]]:
        """Those that travel with a step: sequence, edits, number of outputs before."""
        found = []
        for seq in np.flatnonzero(self.rows.travels[decodes.rows]).tolist():
            request = decodes.requests[seq]
            found.append((seq, request.edits, int(decodes.starts[seq]) + 1 - len(request.prompt_token_ids)))
        for seq, chunk in enumerate(chunks, len(decodes.requests)):
            if chunk.is_sampled and self.rows.travels[chunk.row]:
                num_outputs = chunk.start + chunk.length - len(chunk.request.prompt_token_ids)
                found.append((seq, chunk.request.edits, num_outputs))
        return found

    def _masked(self, decodes: Decodes, chunks: list[Chunk]) -> list[tuple[int, Request]]:
        """Sequences that sample with a grammar. What it allows shows when the step before has been read."""
        has_mask = self.rows.needs[:, NEEDS.index("masks")] > 0
        found = [(seq, decodes.requests[seq]) for seq in np.flatnonzero(has_mask[decodes.rows]).tolist()]
        for seq, chunk in enumerate(chunks, len(decodes.requests)):
            if chunk.is_sampled and has_mask[chunk.row]:
                found.append((seq, chunk.request))
        return found

    def _budget(self, num_decodes: int) -> TokenBudget:
        most = self.max_num_batched_tokens
        if self.mixed_sizes:
            most = step_limit(self._num_wanted(num_decodes), num_decodes, self.mixed_sizes)
        limit = self.max_prompt_logprob_tokens or most
        return TokenBudget(num_decodes, most, limit, self.max_states, self.mixed_sizes)

    def _num_wanted(self, num_decodes: int) -> int:
        """How many tokens the next step would take without a limit; at least, where it has more than that.

        An estimate: prompts that wait count whole, whatever the cache holds of them, and as if all had room.
        """
        table = self.rows
        rows = table.prefilling()
        num_wanted = num_decodes + int((table.prefill_end[rows] - table.computed[rows]).sum())
        for _, request in self._waiting[: table.num_free]:
            if num_wanted >= self.max_num_batched_tokens:
                break
            num_wanted += self._prefill_end(request)
        return num_wanted

    def _are_prompts_first(self) -> bool:
        """Whether prompts may fill the next step; not while some wait for the rows of those that decode."""
        if not self.prefill_first or len(self._waiting) > self.rows.num_free:
            return False
        return self._num_wanted(0) >= self.max_num_batched_tokens

    def _prefill_end(self, request: Request) -> int:
        """How many tokens of a waiting request are computed in chunks; its other outputs one by one."""
        return len(request.prompt_token_ids) if self.is_deterministic else request.num_known

    def _prompt_lengths(self, budget: TokenBudget) -> Iterator[tuple[int, int]]:
        """Rows with known tokens left to compute, and how many of them the next step takes."""
        table = self.rows
        for row in table.prefilling():
            if length := budget.take(table.owner(row), int(table.computed[row]), int(table.prefill_end[row])):
                yield row, length

    def _make_room(self, is_mixed: bool) -> int:
        """Preempts the highest ranks until the next tokens of all that runs have pages; returns how many.

        Spares those that are about to finish: their pages return by themselves. `is_mixed`: the step has
        decodes and prompts, not one or the other.
        """
        num_preempted, table = 0, self.rows
        while True:
            rows = table.decoding()
            needed = int(np.count_nonzero(table.computed[rows] == table.room[rows]))
            for row, length in self._prompt_lengths(self._budget(len(rows) if is_mixed else 0)):
                request, end = table.owner(row), int(table.computed[row]) + length
                needed += self._pages_for(end) - len(request.pages)
                needed += self.beams.num_tails(request) if end == table.prefill_end[row] else 0
            if needed <= self._pages.num_free:
                return num_preempted
            candidates = [table.owner(row) for row in [*rows.tolist(), *table.prefilling()]]
            self._preempt(max(candidates, key=lambda other: other.rank))
            num_preempted += 1

    def _book(self, rows: np.ndarray, depth: int, updates: PageUpdates) -> Decodes:
        """Counts up to `depth` tokens of each row as computed; at least one, for which there is room."""
        table = self.rows
        starts = table.computed[rows]
        lengths = np.minimum(depth, table.limit[rows] - starts)
        if depth > 1:
            short = rows[starts + lengths > table.room[rows]]
            self._add_pages(short[: self._pages.num_free], updates)
            lengths = np.minimum(lengths, table.room[rows] - starts)
        table.computed[rows] += lengths
        requests: Any = [table.requests[row] for row in rows.tolist()]
        return Decodes(requests, rows, table.admissions[rows], starts, lengths)

    def _grow(self, rows: np.ndarray, updates: PageUpdates) -> None:
        """Gives each of these rows whose pages are full one more."""
        self._add_pages(rows[self.rows.computed[rows] == self.rows.room[rows]], updates)

    def _add_pages(self, rows: np.ndarray, updates: PageUpdates) -> None:
        for row in rows.tolist():
            self._pages.grow(self.rows.owner(row), 1, updates)

    def _admit(
        self,
        budget: TokenBudget,
        chunks: list[Chunk],
        updates: PageUpdates,
        refused: list[tuple[Request, str]],
    ) -> None:
        """Starts waiting requests while there are rows, tokens, and pages for all they have to compute."""
        if not self._waiting:
            return
        left, spare = self._pages.unpromised(), self.num_spare_pages * self._pages.num_growing()
        last: tuple[int, int] | None = None  # of what runs, the rank that is preempted first
        held_back: list[tuple[tuple[int, int], Request]] = []
        while self._waiting and budget.num_left and self.rows.num_free:
            _, request = self._waiting[0]
            if len(request.row_requests) > self.rows.num_free:
                break
            try:
                # In their order: what runs then needs ever less, and the program asked for stays enough.
                is_ready = request.edits is NO_EDITS or (not held_back and self._can_run(request))
            except CompilationError as error:
                refused.append((heapq.heappop(self._waiting)[1], str(error)))
                continue
            if not is_ready:
                held_back.append(heapq.heappop(self._waiting))
                continue
            found = self._pages.find(request)
            cost = self._pages.cost(request, found) + self.beams.num_tails(request)
            if (cost > left).any():
                break
            if (cost > left - spare).any():  # what it goes before has no claim to the spare ones
                last = last or max(own.rank for own in self.rows.requests if own is not None)
                if request.rank > last:
                    break
            num_cached = len(found.pages) * self.page_size
            if not (length := budget.take(request, num_cached, self._prefill_end(request))):
                break  # a step of its own kind is full
            heapq.heappop(self._waiting)
            self._start(request, found, updates)
            chunks.append(self._take(request, length, updates, is_admitted=True))
            left -= cost
            if self._pages_for(request.max_total_tokens - 1) > self._pages_for(request.num_known):
                spare += self.num_spare_pages * len(request.row_requests)
        for entry in held_back:
            heapq.heappush(self._waiting, entry)

    def _can_run(self, request: Request) -> bool:
        """Whether there are programs for the request among those that run."""
        running = self.rows.needs[self.rows.admissions > 0]
        now = join_needs(np.vstack([running, *(own.edits.needs for own in request.row_requests)]))
        with_functions = np.flatnonzero(self.rows.needs[:, _WITH_FUNCTIONS].any(axis=1)).tolist()
        chains = frozenset(chain for row in with_functions for chain in self.rows.owner(row).edits.chains)
        chains |= frozenset(request.edits.chains)
        if len(chains) > MAX_CHAINS:
            return False  # until others have ended
        if (now <= self._approved).all() and chains <= self._approved_chains:
            return True
        beside, all_chains = self._next_edits(chains)

        def soon() -> np.ndarray:
            return join_needs(np.vstack([running, *(edits.needs for edits in beside)]))

        wanted = (Chains(chains, all_chains),) if all_chains else ()
        is_ready = self.can_edit(now, soon, *wanted)
        if is_ready:
            self._approved, self._approved_chains = now, chains
        return is_ready

    def _next_edits(self, chains: frozenset[Any]) -> tuple[list[Edits], frozenset[Any]]:
        """Those of the waiting that the free rows are for, and all functions then, `chains` among them.

        A request whose functions no program would hold beside these is left out, needs and all.
        """
        edits: list[Edits] = []
        for _, request in self._waiting:
            if request.edits is NO_EDITS or len(joined := chains.union(request.edits.chains)) > MAX_CHAINS:
                continue
            if len(edits) + len(request.row_requests) > self.rows.num_free:
                break
            edits += [own.edits for own in request.row_requests]
            chains = joined
        return edits, chains

    def _start(self, request: Request, found: Found, updates: PageUpdates) -> None:
        """Gives a waiting request a row and the cached pages of its beginning."""
        num_cached = len(found.pages) * self.page_size
        request.status = RequestStatus.RUNNING
        request.row = self.rows.admit(
            request, num_cached, room=num_cached, prefill_end=self._prefill_end(request)
        )
        self._pages.take(request, found, updates)
        self.beams.start(request)
        if self.is_caching and request.is_cache_read:
            self.num_cache_queries += request.num_known
            self.num_cache_hits += num_cached
        if request.metrics.scheduled_s is None:
            request.metrics.scheduled_s = time.perf_counter()
            request.num_cached_tokens = num_cached
            self.num_prompt_tokens += len(request.prompt_token_ids)

    def _take(
        self,
        request: Request,
        length: int,
        updates: PageUpdates,
        *,
        is_admitted: bool = False,
    ) -> Chunk:
        """Books `length` known tokens of a running request: pages, counters, and the chunk that says so."""
        table, row = self.rows, request.row
        start = int(table.computed[row])
        self._pages.grow(request, self._pages_for(start + length) - len(request.pages), updates)
        table.computed[row] += length
        self._pages.register(request)  # those of outputs when it leaves its row
        is_sampled = start + length == table.prefill_end[row]
        if is_sampled:
            self.beams.fork(request, updates)
        return Chunk(
            request=request,
            row=row,
            admission=int(table.admissions[row]),
            start=start,
            length=length,
            is_sampled=bool(is_sampled),
            is_admitted=is_admitted,
        )

    def _preempt(self, request: Request) -> None:
        """Takes a request's row and pages; it will recompute its tokens, and sample the same ones."""
        self._free(request)
        request.status = RequestStatus.WAITING
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
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
        self._pages.forget(self.running)

    def _free(self, request: Request) -> None:
        for own in request.row_requests:
            self._pages.register(own)
            self._pages.release(own)
            self.rows.vacate(own.row)
            own.row = -1

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def check_integrity(self) -> None:
        """Recounts pages and rows.

        Raises:
          RuntimeError: an invariant of this class, of its rows or of the pool is broken.
        """
        running = self.running
        self._pages.check_integrity(running)
        self.rows.check_integrity(self.page_size, self.num_drafts)
        for request in running:
            if request.status is not RequestStatus.RUNNING:
                raise RuntimeError(f"{request.request_id} is {request.status} and runs")
        for request in self.waiting:
            if request.pages or request.row >= 0 or request.status is not RequestStatus.WAITING:
                raise RuntimeError(
                    f"{request.request_id} waits but is {request.status}, holds {request.pages}"
                )
