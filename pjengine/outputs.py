"""What a caller gets back. Plain Python."""

import time
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RequestMetrics:
    """When things happened to a request, in `time.perf_counter` seconds; None: not yet.

    The engine keeps it up to date while the request runs; an output refers to it, and holds no copy.
    """

    arrival_s: float = field(default_factory=time.perf_counter)
    scheduled_s: float | None = None  # first time it got a row
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_s(self) -> float | None:
        """From arrival, tokenization included, to the first step that ran it."""
        return _between(self.arrival_s, self.scheduled_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, from arrival."""
        return _between(self.arrival_s, self.first_token_s)

    @property
    def prefill_s(self) -> float | None:
        """From the first step to the first token."""
        return _between(self.scheduled_s, self.first_token_s)

    @property
    def decode_s(self) -> float | None:
        """From the first token to the newest; preemptions included."""
        return _between(self.first_token_s, self.last_token_s)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        decode_s = self.decode_s
        if decode_s is None or self.num_generation_tokens < 2:
            return None
        return decode_s / (self.num_generation_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From arrival to the end, however the request ended."""
        return _between(self.arrival_s, self.finished_s)


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s


@dataclass(kw_only=True)
class CompletionOutput:
    """One generated continuation."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "abort"; None while running
    stop_reason: int | str | None = None  # the stop id or string that ended it; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestOutput:
    """A request's prompt and what has been generated for it so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int  # of the prompt, whose pages the prefix cache had
    metrics: RequestMetrics
