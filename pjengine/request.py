"""The host's state of one request. Plain Python."""

import enum
import itertools
import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property

from pjengine.beam_search import BeamSearch
from pjengine.edits import NO_EDITS, Edits
from pjengine.outputs import RequestMetrics
from pjengine.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # no pages, no row; also after preemption
    RUNNING = "running"  # owns a row, and pages for its computed tokens
    FINISHED = "finished"


@dataclass(kw_only=True)
class Request:
    """The host's state of one request.

    Its tokens are the prompt and what the host has read of the output; steps under way may have sampled
    more. While it runs, the scheduler's `RowTable` counts how far it is.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int  # prompt and output together
    eos_token_ids: frozenset[int]  # end it without a reason, but with ignore_eos
    seed: int
    prompt: str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    row: int = -1
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)  # of the window's pool; 0: given back
    priority: int = 0  # lower ones go first
    order: int = -1  # of arrival
    more_eos_token_ids: frozenset[int] = frozenset()  # the same, and are named as the reason
    edits: Edits = NO_EDITS  # what is done to its logits
    salt: str = ""  # requests share cached pages only under the same salt
    fork: str = ""  # names the continuations of one prompt, which share its pages without a prefix cache too
    is_cache_read: bool = True  # take pages that others have computed
    max_cached: int | None = None  # tokens of its beginning in such pages; None: any number
    next_token: int | None = (
        None  # that follows its prompt, if its logprob is wanted with those of the prompt
    )
    page_hashes: list[bytes] = field(default_factory=list)  # of its first full pages
    num_registered: int = 0  # pages, from the first, that the prefix cache has been told of
    num_cached_tokens: int = 0  # of the prompt, found in the cache when first admitted
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    beams: BeamSearch | None = None
    followers: list["Request"] = field(default_factory=list, repr=False)  # the search's other rows

    @property
    def num_known(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def is_watched(self) -> bool:
        """Whether each of its tokens has to be looked at, not only those that end it."""
        is_seen = self.edits.num_logprobs is not None or self.edits.has_mask or self.beams is not None
        return bool(self.params.stop_strings or is_seen)

    @cached_property
    def _silent_ends(self) -> frozenset[int]:
        return frozenset() if self.params.ignore_eos else self.eos_token_ids

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens after any of which it ends."""
        more = frozenset() if self.params.ignore_eos else self.more_eos_token_ids
        return self._silent_ends | more | self.params.stop_ids

    @property
    def row_requests(self) -> list["Request"]:
        """Those that have rows while it runs: of a beam search one for each beam."""
        return [self, *self.followers]

    @property
    def rank(self) -> tuple[int, int]:
        """Lower ranks are admitted first and preempted last."""
        return self.priority, self.order

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Token ids from `start` to `stop` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def append(self, token: int, now: float | None = None) -> None:
        """Takes a sampled token and decides whether it is the last one.

        `now` is `time.perf_counter()`, read once for all the tokens of a step; None: read here.
        """
        now = time.perf_counter() if now is None else now
        self.output_token_ids.append(token)
        metrics = self.metrics
        if metrics.first_token_s is None:
            metrics.first_token_s = now
        metrics.last_token_s = now
        metrics.num_generation_tokens += 1
        if token in self.end_ids:
            self.stop_after(token)
        elif self.num_known >= self.max_total_tokens:
            self.finish("length")

    def stop_after(self, token: int) -> None:
        """Ends it by one of `end_ids`."""
        self.finish("stop", None if token in self._silent_ends else token)

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.status = RequestStatus.FINISHED
        self.metrics.finished_s = time.perf_counter()
        self.finish_reason = reason
        self.stop_reason = stop_reason


_ids = itertools.count()
_PROCESS = secrets.token_hex(4)  # no caller's own id looks like ours by chance


def request_id_for(wanted: str | None) -> str:
    """`wanted`, or a new id.

    Raises:
      TypeError: it is no str.
    """
    if wanted is None:
        return f"request-{_PROCESS}-{next(_ids)}"
    if not isinstance(wanted, str):
        raise TypeError(f"request_id must be a str, got {wanted!r:.80}")
    return wanted
