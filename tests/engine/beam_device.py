"""The device that is a dictionary, with beam searches."""

from collections import deque
from functools import reduce
from typing import Any

from pjengine.beam_search import BeamSearch, BeamStep, Candidate
from pjengine.request import Request
from pjengine.schedule import Schedule
from tests.engine.stub_device import StubDevice, extend

type Chosen = tuple[list[Candidate], list[Candidate]]


def choose(beams: list[tuple[int, float] | None], width: int) -> Chosen:
    """From the digest and the score of each beam: those that go on, those that end; no two are alike."""
    going_on, ended = list[Candidate](), list[Candidate]()
    for parent, beam in enumerate(beams):
        if beam is None:
            continue
        digest, score = beam
        for i in range(3 * width):
            token = (digest + 7 * i) % 997
            candidate = Candidate(score - 1e-6 - hash((digest, i)) % 10**9 / 1e9, parent, token)
            (ended if i % 3 == 0 and hash((token, digest)) % 3 == 0 else going_on).append(candidate)
    return sorted(going_on, reverse=True)[:width], sorted(ended, reverse=True)[:width]


class BeamDevice(StubDevice):
    """Rows go on as others' continuations: by page table, and a copy of the page that is not full."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.scores: dict[int, float] = {}
        self.chosen: deque[list[Chosen]] = deque()  # of each step under way

    def run(self, schedule: Schedule) -> list[list[int]]:
        sampled = super().run(schedule)
        self.chosen.append([self._select(step) for step in schedule.beams])
        return sampled

    def _check(self, row: int, request: Request) -> None:
        if request.edits.leads_beams:  # the others are looked at when they have forked
            super()._check(row, request)

    def _select(self, step: BeamStep) -> Chosen:
        size, end = self.scheduler.page_size, step.kv_len - 1
        is_first = len(step.seqs) < len(step.rows) or step.kv_len == len(step.request.prompt_token_ids)
        beams: list[tuple[int, float] | None] = [
            (self.cache[self.tables[row][end // size], end % size], 0.0 if is_first else self.scores[row])
            for row in step.rows[: 1 if is_first else None]
        ]
        going_on, ended = choose(beams, len(step.rows))
        parents = [step.rows[candidate.parent] for candidate in going_on]
        for cache, tables in ((self.cache, self.tables), (self.window_cache, self.window_tables)):
            if self.scheduler.window is None and tables is self.window_tables:
                continue
            self._fork(cache, tables, step, parents)
        for row, candidate in zip(step.rows, going_on, strict=True):
            self.last_tokens[row], self.scores[row] = candidate.token, candidate.score
            self.positions[row] = step.kv_len
            super()._check(row, step.request)
        return going_on, ended

    def _fork(
        self, cache: dict[Any, int], tables: dict[int, dict[int, int]], step: BeamStep, parents: list[int]
    ) -> None:
        full, rest = divmod(step.kv_len, self.scheduler.page_size)
        theirs = [dict(tables.get(parent, {})) for parent in parents]
        tails = [
            [cache[table[full], i] for i in range(rest) if (table[full], i) in cache] for table in theirs
        ]
        for row, table, tail in zip(step.rows, theirs, tails, strict=True):
            own = tables.setdefault(row, {})
            own.update({column: page for column, page in table.items() if column < full})
            cache.update({(own[full], rest - len(tail) + i): digest for i, digest in enumerate(tail)})

    def read(self) -> None:
        schedule, chosen = self.in_flight[0][0], self.chosen.popleft()
        for step, (going_on, ended) in zip(schedule.beams, chosen, strict=True):
            request = step.request
            if self.scheduler.rows.admissions[step.rows[0]] != step.admission:
                continue
            self.scheduler.beams.follow(step, [candidate.parent for candidate in going_on])
            if request.beams.take(going_on, ended):
                request.finish("stop")
                self.scheduler.finish([request])
        super().read()


def expected_beams(request: Request) -> list[tuple[float, list[int]]]:
    """What a search finds alone."""
    assert request.beams is not None
    search = BeamSearch(
        width=request.beams.width,
        max_tokens=request.beams.max_tokens,
        length_penalty=request.beams.length_penalty,
        early_stopping=request.beams.early_stopping,
    )
    search.begin()
    beams: list[tuple[int, float] | None] = [(reduce(extend, request.prompt_token_ids, 0), 0.0)]
    while True:
        going_on, ended = choose(beams, search.width)
        is_over = search.take(going_on, ended)
        if is_over:
            return found(search)
        digests = [beam[0] for beam in beams if beam is not None]
        beams = [(extend(digests[own.parent], own.token), own.score) for own in going_on]


def found(search: BeamSearch) -> list[tuple[float, list[int]]]:
    return [(beam.score, beam.token_ids) for beam in search.finished]
