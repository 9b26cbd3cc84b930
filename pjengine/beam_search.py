"""Beam search, as the host follows it: which sequences have ended, which is best, when to stop. Plain Python.

The device chooses the candidates and goes on with the best of them (`beam_selection.py`); what it chose comes
here one step late. The rules are those of Hugging Face's `generate(num_beams=W, do_sample=False)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_BEAM_WIDTH = 64  # so that a search has few rows, and its program few candidates


class Node(NamedTuple):
    """A token and what came before it: beams share their beginnings."""

    before: "Node | None"
    token: int


class Hypothesis(NamedTuple):
    """A sequence that has ended."""

    score: float  # the sum of its logprobs, divided by length ** length_penalty
    cumulative_logprob: float
    end: Node
    is_stopped: bool  # by its last token; else it is as long as it may be

    @property
    def token_ids(self) -> list[int]:
        tokens, node = list[int](), self.end
        while True:
            tokens.append(node.token)
            if node.before is None:
                return tokens[::-1]
            node = node.before


class Candidate(NamedTuple):
    """A beam and a token after it."""

    score: float  # the sum of logprobs
    parent: int
    token: int


@dataclass(eq=False, kw_only=True)
class BeamSearch:
    """The search after one prompt. `begin` starts it, again after a preemption."""

    width: int
    max_tokens: int  # of a sequence
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # or "never"
    num_tokens: int = 0  # of each beam
    finished: list[Hypothesis] = field(default_factory=list)  # at most `width`, the best first
    _beams: Sequence[Node | None] = ()

    def begin(self) -> None:
        self.num_tokens = 0
        self.finished = []
        self._beams = [None] * self.width

    def take(self, going_on: list[Candidate], ended: list[Candidate]) -> bool:
        """Takes what a step chose, best first; returns whether the search is over.

        `going_on`: the next beams, by row; minus infinity: none. `ended`: beams with a token that ends them.
        """
        self.num_tokens += 1
        possible = [candidate for candidate in going_on if candidate.score > -math.inf]
        is_last = self.num_tokens == self.max_tokens
        # An end counts if it is among the best `width` of all.
        best = sorted([(c, False) for c in possible] + [(c, True) for c in ended], key=lambda c: -c[0].score)
        for candidate, is_stopped in best[: self.width]:
            if is_stopped or is_last:
                self._finish(candidate, is_stopped)
        self._beams = [Node(self._beams[c.parent], c.token) for c in going_on]
        return is_last or not possible or not self._is_worth_it(possible[0].score)

    def _finish(self, candidate: Candidate, is_stopped: bool) -> None:
        if candidate.score == -math.inf:
            return
        end = Node(self._beams[candidate.parent], candidate.token)
        score = self._normalized(candidate.score, self.num_tokens)
        self.finished.append(Hypothesis(score, candidate.score, end, is_stopped))
        self.finished = sorted(self.finished, key=lambda one: -one.score)[: self.width]

    def _is_worth_it(self, best: float) -> bool:
        """Whether to go on with beams of which the best has this sum of logprobs."""
        if len(self.finished) < self.width:
            return True
        if self.early_stopping is True:
            return False
        is_patient = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens if is_patient else self.num_tokens
        return self._normalized(best, length) > self.finished[-1].score

    def _normalized(self, total: float, length: int) -> float:
        return total / length**self.length_penalty


class BeamStep(NamedTuple):
    """A search's part of one step."""

    request: Any  # the Request that leads it
    admission: int
    kv_len: int  # tokens of each beam that have been computed after the step
    rows: list[int]  # of its beams
    seqs: list[int]  # of those that are in the step; after the prompt it is the first one's alone
    ends: tuple[int, ...]  # tokens that end a sequence
