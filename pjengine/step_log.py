"""What an engine's last steps were, noted at every step, for whoever asks afterwards.

A step is noted when it has been launched, so that the device computes meanwhile; `benchmarks/step_log.py`
times it. Nothing here keeps a request, its tokens or an array alive. `schedule_record.py` reads it.
"""

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from pjengine.batching import Layout
from pjengine.outputs import RequestMetrics
from pjengine.page_pool import PagePool
from pjengine.request import Request
from pjengine.runner import Launched
from pjengine.scheduler import Scheduler

MAX_STEPS = 1024  # that are kept: 7 KB each where 256 requests run at once
PRUNE = 128  # steps between looks at which admissions no step has any more


class Admission(NamedTuple):
    """A request's stay in a row, from admission to its end or preemption."""

    request_id: str
    num_prompt_tokens: int
    # The request's own, which grows in place, and which the request leaves behind with its row.
    pages: list[int]
    metrics: RequestMetrics  # the request's own, which changes as long as it runs; so does the next
    leader_metrics: RequestMetrics  # of a beam: its search's

    @property
    def is_follower(self) -> bool:
        """Whether it is a beam that another one leads, which has no times of its own."""
        return self.metrics is not self.leader_metrics


def admission_of(request: Request, leader: Request) -> Admission:
    """Of `request`, which is one of the rows of `leader`."""
    num_prompt = len(request.prompt_token_ids)
    return Admission(request.request_id, num_prompt, request.pages, request.metrics, leader.metrics)


class Decoded(NamedTuple):
    """Rows whose last token a step computed, and how many tokens each got."""

    rows: np.ndarray
    lengths: np.ndarray


class ReadChunk(NamedTuple):
    """Known tokens of one row that a step computed."""

    row: int
    length: int
    num_cached: int  # tokens before these, found in the prefix cache when the row was taken in this step


class PageChanges(NamedTuple):
    """What has changed in the states of a pool's pages: of groups of eight, which, and what they are now."""

    places: np.ndarray
    groups: np.ndarray
    rest: bytes  # of the last num_pages % 8, changed or not


class PageStates:
    """The states of a pool's pages, compared in groups of eight: 60,000 pages take 5 us."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._groups = np.zeros(num_pages // 8, np.uint64)  # FREE
        self._rest = bytes(num_pages % 8)

    def look(self, pool: PagePool) -> PageChanges:
        """What has changed since the last look."""
        now = np.frombuffer(pool.states, np.uint64, len(self._groups))
        [places] = (self._groups != now).nonzero()
        changes = PageChanges(places, now[places], bytes(pool.states[8 * len(now) :]))
        self.take(changes)
        return changes

    def take(self, changes: PageChanges) -> None:
        """Follows changes that another has seen."""
        self._groups[changes.places] = changes.groups
        self._rest = changes.rest

    @property
    def states(self) -> np.ndarray:
        """uint8 [pages]: as after the last look."""
        return np.concatenate([self._groups.view(np.uint8), np.frombuffer(self._rest, np.uint8)])

    def count(self, state: int) -> int:
        """Pages in one state."""
        return int(np.count_nonzero(self.states == state))

    def copy(self) -> "PageStates":
        other = PageStates(self.num_pages)
        other._groups[:] = self._groups
        other._rest = self._rest
        return other


@dataclass(slots=True)
class LoggedStep:
    """One step, as the host saw it. Times are of `time.perf_counter`; None: not read yet."""

    number: int
    start_s: float  # when the host began to put it together
    layout: Layout  # of its program
    is_drawn_apart: bool  # another program drew its tokens
    schedule_s: float
    launch_s: float  # the wait for programs that had to be made included
    compile_s: float  # of that wait, and of such waits since the step before
    admissions: np.ndarray  # int64 [rows]: the number of each row's; 0: the row is free
    room: np.ndarray  # int32 [rows]: slots of its pages
    decoded: Decoded
    chunks: list[ReadChunk]
    num_waiting: int  # requests, when it was launched
    num_preempted: int  # for it
    page_changes: PageChanges  # since the step before
    beam_pages: list[tuple[int, list[int]]]  # by admission: pages of beams change owners
    read_s: float | None = None  # that the host waited for its results
    end_s: float | None = None  # when they were there
    output_s: float | None = None


class _Phase:
    """A part of a step on the host: timed, and named in a trace if one is being written."""

    __slots__ = ("_annotation", "_log", "_name", "_start_s")

    def __init__(self, log: "StepLog", name: str, number: int) -> None:
        self._log = log
        self._name = name
        self._annotation = TraceAnnotation(name, step=number)

    def __enter__(self) -> None:
        self._annotation.__enter__()
        self._start_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.end(self._name, self._start_s, time.perf_counter())
        self._annotation.__exit__(kind, error, trace)


class StepLog:
    """The last MAX_STEPS steps of one engine, and which requests were in them.

    An engine takes turns: `turn`, then in it the phases "schedule" and "launch" of one step, which is added,
    and "output", with "read" in it, of the step that was added in the turn before.
    """

    def __init__(self, num_steps: int = 0) -> None:
        """`num_steps` have been before: the first is numbered so."""
        self.num_steps = num_steps
        self.steps: deque[LoggedStep] = deque()
        self.admissions: dict[int, Admission] = {}  # by number
        self.pages_before: PageStates | None = None  # of the first pool, before the first of `steps`
        self._pages: PageStates | None = None  # and after the last
        self._under_way: LoggedStep | None = None
        self._reading: LoggedStep | None = None
        self._start_s = self._schedule_s = self._launch_s = 0.0
        self._compile_s: float | None = None  # that the steps so far have waited, and who came before them

    def turn(self, compile_s: float) -> StepTraceAnnotation:
        """Begins a turn; the annotation is for as long as it takes. `compile_s`: as of `add`, so far."""
        if self._compile_s is None:
            self._compile_s = compile_s
        self._reading, self._under_way = self._under_way, None
        self._start_s = time.perf_counter()
        return StepTraceAnnotation("step", step_num=self.num_steps)

    def phase(self, name: str) -> _Phase:
        """A part of a turn, by the names above; or "draw", of a step that was launched without its masks."""
        own = self._under_way if name == "draw" else self._reading if name in ("read", "output") else None
        return _Phase(self, name, self.num_steps if own is None else own.number)

    def end(self, name: str, start_s: float, end_s: float) -> None:
        """What a phase says when it is over."""
        seconds = end_s - start_s
        if name == "schedule":
            self._schedule_s = seconds
        elif name == "launch":
            self._launch_s = seconds
        elif self._reading is not None and name == "read":
            self._reading.read_s, self._reading.end_s = seconds, end_s
        elif self._reading is not None and name == "output":
            self._reading.output_s = seconds - (self._reading.read_s or 0.0)

    def add(self, launched: Launched, scheduler: Scheduler, compile_s: float) -> None:
        """Notes a step that has been launched; `compile_s`: that all steps have waited for programs."""
        schedule, table = launched.schedule, scheduler.rows
        if self._pages is None:
            self._pages, self.pages_before = (PageStates(scheduler.pool.num_pages) for _ in range(2))
        chunks = []
        for chunk in schedule.chunks:
            chunks.append(ReadChunk(chunk.row, chunk.length, chunk.start if chunk.is_admitted else 0))
            if chunk.is_admitted:
                for own in chunk.request.row_requests:
                    self.admissions[int(table.admissions[own.row])] = admission_of(own, chunk.request)
        decodes, beam_pages = schedule.decodes, []
        if schedule.beams or (self.steps and self.steps[-1].beam_pages):
            for row in np.flatnonzero(table.is_beam).tolist():
                beam_pages.append((int(table.admissions[row]), table.owner(row).pages))
        self._under_way = step = LoggedStep(
            number=self.num_steps,
            start_s=self._start_s,
            layout=launched.layout,
            is_drawn_apart=launched.draw_layout is not None,
            schedule_s=self._schedule_s,
            launch_s=self._launch_s,
            compile_s=compile_s - (self._compile_s or 0.0),
            admissions=table.admissions.copy(),
            room=table.room.astype(np.int32),
            decoded=Decoded(decodes.rows, decodes.lengths),
            chunks=chunks,
            num_waiting=scheduler.num_waiting,
            num_preempted=schedule.num_preempted,
            page_changes=self._pages.look(scheduler.pool),
            beam_pages=beam_pages,
        )
        self._compile_s = compile_s
        self.num_steps += 1
        self.steps.append(step)
        if len(self.steps) > MAX_STEPS:
            self._drop_oldest()

    def settle(self, lengths: np.ndarray) -> None:
        """Of the step that is read: how many tokens its decodes got, where drafts had to be checked."""
        if self._reading is not None:
            self._reading.decoded = Decoded(self._reading.decoded.rows, lengths)

    def _drop_oldest(self) -> None:
        dropped = self.steps.popleft()
        assert self.pages_before is not None
        self.pages_before.take(dropped.page_changes)
        if dropped.number % PRUNE == 0:
            # Numbers grow: one is of use if a row had it at the first step that is left, or got it since.
            live = dropped.admissions
            newest, kept = int(live.max()), set(live.tolist())
            self.admissions = {
                number: own for number, own in self.admissions.items() if number > newest or number in kept
            }
