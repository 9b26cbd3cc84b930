"""A device that is a dictionary: it runs schedules without JAX, and notices a wrong page."""

import functools
import random

import numpy as np

from pjengine.page_pool import NULL_PAGE
from pjengine.request import Request
from pjengine.schedule import Schedule
from pjengine.scheduler import Scheduler


class StubDevice:
    """Runs schedules one step late, as the engine does.

    Each slot of its "KV cache" holds a digest of all tokens up to there, made from the token and the
    digest in the slot before, read through the page table: a wrong page shows in every later token.
    A random earlier slot is checked, too, each time: a page that was overwritten shows as well.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache: dict[tuple[int, int], int] = {}
        self.tables: dict[int, dict[int, int]] = {}
        # The same of the layers that see a window, where there are any.
        self.window_cache: dict[tuple[int, int], int] = {}
        self.window_tables: dict[int, dict[int, int]] = {}
        self.computed: list[tuple[int, int]] = []  # row and position, in this step
        self.last_tokens: dict[int, int] = {}
        self.positions: dict[int, int] = {}  # of the last tokens
        self.in_flight: list[tuple[Schedule, list[list[int]]]] = []
        self.num_wrong_drafts = 0
        self.rng = random.Random(0)

    def run(self, schedule: Schedule) -> list[list[int]]:
        """The tokens of each sequence of the step, those that nobody will look at among them."""
        for tables, updates in zip((self.tables, self.window_tables), schedule.page_updates, strict=True):
            for row, column, page in updates:
                tables.setdefault(row, {})[column] = page
        self.computed = []
        sampled = []
        self._check_masked(schedule)
        decodes = schedule.decodes
        for row, start, length in zip(decodes.rows, decodes.starts, decodes.lengths, strict=True):
            sampled.append(self._decode(int(row), int(start), int(length), schedule.num_drafts))
        for chunk in schedule.chunks:
            known = chunk.request.known_tokens(chunk.start, chunk.start + chunk.length)
            for position, token in enumerate(known, chunk.start):
                digest = self._compute(chunk.row, position, token)
            if chunk.is_sampled:
                self.last_tokens[chunk.row] = digest % 997
                self.positions[chunk.row] = chunk.start + chunk.length
            sampled.append([digest % 997])
        for row, request in enumerate(self.scheduler.rows.requests):
            if request is not None:
                self._check(row, request)
        for row, position in self.computed:
            self._check_window(row, position)
        return sampled

    def _decode(self, row: int, bound: int, length: int, num_drafts: int) -> list[int]:
        """The tokens that hold; with drafts, a number of them by chance, and wrong ones written behind."""
        start, num_right = self.positions[row], length if not num_drafts else self.rng.randint(1, length)
        assert start <= bound <= start + self.scheduler.num_drafts
        tokens = [self.last_tokens[row]]
        for position in range(start, start + num_right):
            tokens.append(self._compute(row, position, tokens[-1]) % 997)
        for position in range(start + num_right, start + length):
            self._compute(row, position, self.rng.randrange(997))
            self.num_wrong_drafts += 1
        self.last_tokens[row], self.positions[row] = tokens[-1], start + num_right
        return tokens[1:]

    def _compute(self, row: int, position: int, token: int) -> int:
        size, table, before = self.scheduler.page_size, self.tables[row], position - 1
        digest = extend(self.cache[table[before // size], before % size] if position else 0, token)
        self.cache[table[position // size], position % size] = digest
        if self.scheduler.window is not None:
            page = self.window_tables[row][position // size]
            assert page != NULL_PAGE
            self.window_cache[page, position % size] = digest
            self.computed.append((row, position))
        return digest

    def _check_masked(self, schedule: Schedule) -> None:
        """All that sample with a grammar are named, and one token at a time is drawn of them."""
        sampling = self._sampling(schedule)
        masked = [(seq, own) for seq, (own, end) in enumerate(sampling) if own.edits.has_mask and end > 0]
        assert schedule.masked == masked
        assert not masked or (schedule.decodes.lengths == 1).all()

    def _check_known(self, schedule: Schedule) -> None:
        """When the step before has been read, the host knows all tokens before those to be drawn."""
        sampling = self._sampling(schedule)
        for seq, request in schedule.masked:
            is_again = self.scheduler.is_deterministic and request.num_known > sampling[seq][1]
            assert request.is_finished or is_again or request.num_known == sampling[seq][1]

    def _sampling(self, schedule: Schedule) -> list[tuple[Request, int]]:
        """Each sequence's request, and the position of the token to be drawn; -1: none."""
        decodes = schedule.decodes
        sampling = list(zip(decodes.requests, (decodes.starts + 1).tolist(), strict=True))
        return sampling + [(c.request, c.start + c.length if c.is_sampled else -1) for c in schedule.chunks]

    def _check(self, row: int, request: Request) -> None:
        size, table = self.scheduler.page_size, self.scheduler.rows
        num_computed = int(table.computed[row] - table.unsure[row])
        spot = self.rng.randrange(min(num_computed, request.num_known))
        wanted = functools.reduce(extend, request.known_tokens(0, spot + 1), 0)
        assert self.cache[self.tables[row][spot // size], spot % size] == wanted

    def _check_window(self, row: int, position: int) -> None:
        """The window's slots hold what the step's token sees, whatever else the step has written."""
        size, window = self.scheduler.page_size, self.scheduler.window
        assert window is not None
        first = max(0, position - window + 1)
        for spot in {first, self.rng.randint(first, position), position}:
            column, offset = divmod(spot, size)
            wanted = self.cache[self.tables[row][column], offset]
            assert self.window_cache[self.window_tables[row][column], offset] == wanted

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        assert not schedule.chunks or schedule.num_tokens <= self.scheduler.max_num_batched_tokens
        self.in_flight.append((schedule, self.run(schedule)))
        if len(self.in_flight) > 1 or not schedule.num_seqs:
            self.read()
        self._check_known(schedule)
        self.scheduler.check_integrity()
        return schedule

    def read(self) -> None:
        schedule, sampled = self.in_flight.pop(0)
        decodes, table = schedule.decodes, self.scheduler.rows
        owners = [
            *zip(decodes.requests, decodes.rows, decodes.admissions, strict=True),
            *((c.request, c.row, c.admission if c.is_sampled else -1) for c in schedule.chunks),
        ]
        if schedule.num_drafts:
            assert self.scheduler.speculation is not None
            taken = np.array([len(tokens) for tokens in sampled])
            self.scheduler.speculation.settle(table, schedule, taken, decodes.lengths - 1)
        for seq, ((request, row, admission), tokens) in enumerate(zip(owners, sampled, strict=True)):
            is_new = schedule.position(seq) >= request.num_known
            if table.admissions[row] == admission and is_new and request.beams is None:
                for token in tokens:
                    if not request.is_finished:  # the rest comes after an end that the device did not see
                        request.append(token)
        self.scheduler.finish([request for request, *_ in owners if request.is_finished])


def extend(digest: int, token: int) -> int:
    return hash((digest, token))


def expected(request: Request) -> list[int]:
    """What the request gets alone."""
    digest = functools.reduce(extend, request.prompt_token_ids, 0)
    tokens: list[int] = []
    while len(tokens) < request.max_total_tokens - len(request.prompt_token_ids):
        tokens.append(digest % 997)
        if tokens[-1] in request.eos_token_ids:
            break
        digest = extend(digest, tokens[-1])
    return tokens
