"""What a request came to, twice: bit for bit the same, or where the two part. Plain Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two runs of a request part for the first time."""

    request: int  # by order of arrival, from 0
    continuation: int | None  # which of its `n`; None: it is about the prompt
    position: int | None  # of the output's tokens, or the prompt's; None: it is about the whole
    what: str
    wanted: Any
    got: Any

    def __str__(self) -> str:
        of = "" if self.continuation is None else f", continuation {self.continuation}"
        at = "" if self.position is None else f" at position {self.position}"
        return f"request {self.request}{of}: {self.what}{at}: wanted {self.wanted!r}, got {self.got!r}"


def first_difference(request: int, wanted: Mapping[str, Any], got: Mapping[str, Any]) -> Difference | None:
    """Compares what `recording.output_of` says of two runs of a request; None: they are the same."""
    completions = zip(wanted["completions"], got["completions"], strict=True)
    for continuation, (own, other) in enumerate(completions):
        for what in ("token_ids", "logprobs", "cumulative_logprob", "finish_reason"):
            if own[what] != other[what]:
                return _difference(request, continuation, what, own[what], other[what])
    for what in ("prompt_logprobs", "hidden_states"):
        if wanted[what] != got[what]:
            return _difference(request, None, what, wanted[what], got[what])
    return None


def _difference(request: int, continuation: int | None, what: str, wanted: Any, got: Any) -> Difference:
    """Where two lists part; of what is no list, the whole."""
    position = None
    if isinstance(wanted, list) and isinstance(got, list):
        position = first_unequal(wanted, got)
        wanted, got = ((own[position] if position < len(own) else None) for own in (wanted, got))
    return Difference(
        request=request, continuation=continuation, position=position, what=what, wanted=wanted, got=got
    )


def first_unequal(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place where two lists differ that are not the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
