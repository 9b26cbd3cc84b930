"""What a caller gets back. Plain Python."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class RequestMetrics:
    """When things happened to a request, in `time.perf_counter` seconds."""

    arrival_s: float
    scheduled_s: float | None = None  # first time it got a row
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, from arrival."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


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
    metrics: RequestMetrics
