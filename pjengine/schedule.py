"""What a step computes: the scheduler's answer, the runner's order. Plain Python and numpy."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pjengine.activation_edits import ActivationEdits
from pjengine.beam_search import BeamStep
from pjengine.edits import NEEDS, Edits
from pjengine.page_groups import PageUpdates
from pjengine.request import Request
from pjengine.sampling_params import MAX_PROCESSORS

# In place of a token, where there is none to choose.
BROKEN = -1  # the logits hold NaN
FORBIDDEN = -2  # the request's edits forbid every token
FAILED = -16  # its first logits processor returned NaN; -17: the second, and so on
EMPTIED = FAILED - MAX_PROCESSORS  # its first logits processor forbids every token, and so on
# What a mixed step costs beside its tokens, in tokens: it reads all weights, however few there are.
STEP_COST = 256
_EDITED = NEEDS.index("edited")


class Chunk(NamedTuple):
    """Tokens start to start + length of one request, all known to the host, to be computed in one step."""

    request: Request
    row: int
    admission: int
    start: int
    length: int
    is_sampled: bool  # it reaches the end of the request's tokens, so the next one is sampled
    is_admitted: bool  # the row is new to the request: its parameters must be set


class Decodes(NamedTuple):
    """Rows whose next token is known to the device only, in order of rows."""

    requests: list[Request]
    rows: np.ndarray  # ints, one for each request, as are all below
    admissions: np.ndarray
    # Position of the token to compute first; the last one that it may be, while drafts of the row are unread.
    starts: np.ndarray
    lengths: np.ndarray  # how many: each leads to the next; with drafts, how many at most


@dataclass(frozen=True, slots=True)
class Masks:
    """Which tokens may be sampled in a step, for those of its sequences that have a grammar."""

    seqs: list[int]
    words: np.ndarray  # [seqs, words] of 32 bits: bit i % 32 of word i // 32 says whether token i may come


NO_MASKS = Masks([], np.zeros((0, 0), np.int32))


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: the decodes, then the chunks."""

    decodes: Decodes
    chunks: list[Chunk]
    page_updates: PageUpdates
    needs: np.ndarray  # the room that the edits of all take together, as edits.NEEDS names it
    edits: list[tuple[int, Edits, int]]  # those that travel: sequence, edits, number of outputs before
    masked: list[tuple[int, Request]]  # sequences that sample among what a grammar allows
    refused: list[tuple[Request, str]]  # that were waiting and never can run, and why
    beams: list[BeamStep]
    num_preempted: int = 0
    num_drafts: int = (
        0  # tokens to draft for each row; then `decodes` has bounds, known better once it is read
    )
    has_filters: bool = True  # of a decode: whether a row has top_k, top_p or min_p

    @property
    def chains(self) -> set[Any]:
        """Of functions: the logits processors of its requests, one after the other, and activation edits."""
        processors = {edits.processors for _, edits, _ in self.edits if edits.processors}
        return processors | {own.chain for _, own in self.edited}

    @property
    def edited(self) -> list[tuple[int, ActivationEdits]]:
        """Sequences whose hidden states are changed, and how."""
        if not self.needs[_EDITED]:
            return []
        requests = itertools.chain(self.decodes.requests, (chunk.request for chunk in self.chunks))
        each = ((seq, request.edits.activations) for seq, request in enumerate(requests))
        return [(seq, own) for seq, own in each if own is not None]

    def position(self, seq: int) -> int:
        """Of the token that is sampled for a sequence first."""
        num_decodes = len(self.decodes.requests)
        if seq < num_decodes:
            return int(self.decodes.starts[seq]) + 1
        chunk = self.chunks[seq - num_decodes]
        return chunk.start + chunk.length

    @property
    def num_seqs(self) -> int:
        return len(self.decodes.requests) + len(self.chunks)

    @property
    def num_tokens(self) -> int:
        return int(self.decodes.lengths.sum()) + sum(chunk.length for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        return not self.chunks


@dataclass(slots=True)
class TokenBudget:
    """How many tokens a step has, and may have: fewer, once one of its prompts asks for logprobs."""

    num_taken: int
    limit: int
    prompt_logprob_limit: int
    max_states: int | None = None
    sizes: Sequence[int] = ()  # that steps are padded to
    layers: tuple[int, ...] = ()  # whose hidden states the step keeps

    @property
    def num_left(self) -> int:
        return self.limit - self.num_taken

    def take(self, request: Request, start: int, stop: int) -> int:
        """Takes up to stop - start tokens for a request, and returns how many."""
        if request.edits.layers and start < len(request.prompt_token_ids):
            most = state_limit(self.max_states, len(request.edits.layers), self.sizes)
            if self.num_taken >= (most or self.limit) or self.layers not in ((), request.edits.layers):
                self.limit = (
                    self.num_taken
                )  # nobody goes before it: those that decode end, and it has its turn
                return 0
            self.layers, self.limit = request.edits.layers, min(self.limit, most or self.limit)
        if request.edits.num_prompt_logprobs is not None and start < len(request.prompt_token_ids):
            limit = min(self.limit, self.prompt_logprob_limit)
            if self.num_taken >= limit:
                return 0  # the next step may have room
            self.limit = limit
        length = min(stop - start, self.num_left)
        self.num_taken += length
        return length


def state_limit(max_states: int | None, num_layers: int, sizes: Sequence[int]) -> int | None:
    """Tokens of a step that keeps the hidden states of so many layers: one of `sizes`; None: any number."""
    if max_states is None or not sizes:
        return None
    room = 1 << (num_layers - 1).bit_length()  # as of `EditSizes`
    return max((size for size in sizes if size * room <= max_states), default=sizes[0])


def step_limit(num_wanted: int, num_decodes: int, sizes: Sequence[int]) -> int:
    """How many of the tokens that wait the next mixed step takes, where steps are padded to one of `sizes`.

    All that fit into the largest; but only a smaller step full, if that and one more for the rest cost less
    than the padding would. `num_decodes` of the tokens are in any step.
    """
    if num_wanted >= sizes[-1]:
        return sizes[-1]
    padded = next(size for size in sizes if size >= num_wanted)
    full = max((size for size in sizes if num_decodes < size <= num_wanted), default=padded)
    rest = next((size for size in sizes if size >= num_decodes + num_wanted - full), sizes[-1])
    return full if full + rest + STEP_COST < padded else padded
