"""What requests ask to be done to their logits, and the room it takes in a step. Plain Python and numpy.

A step whose requests ask for nothing of this runs a program that knows nothing of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The wishes of one request, resolved to token ids. Empty means: nothing to do."""

    bias: dict[int, float] = field(default_factory=dict)  # added to the logits; -inf forbids
    allowed: tuple[int, ...] = ()  # if any: all others are forbidden
    bad_words: tuple[tuple[int, ...], ...] = ()  # forbidden sequences
    min_tokens: int = 0  # so many outputs before one of `stops`
    stops: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    num_logprobs: int | None = None  # None: none wanted; 0: the chosen token's only
    logprob_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


NO_EDITS = Edits()  # of nearly all requests: compared by identity


@dataclass(frozen=True)
class EditSizes:
    """What a program has room for; nothing in the common one. Powers of two, so programs are few."""

    num_bias: int = 0
    num_allowed: int = 0
    num_bad_words: int = 0
    bad_word_len: int = 0
    has_penalties: bool = False
    num_top: int | None = None  # logprobs; None: none
    num_asked: int = 0
    num_prompt_top: int | None = None

    def covers(self, other: "EditSizes") -> bool:
        """Whether there is room for all that `other` has room for."""
        return all(
            theirs is None or (mine is not None and mine >= theirs)
            for mine, theirs in zip(astuple(self), astuple(other), strict=True)
        )

    def parts(self, num_seqs: int, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what travels in the step's vector."""
        return {
            "bias": (3, self.num_bias),  # sequence, token, float bits
            "allowed": (2, self.num_allowed),  # sequence, token
            "bad_words": (2 + self.bad_word_len, self.num_bad_words),  # sequence, length, tokens
            "penalties": (3, num_seqs if self.has_penalties else 0),  # float bits
            "asked": (num_seqs, self.num_asked),
            "targets": (0 if self.num_prompt_top is None else num_tokens,),
        }


NO_SIZES = EditSizes()


def sizes_of(all_edits: Iterable[Edits], vocab_size: int) -> EditSizes:
    """Room for all of `all_edits` in one step."""
    wanted = [edits for edits in all_edits if edits is not NO_EDITS]
    if not wanted:
        return NO_SIZES

    def top(counts: Sequence[int | None]) -> int | None:
        given = [vocab_size if count == -1 else count for count in counts if count is not None]
        return min(_room(max(given)), vocab_size) if given else None

    return EditSizes(
        num_bias=_room(sum(len(edits.bias) + len(edits.stops) for edits in wanted)),
        num_allowed=_room(sum(len(edits.allowed) for edits in wanted)),
        num_bad_words=_room(sum(len(edits.bad_words) for edits in wanted)),
        bad_word_len=_room(max((len(word) for edits in wanted for word in edits.bad_words), default=0)),
        has_penalties=any(edits.has_penalties for edits in wanted),
        num_top=top([edits.num_logprobs for edits in wanted]),
        num_asked=_room(max(len(edits.logprob_ids) for edits in wanted)),
        num_prompt_top=top([edits.num_prompt_logprobs for edits in wanted]),
    )


def _room(count: int) -> int:
    return 0 if count == 0 else 1 << (count - 1).bit_length()


def pack_edits(
    parts: dict[str, np.ndarray], all_edits: Sequence[tuple[int, Edits, int]], num_seqs: int
) -> None:
    """Writes edits into the vector's parts, each with its sequence and the number of outputs so far."""
    bias: list[tuple[int, int, float]] = []
    allowed: list[tuple[int, int]] = []
    words: list[tuple[int, tuple[int, ...]]] = []
    penalties = np.tile(np.array([[1.0], [0.0], [0.0]], np.float32), (1, parts["penalties"].shape[1]))
    parts["asked"][:] = 0
    for seq, edits, num_outputs in all_edits:
        bias += [(seq, token, value) for token, value in edits.bias.items()]
        if num_outputs < edits.min_tokens:
            bias += [(seq, token, -np.inf) for token in edits.stops]
        allowed += [(seq, token) for token in edits.allowed]
        words += [(seq, word) for word in edits.bad_words]
        if edits.has_penalties:
            penalties[:, seq] = edits.repetition_penalty, edits.frequency_penalty, edits.presence_penalty
        parts["asked"][seq, : len(edits.logprob_ids)] = edits.logprob_ids
    for name, entries in (("bias", bias), ("allowed", allowed)):
        parts[name][:] = num_seqs  # out of range: nothing
        if entries:
            parts[name][:2, : len(entries)] = np.array([entry[:2] for entry in entries], np.int32).T
    parts["bias"][2, : len(bias)] = np.array([value for *_, value in bias], np.float32).view(np.int32)
    parts["bad_words"][:] = num_seqs
    for column, (seq, word) in enumerate(words):
        parts["bad_words"][0, column] = seq
        parts["bad_words"][1, column] = len(word)
        parts["bad_words"][-len(word) :, column] = word  # the last token is the forbidden one
    parts["penalties"][:] = penalties.view(np.int32)
