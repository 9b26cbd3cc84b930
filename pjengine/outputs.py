"""What a caller gets back. Plain Python."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pjengine.token_logprobs import LogprobsList


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
    engine_index: int = 0  # which of `data_parallel_size` engines has it

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
class MergedMetrics(RequestMetrics):
    """Those of several continuations, which take their tokens beside each other."""

    mean_tpot_s: float | None  # over all tokens that are not the first of theirs

    @property
    def tpot_s(self) -> float | None:
        return self.mean_tpot_s


def merge_metrics(parts: Sequence[RequestMetrics]) -> RequestMetrics:
    """Those of a request from those of its continuations: first and last times, and sums."""
    if len(parts) == 1:
        return parts[0]
    # Last things first: whatever another thread writes meanwhile, the times follow each other.
    ends = [part.finished_s for part in parts if part.finished_s is not None]
    last_tokens = [part.last_token_s for part in parts if part.last_token_s is not None]
    later = [
        (decode_s, part.num_generation_tokens - 1)
        for part in parts
        if part.num_generation_tokens > 1 and (decode_s := part.decode_s) is not None
    ]
    first_tokens = [part.first_token_s for part in parts if part.first_token_s is not None]
    starts = [part.scheduled_s for part in parts if part.scheduled_s is not None]
    return MergedMetrics(
        arrival_s=min(part.arrival_s for part in parts),
        scheduled_s=min(starts, default=None),
        first_token_s=min(first_tokens, default=None),
        last_token_s=max(last_tokens, default=None),
        finished_s=max(ends) if len(ends) == len(parts) else None,
        num_generation_tokens=sum(part.num_generation_tokens for part in parts),
        num_preemptions=sum(part.num_preemptions for part in parts),
        engine_index=parts[0].engine_index,
        mean_tpot_s=sum(decode_s for decode_s, _ in later) / sum(n for _, n in later) if later else None,
    )


@dataclass(kw_only=True)
class CompletionOutput:
    """One generated continuation."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # of all its tokens, where logprobs are asked for
    logprobs: LogprobsList | None = None  # one entry for each of `token_ids`
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while running
    stop_reason: int | str | None = None  # the stop id or string, or the error; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestOutput:
    """A request's prompt and what has been generated for it; how much of it, `output_kind` says."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: LogprobsList | None = None  # one entry for each token; the first is None
    # float32 [layers, tokens, width], or pooled [layers, width]; None: not asked for, or not computed yet
    hidden_states: np.ndarray | None = None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int  # of the prompt, whose pages the prefix cache had
    metrics: RequestMetrics
