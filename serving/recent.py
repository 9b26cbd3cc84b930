"""What has happened lately, for those who watch: times of requests, and how busy the engine has been."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pjengine.stats import EngineStats

WINDOW_S = 60.0
_MAX_TIMES = 4096  # of the window
_MAX_SAMPLES = 300  # five minutes
_PERCENTILES = (50, 90, 99)


@dataclass
class Times:
    """Those of the last minute: all, or the newest if there are very many."""

    clock: Callable[[], float] = time.monotonic
    _times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_MAX_TIMES))

    def add(self, seconds: float | None) -> None:
        """Takes one that is known now; None: there is none."""
        if seconds is not None:
            self._times.append((self.clock(), seconds))

    def summary(self) -> dict[str, float | None]:
        """Their number, and their percentiles in seconds."""
        oldest = self.clock() - WINDOW_S
        while self._times and self._times[0][0] < oldest:
            self._times.popleft()
        values = [seconds for _, seconds in self._times]
        found = np.percentile(values, _PERCENTILES).tolist() if values else [None] * len(_PERCENTILES)
        return {"count": len(values), **{f"p{p}": at for p, at in zip(_PERCENTILES, found, strict=True)}}


@dataclass
class Recent:
    """The last minute of requests and the last five of the engine, whose samples are numbered from 0."""

    clock: Callable[[], float] = time.monotonic
    ttft: Times = field(init=False)  # of requests whose first token was seen in the window
    tpot: Times = field(init=False)  # of requests that ended in it
    begun_s: float = field(init=False)
    num_samples: int = 0
    _samples: deque[list[float]] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))
    _before: EngineStats | None = None
    _before_s: float = 0.0

    def __post_init__(self) -> None:
        self.ttft, self.tpot, self.begun_s = Times(self.clock), Times(self.clock), self.clock()

    def sample(self, now: EngineStats) -> None:
        """Takes the engine's numbers, about once a second."""
        before, now_s = self._before, self.clock()
        if before is not None and now_s > self._before_s:
            seconds = now_s - self._before_s
            # Smaller than before: the engine has started over.
            prompt = max(0, now.num_prompt_tokens - before.num_prompt_tokens)
            generation = max(0, now.num_generation_tokens - before.num_generation_tokens)
            self._samples.append(
                [round(prompt / seconds, 1), round(generation / seconds, 1), now.num_running, now.num_waiting]
            )
            self.num_samples += 1
        self._before, self._before_s = now, now_s

    def samples(self, since: int) -> list[list[float]]:
        """From the one numbered `since`: prompt and generation tokens/s, and how many run and wait."""
        num_new = self.num_samples - min(max(since, 0), self.num_samples)
        return list(self._samples)[-num_new:] if num_new else []
