"""What requests ask to be done to their logits, and the room they need for it. Plain Python and numpy.

A step whose requests ask for nothing of this runs a program that knows nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pjengine.activation_edits import ActivationEdits


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
    layers: tuple[int, ...] = ()  # whose hidden states are wanted of the prompt, in order
    pooling: str | None = None  # one state of each layer, "mean" or "last"; None: one of each token
    has_mask: bool = False  # what may come depends on all tokens before, and is told with every step
    processors: tuple[Callable[[Any, Any], Any], ...] = ()  # functions of the caller's, one after the other
    activations: ActivationEdits | None = None  # others, of hidden states
    beam_width: int = 0  # of its beam search; 0: none
    beam_ends: tuple[int, ...] = ()  # tokens that end one of its sequences
    leads_beams: bool = True  # it is the first of the search's rows

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def chains(self) -> list[Any]:
        """The caller's functions that a program must have: a chain of processors, one of activation edits."""
        own = (self.processors, None if self.activations is None else self.activations.chain)
        return [chain for chain in own if chain]

    @property
    def travels(self) -> bool:
        """Whether something of them goes to the device with every step."""
        lists = (self.bias, self.allowed, self.bad_words, self.stops, self.logprob_ids, self.processors)
        return any(lists)

    @property
    def needs(self) -> tuple[int, ...]:
        """The room that they take in a step, as NEEDS names it."""

        def top(count: int | None) -> int:
            return 0 if count is None else EVERY_TOKEN if count == -1 else count + 1

        return (
            len(self.bias) + len(self.stops),
            len(self.allowed),
            len(self.bad_words),
            int(self.has_mask),
            int(bool(self.processors)),
            int(self.beam_width > 0),
            int(self.beam_width > 0 and self.leads_beams),
            int(self.activations is not None),
            max((len(word) for word in self.bad_words), default=0),
            int(self.has_penalties),
            top(self.num_logprobs),
            len(self.logprob_ids),
            self.beam_width,
            max(1, len(self.beam_ends)) if self.beam_width else 0,
            top(self.num_prompt_logprobs),
            len(self.layers),
            int(bool(self.layers) and self.pooling is None),
        )


NO_EDITS = Edits()  # of nearly all requests: compared by identity
# What a step needs is the sum of the first eight over its requests, and the largest of the others. Numbers of
# logprobs are one more than asked for; 0: none.
NEEDS = (
    *("bias", "allowed", "bad_words", "masks", "processed", "beams", "beam_searches", "edited"),
    *("bad_word_len", "penalties", "top", "asked", "beam_width", "beam_ends"),
    *("prompt_top", "states", "token_states"),
)
NUM_SUMMED = 8
EVERY_TOKEN = 2**31  # a number of logprobs: those of the whole vocabulary
MAX_ASKED = 128  # tokens that a request may name for their logprobs, whatever max_logprobs says; as in vLLM

_PAST_PROMPTS = np.array([name not in ("prompt_top", "states", "token_states") for name in NEEDS])


def join_needs(needs: np.ndarray) -> np.ndarray:
    """[requests, NEEDS] -> [NEEDS]: the room that all take together."""
    if len(needs) == 0:
        return np.zeros(len(NEEDS), np.int64)
    return np.concatenate([needs[:, :NUM_SUMMED].sum(axis=0), needs[:, NUM_SUMMED:].max(axis=0)])


def without(needs: np.ndarray, *names: str) -> np.ndarray:
    """Without those that are named."""
    return needs * np.array([name not in names for name in NEEDS])


def past_prompts(needs: np.ndarray) -> np.ndarray:
    """Without what only the tokens of prompts need."""
    return needs * _PAST_PROMPTS


def most_logprobs(max_logprobs: int, vocab_size: int) -> int:
    """What an engine's setting allows at each position; -1: the vocabulary."""
    return vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)


def max_asked(max_logprobs: int, vocab_size: int) -> int:
    """How many tokens a request may name for their logprobs."""
    return min(max(MAX_ASKED, most_logprobs(max_logprobs, vocab_size)), vocab_size)
