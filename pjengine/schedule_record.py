"""The batch over time: which request had which tokens and pages in which step, and what each step took.

`LLM.explain_schedule` gives a record; it is data, text (`print`), JSON and, with matplotlib, pictures.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from pjengine.batching import Layout
from pjengine.outputs import RequestMetrics
from pjengine.page_pool import CACHED as CACHED_PAGE
from pjengine.page_pool import HELD as HELD_PAGE
from pjengine.schedule_plot import plot_batch, plot_latencies, plot_pages
from pjengine.scheduler import Scheduler
from pjengine.step_log import Admission, LoggedStep, PageStates, StepLog, admission_of
from pjengine.step_record import CACHED, FREE, LONG_S, SHARED, RequestRecord, State, StepRecord

WIDTH = 96  # steps that the text shows
GLYPHS = {
    State.ABSENT: " ",
    State.WAITING: ".",
    State.PREFILL: "P",
    State.DECODE: "d",
    State.HELD: "-",
    State.PREEMPTED: "x",
}
FOUND = "c"  # in place of P: pages from the prefix cache came before these tokens
LEGEND = ". waits, P prefill, c prefill after a cached prefix, d decode, - holds its pages, x preempted"


class ScheduleRecord:
    """Steps of one engine, and the requests that were in them or waited for them.

    `states` (of `State`), `tokens` (computed) and `cached_tokens` (found in the prefix cache) have a row for
    each of `requests`, in order of arrival, and a column for each of `steps`.
    """

    def __init__(
        self,
        logged: Sequence[LoggedStep],
        admissions: Mapping[int, Admission],
        waiting: Sequence[Admission],
        pages_before: PageStates,
        page_size: int,
    ) -> None:
        self.page_size = page_size
        self._logged = logged
        self._admissions = admissions
        self._pages_before = pages_before
        owners = _owners(logged, admissions, waiting)
        self._index = {id(own.metrics): index for index, own in enumerate(owners)}
        shape = len(owners), len(logged)
        self.states: UInt8[np.ndarray, "requests steps"] = np.zeros(shape, np.uint8)
        self.tokens: Int[np.ndarray, "requests steps"] = np.zeros(shape, np.int32)
        self.cached_tokens: Int[np.ndarray, "requests steps"] = np.zeros(shape, np.int32)
        for index, own in enumerate(owners):
            if not own.is_follower:
                self.states[index] = _states_without_row(own.metrics, logged)
        for column in range(len(logged)):
            self._fill(column)
        firsts = [int(cached[cached > 0][:1].sum()) for cached in self.cached_tokens]
        self.requests = [_request_record(own, first) for own, first in zip(owners, firsts, strict=True)]
        self.steps = self._step_records()

    def _fill(self, column: int) -> None:
        """What each request did in one step."""
        step = self._logged[column]
        index_of = {row: self._index[id(own.metrics)] for row, own in self._live(column)}
        self.states[list(index_of.values()), column] = State.HELD
        for row, length in zip(step.decoded.rows.tolist(), step.decoded.lengths.tolist(), strict=True):
            self.states[index_of[row], column] = State.DECODE
            self.tokens[index_of[row], column] = length
        for chunk in step.chunks:
            self.states[index_of[chunk.row], column] = State.PREFILL
            self.tokens[index_of[chunk.row], column] = chunk.length
            self.cached_tokens[index_of[chunk.row], column] = chunk.num_cached

    def _live(self, column: int) -> list[tuple[int, Admission]]:
        """Rows that have a request during a step."""
        numbers = self._logged[column].admissions
        return [(row, self._admissions[int(numbers[row])]) for row in np.flatnonzero(numbers).tolist()]

    def _step_records(self) -> list[StepRecord]:
        records, pages, before_s = [], self._pages_before.copy(), None
        for column, step in enumerate(self._logged):
            states, tokens = self.states[:, column], self.tokens[:, column]
            pages.take(step.page_changes)
            num_held, num_cached = (pages.count(state) for state in (HELD_PAGE, CACHED_PAGE))
            since_s = step.start_s if before_s is None else max(before_s, step.start_s)
            before_s = end_s = step.end_s
            if column + 1 < len(self._logged) and _begins_run(step, self._logged[column + 1]):
                end_s = None  # nobody waited for it, and it was read when there was more to do
            record = StepRecord(
                number=step.number,
                start_s=step.start_s - self._logged[0].start_s,
                program=_program(step.layout, step.is_drawn_apart),
                num_padded_tokens=step.layout.num_tokens * step.layout.depth * (1 + step.layout.num_drafts),
                num_decode_tokens=int(tokens[states == State.DECODE].sum()),
                num_prefill_tokens=int(tokens[states == State.PREFILL].sum()),
                num_cached_tokens=int(self.cached_tokens[:, column].sum()),
                num_waiting=step.num_waiting,
                num_preempted=step.num_preempted,
                num_held_pages=num_held,
                num_cached_pages=num_cached,
                schedule_s=step.schedule_s,
                launch_s=step.launch_s,
                compile_s=step.compile_s,
                read_s=step.read_s,
                output_s=step.output_s,
                took_s=None if end_s is None else end_s - since_s,
            )
            records.append(record)
        return records

    @cached_property
    def _beam_pages(self) -> list[dict[int, list[int]]] | None:
        """By step, those of each beam, by admission; None: there are no beams."""
        if not any(step.beam_pages for step in self._logged):
            return None
        so_far: dict[int, list[int]] = {}
        return [so_far := so_far | dict(step.beam_pages) for step in self._logged]

    def _held(self, column: int) -> dict[int, list[int]]:
        """The pages that each request holds during a step, by its index."""
        step, held = self._logged[column], {}
        beams = {} if self._beam_pages is None else self._beam_pages[column]
        for row, own in self._live(column):
            pages = beams.get(int(step.admissions[row]), own.pages)
            held[self._index[id(own.metrics)]] = pages[: int(step.room[row]) // self.page_size]
        return held

    def pages(self) -> Int[np.ndarray, "pages steps"]:
        """Who had each page during each step: an index into `requests`, or FREE, CACHED or SHARED.

        CACHED pages are held by none and keep what a later request may want; SHARED ones have several
        holders. Page 0 is never handed out. Of a model whose layers have two pools, these are the pages of
        the layers that see every token.
        """
        num_pages = self._pages_before.num_pages
        owners = np.full((num_pages, len(self._logged)), FREE, np.int32)
        known = self._pages_before.copy()
        for column, step in enumerate(self._logged):
            known.take(step.page_changes)
            owners[known.states == CACHED_PAGE, column] = CACHED
            num_holders = np.zeros(num_pages, np.int32)
            for index, pages in self._held(column).items():
                owners[pages, column] = index
                num_holders[pages] += 1
            owners[num_holders > 1, column] = SHARED
        return owners

    def held_pages(self, request: int, step: int) -> list[int]:
        """The pages of `requests[request]` during `steps[step]`, in the order of its tokens."""
        return list(self._held(step).get(request, []))

    def labels(self) -> list[str]:
        """Short names of the requests: what tells their ids apart."""
        ids = [own.request_id for own in self.requests]
        starts = {own[: own.rfind("-") + 1] for own in ids}
        return [own.removeprefix(min(starts)) if len(starts) == 1 else own for own in ids]

    def chart(self, width: int = WIDTH) -> str:
        """The last `width` steps in letters: a line for each request, a column for each step."""
        first, names = max(0, len(self.steps) - width), self.labels()
        margin = max(map(len, [*names, "step"]))
        lines = [f"{'step':>{margin}} {self.steps[first].number} to {self.steps[-1].number}"]
        for name, states, found in zip(
            names, self.states[:, first:], self.cached_tokens[:, first:] > 0, strict=True
        ):
            cells = [
                FOUND if is_found else GLYPHS[State(state)]
                for state, is_found in zip(states, found, strict=True)
            ]
            if states.any():
                lines.append(f"{name:>{margin}} {''.join(cells).rstrip()}")
        return "\n".join([*lines, LEGEND])

    def table(self) -> str:
        """A line for each step: its tokens, its program, and where its time went, in ms."""
        times = ("schedule", "launch", "read", "output", "took")
        head = "step  decode  prefill  cached  waiting  preempted  pages  program             "
        lines = [head + "".join(f"{name:>10}" for name in times)]
        waits = [own.compile_s for own in self.steps[1:]] + [0.0]
        for own, next_wait_s in zip(self.steps, waits, strict=True):
            each_s = [getattr(own, f"{name}_s") for name in times]
            cells = "".join(f"{'-' if s is None else format(1e3 * s, '.2f'):>10}" for s in each_s)
            made = f"  {own.compile_s:.2f} s for its program to be made" if own.compile_s > LONG_S else ""
            made += (
                f"  read {next_wait_s:.2f} s late, behind that of the next" if next_wait_s > LONG_S else ""
            )
            lines.append(
                f"{own.number:4}  {own.num_decode_tokens:6}  {own.num_prefill_tokens:7}  "
                f"{own.num_cached_tokens:6}  {own.num_waiting:7}  {own.num_preempted:9}  "
                f"{own.num_held_pages:5}  {own.program:20}{cells}{made}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<ScheduleRecord of {len(self.requests)} requests in {len(self.steps)} steps>"

    def __str__(self) -> str:
        return f"{self!r}\n{self.chart()}"

    def to_json(self) -> str:
        """All of it as one JSON object. Under "batch", for each step, what each request did in it."""
        batch = []
        for column, step in enumerate(self.steps):
            held = self._held(column)
            batch += [
                {
                    "step": step.number,
                    "request": self.requests[index].request_id,
                    "state": State(self.states[index, column]).name.lower(),
                    "num_tokens": int(self.tokens[index, column]),
                    "num_cached_tokens": int(self.cached_tokens[index, column]),
                    "pages": held.get(index, []),
                }
                for index in np.flatnonzero(self.states[:, column]).tolist()
            ]
        whole = {
            "page_size": self.page_size,
            "num_pages": self._pages_before.num_pages,
            "requests": [asdict(own) for own in self.requests],
            "steps": [asdict(own) for own in self.steps],
            "batch": batch,
        }
        return json.dumps(whole)

    def plot(self) -> Any:
        """A matplotlib Figure: the requests over the steps; beneath, tokens and time of each step.

        Raises:
          ImportError: matplotlib is not installed. This holds for all three pictures.
        """
        return plot_batch(self.labels(), self.steps, self.states, self.tokens, self.cached_tokens)

    def _repr_png_(self) -> bytes | None:
        """How a notebook shows it; without matplotlib, as text."""
        try:
            figure = self.plot()
        except ImportError:
            return None
        figure.savefig(picture := io.BytesIO(), format="png")
        return picture.getvalue()

    def plot_pages(self) -> Any:
        """A Figure of the page pool over the steps: who holds each page."""
        return plot_pages(self.labels(), self.steps, self.pages())

    def plot_latencies(self) -> Any:
        """A Figure of two histograms: the time to the first token, and for each one after it."""
        return plot_latencies(self.requests)


def explain_schedule(log: StepLog, scheduler: Scheduler, num_steps: int | None = None) -> ScheduleRecord:
    """The last `num_steps` of an engine; None: those since it last had nothing to do.

    Raises:
      ValueError: `num_steps` is no positive whole number, or there has been no step yet.
    """
    logged = list(log.steps)
    if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
        raise ValueError(f"num_steps must be a whole number, at least 1, got {num_steps!r:.80}")
    if not logged or log.pages_before is None:
        raise ValueError("there is no step to explain yet: call generate first")
    first = _begin_of_run(logged) if num_steps is None else max(0, len(logged) - num_steps)
    pages = log.pages_before.copy()
    for step in logged[:first]:
        pages.take(step.page_changes)
    waiting = [admission_of(request, request) for request in scheduler.waiting]
    return ScheduleRecord(logged[first:], dict(log.admissions), waiting, pages, scheduler.page_size)


def _begin_of_run(logged: Sequence[LoggedStep]) -> int:
    """The last step before which nothing ran and nothing waited."""
    return next((i for i in range(len(logged) - 1, 0, -1) if _begins_run(logged[i - 1], logged[i])), 0)


def _begins_run(before: LoggedStep, own: LoggedStep) -> bool:
    goes_on = np.isin(own.admissions[own.admissions > 0], before.admissions).any()
    return not goes_on and before.num_waiting == 0


def _owners(
    logged: Sequence[LoggedStep], admissions: Mapping[int, Admission], waiting: Sequence[Admission]
) -> list[Admission]:
    """An admission of each request that is in the steps or waits, in order of arrival."""
    numbers = np.unique(np.concatenate([step.admissions for step in logged]))
    found: dict[int, Admission] = {}
    for own in [*(admissions[number] for number in numbers.tolist() if number), *waiting]:
        found.setdefault(id(own.metrics), own)
    return sorted(found.values(), key=lambda own: own.leader_metrics.arrival_s)


def _states_without_row(metrics: RequestMetrics, logged: Sequence[LoggedStep]) -> UInt8[np.ndarray, " steps"]:
    """What a request does in those steps in which it has no row."""
    starts = np.array([step.start_s for step in logged])
    end_s = np.inf if metrics.finished_s is None else metrics.finished_s
    scheduled_s = np.inf if metrics.scheduled_s is None else metrics.scheduled_s
    states = np.where(starts < scheduled_s, State.WAITING, State.PREEMPTED)
    return np.where((starts >= metrics.arrival_s) & (starts < end_s), states, State.ABSENT).astype(np.uint8)


def _request_record(own: Admission, num_cached: int) -> RequestRecord:
    metrics = own.metrics
    return RequestRecord(
        request_id=own.request_id,
        num_prompt_tokens=own.num_prompt_tokens,
        num_output_tokens=metrics.num_generation_tokens,
        num_cached_tokens=num_cached,
        num_preemptions=metrics.num_preemptions,
        queue_s=metrics.queue_s,
        ttft_s=metrics.ttft_s,
        tpot_s=metrics.tpot_s,
        e2e_s=metrics.e2e_s,
    )


def _program(layout: Layout, is_drawn_apart: bool) -> str:
    """As `decode 8 x4`: eight sequences, four tokens of each."""
    name = f"{'decode' if layout.is_decode else 'mixed'} {layout.num_tokens}"
    name += f" x{layout.depth}" if layout.depth > 1 else ""
    name += f" +{layout.num_drafts} drafts" if layout.num_drafts else ""
    return f"{name}, draw" if is_drawn_apart else name
