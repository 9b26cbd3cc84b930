"""A load on a server, as many streams as asked for, and the times that its clients see.

Definitions are those of vLLM's `bench serve`. The clock of a request starts when it is sent, once
`max_concurrency` lets it. TTFT ends with its first chunk; E2EL with its last one; ITL are the gaps between
chunks; TPOT = (E2EL - TTFT) / (output tokens - 1), tokens being those of the server's usage. Throughputs
divide by the time from the start of the load to the end of its last request.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from pjengine.serving.http_client import Endpoint, EventParser, RemoteError, error_text

PERCENTILES = {"median": 50.0, "p99": 99.0}
GOALS = ("ttft", "tpot", "e2el")  # that `goodput` may be of
_MAX_ERRORS = 5  # kinds of them, in a result


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One request of the load."""

    content: bytes
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Timing:
    """What a client saw of its request; times are of `time.perf_counter`."""

    start_s: float
    end_s: float = 0.0  # when the answer was complete, or had failed
    chunk_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    error: str | None = None  # None: it was answered

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        return self.chunk_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        gaps = self.num_output_tokens - 1
        return (self.e2el_s - self.ttft_s) / gaps if gaps else None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of a load."""

    timings: Sequence[Timing]  # in the order of the demands
    duration_s: float
    cpu_s: float  # that this process computed for
    latest_s: float  # by which a request was sent after its time came; `max_concurrency` may hold it up


def arrivals(num_requests: int, rate: float | None, seed: int) -> list[float]:
    """Seconds from the start to each request: Poisson, stretched to end at num_requests / rate.

    None: all at once.
    """
    if rate is None:
        return [0.0] * num_requests
    times = np.random.default_rng(seed).exponential(1 / rate, num_requests).cumsum()
    return (times * (num_requests / rate / times[-1])).tolist()


async def run_load(
    endpoint: Endpoint,
    demands: Sequence[Demand],
    due_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    timeout_s: float | None = None,
    show: Callable[[int, int], None] = lambda num_done, total: None,
) -> Load:
    """Sends each demand when it is due; returns when all have been answered or have failed."""
    room = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    timings: list[Timing | None] = [None] * len(demands)
    num_done, latest_s = 0, 0.0

    async def one(index: int) -> None:
        nonlocal num_done
        async with room:
            timings[index] = await send(endpoint, demands[index], timeout_s)
        num_done += 1
        show(num_done, len(demands))

    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for index, due in enumerate(due_s):
            wait_s = begin_s + due - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                wait_s = begin_s + due - time.perf_counter()
            latest_s = max(latest_s, -wait_s)
            group.create_task(one(index))
    return Load(
        timings=[timing for timing in timings if timing is not None],
        duration_s=time.perf_counter() - begin_s,
        cpu_s=time.process_time() - begin_cpu_s,
        latest_s=latest_s,
    )


async def send(endpoint: Endpoint, demand: Demand, timeout_s: float | None = None) -> Timing:
    """One request. While it is answered no more is done than to note when chunks come."""
    timing, parser, last = Timing(time.perf_counter()), EventParser(), b""
    try:
        async with (
            asyncio.timeout(timeout_s),
            endpoint.request("POST", "/completions", demand.content) as reply,
        ):
            async for part in (await reply.check()).parts:
                now = time.perf_counter()
                for data in parser.feed(part):
                    if data != b"[DONE]":
                        timing.chunk_s.append(now)
                        last = data
        _read_usage(timing, last, demand)
    except TimeoutError:
        timing.error = f"no end within {timeout_s:g} s"
    except RemoteError as error:
        timing.error = str(error)
    timing.end_s = time.perf_counter()
    return timing


def _read_usage(timing: Timing, last: bytes, demand: Demand) -> None:
    """Takes the number of tokens from the last event.

    Raises:
      RemoteError: that is an error, or the request was not answered with as many tokens as demanded.
    """
    try:
        event = json.loads(last)
    except ValueError as error:
        raise RemoteError(f"the stream ended with {last[:80]!r}") from error
    if "error" in event:
        raise RemoteError(error_text(last))
    if not (usage := event.get("usage")):
        raise RemoteError("the server told no usage at the end of the stream")
    if not event["choices"]:  # an event for the usage alone is no chunk
        timing.chunk_s.pop()
    told = usage["prompt_tokens"], usage["completion_tokens"]
    wanted = demand.num_prompt_tokens, demand.num_output_tokens
    if told != wanted or not timing.chunk_s:
        raise RemoteError(
            f"wanted {wanted[0]} prompt and {wanted[1]} output tokens, got {told[0]} and {told[1]}"
        )
    timing.num_output_tokens = told[1]


def summarize(
    load: Load, demands: Sequence[Demand], goals_ms: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures of a load: times in ms, of the requests that were answered.

    `goals_ms` are the most that a request may take to count for `goodput_per_s`: by names of GOALS.
    """
    answered = [
        (timing, demand) for timing, demand in zip(load.timings, demands, strict=True) if timing.error is None
    ]
    timings = [timing for timing, _ in answered]
    num_prompt_tokens = sum(demand.num_prompt_tokens for _, demand in answered)
    num_output_tokens = sum(timing.num_output_tokens for timing in timings)
    errors = Counter(timing.error for timing in load.timings if timing.error is not None)
    result: dict[str, Any] = {
        "completed": len(timings),
        "failed": errors.total(),
        "errors": dict(errors.most_common(_MAX_ERRORS)),
        "duration_s": load.duration_s,
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "requests_per_s": len(timings) / load.duration_s,
        "output_tokens_per_s": num_output_tokens / load.duration_s,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / load.duration_s,
        "peak_concurrency": peak_concurrency(load.timings),
        "client_cpu_share": load.cpu_s / load.duration_s,
        "client_late_ms": 1e3 * load.latest_s,
    }
    gaps = [after - before for timing in timings for before, after in pairwise(timing.chunk_s)]
    tpots = [timing.tpot_s for timing in timings if timing.tpot_s is not None]
    result |= _spread("ttft", [timing.ttft_s for timing in timings])
    result |= _spread("tpot", tpots)
    result |= _spread("itl", gaps)
    result |= _spread("e2el", [timing.e2el_s for timing in timings])
    if goals_ms:
        num_good = sum(_is_good(timing, goals_ms) for timing in timings)
        result |= {
            "goodput_goals_ms": dict(goals_ms),
            "goodput_per_s": num_good / load.duration_s,
            "goodput_share": num_good / len(load.timings),
        }
    return result


def _spread(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    values_ms = 1e3 * np.asarray(values_s)
    figures = {"mean": float(values_ms.mean()) if values_s else None}
    for kind, percent in PERCENTILES.items():
        figures[kind] = float(np.percentile(values_ms, percent)) if values_s else None
    return {f"{kind}_{name}_ms": value for kind, value in figures.items()}


def _is_good(timing: Timing, goals_ms: Mapping[str, float]) -> bool:
    taken_s = {"ttft": timing.ttft_s, "tpot": timing.tpot_s or 0.0, "e2el": timing.e2el_s}
    return all(1e3 * taken_s[name] <= most for name, most in goals_ms.items())


def peak_concurrency(timings: Sequence[Timing]) -> int:
    """Most requests that were under way at one moment."""
    changes = [(timing.start_s, 1) for timing in timings] + [(timing.end_s, -1) for timing in timings]
    num_open = most = 0
    for _, change in sorted(changes):  # at the same moment, ends come before starts
        num_open += change
        most = max(most, num_open)
    return most
