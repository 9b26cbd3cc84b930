"""What a caller asks for and gets back, and the host's state of one request. Plain Python."""

import enum
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

GREEDY_EPSILON = 1e-5  # temperatures below it mean: take the likeliest token
MIN_TEMPERATURE = 0.01  # smaller ones overflow the scaled logits


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request.

    Raises:
      ValueError: a field is out of its range; the text names field, value and range.
      TypeError: a field has the wrong type.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    min_p: float = 0.0  # keep tokens at least this likely, relative to the likeliest
    seed: int | None = None  # None: drawn from the engine's own seed
    max_tokens: int | None = 16  # None: up to max_model_len
    stop: str | Sequence[str] | None = None  # generation ends before any of these; not part of the text
    stop_token_ids: Sequence[int] | None = None  # generation ends after any of these
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        in_range = {
            "temperature": (0 <= self.temperature <= 2, "in [0, 2]"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 or -1 to keep all tokens"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": (self.seed is None or -1 <= self.seed < 2**63, "in [0, 2**63), or -1 or None for any"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "stop": ("" not in self.stop_strings, "free of empty strings"),
        }
        for name, (is_valid, wanted) in in_range.items():
            if not is_valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: they need detokenize=True")

    def _check_types(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("temperature", "top_p", "min_p"), (int, float)),
            "top_k": (int,),
            **dict.fromkeys(("seed", "max_tokens"), (int, type(None))),
            **dict.fromkeys(("ignore_eos", "detokenize", "skip_special_tokens"), (bool,)),
            "stop": (str, list, tuple, type(None)),
            "stop_token_ids": (list, tuple, set, frozenset, type(None)),
        }
        for name, types in wanted.items():
            value = getattr(self, name)
            is_flag = isinstance(value, bool) and bool not in types  # True is an int to Python, not to us
            if not isinstance(value, types) or is_flag:
                names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
                raise TypeError(f"{name} must be {names}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        for name, items, item_type in (("stop", self.stop_strings, str), ("stop_token_ids", self.stop_ids, int)):
            for item in items:
                if not isinstance(item, item_type) or isinstance(item, bool):
                    raise TypeError(f"{name} must hold {item_type.__name__}, got {item!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.stop_token_ids or ())

    @property
    def effective_temperature(self) -> float:
        """0 when greedy; never so small that scaled logits overflow."""
        return 0.0 if self.temperature < GREEDY_EPSILON else max(self.temperature, MIN_TEMPERATURE)


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # no pages, no row; also after preemption
    RUNNING = "running"  # owns a row, and pages for its computed tokens
    FINISHED = "finished"


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
class Request:
    """The host's state of one request.

        prompt             output                pending
        |------------------|---------------------|-------|
        0                                num_known      num_tokens
        |------ num_computed: their K and V are, or will be, in the pages -----|

    Pending tokens are sampled by steps whose result the host has not read yet: only the device
    knows them. `epoch` counts preemptions; a result of an older epoch is thrown away.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int  # prompt and output together
    eos_token_ids: frozenset[int]
    seed: int
    prompt: str | None = None
    arrival_s: float = field(default_factory=time.perf_counter)
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    row: int = -1
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    epoch: int = 0
    is_decoding: bool = False  # the row on the device holds its last token
    metrics: RequestMetrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(arrival_s=self.arrival_s)

    @property
    def num_known(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known + self.num_pending

    @property
    def num_to_compute(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def is_at_limit(self) -> bool:
        """The pending tokens complete it: nothing more to schedule."""
        return self.num_tokens >= self.max_total_tokens

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Token ids from `start` to `stop` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def append(self, token: int) -> None:
        """Takes a sampled token and decides whether it is the last one."""
        now = time.perf_counter()
        self.output_token_ids.append(token)
        self.metrics.first_token_s = self.metrics.first_token_s or now
        self.metrics.last_token_s = now
        if token in self.params.stop_ids:
            self.finish("stop", token)
        elif token in self.eos_token_ids and not self.params.ignore_eos:
            self.finish("stop")
        elif self.num_known >= self.max_total_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason


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


_ids = itertools.count()


def new_request_id() -> str:
    return f"request-{next(_ids)}"
