"""Log-probabilities as callers get them: by position of the text, and there by token id. Plain Python."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np

from pjengine.edits import Edits

type DecodeToken = Callable[[int], str]


class LogprobArrays(NamedTuple):
    """What a step gave, brought to the host: the fields of `pjengine.logprobs.Logprobs`."""

    chosen: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    top_ids: np.ndarray
    asked: np.ndarray


def to_host(logprobs: Iterable[Any]) -> LogprobArrays:
    return LogprobArrays(*map(np.asarray, logprobs))


class Logprob(NamedTuple):
    """What the model thought of one token at one position, before any edit, temperature or filter."""

    logprob: float
    rank: int | None = None  # 1: the likeliest; None: asked for by id
    decoded_token: str | None = None  # as it reads in the middle of a text


type PositionLogprobs = dict[int, Logprob]  # by token id; the token that is there comes first


class FlatLogprobs(Sequence[PositionLogprobs | None]):
    """A list of `PositionLogprobs` in a few flat arrays, which cost a tenth of the objects.

    Indexing and iterating make the dicts; a slice is a FlatLogprobs again. None: a position without.
    """

    def __init__(self) -> None:
        self.token_ids = array("q")
        self.logprobs = array("d")
        self.ranks = array("q")  # 0: none
        self.decoded_tokens: list[str | None] = []
        self._ends = array("q")

    def append(self, position: PositionLogprobs | None) -> None:
        for token, (logprob, rank, decoded) in (position or {}).items():
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank or 0)
            self.decoded_tokens.append(decoded)
        self._ends.append(len(self.token_ids))

    @overload
    def __getitem__(self, index: int) -> PositionLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...
    def __getitem__(self, index: int | slice) -> "PositionLogprobs | FlatLogprobs | None":
        if isinstance(index, slice):
            return self._part(range(*index.indices(len(self))))
        index = range(len(self))[index]
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        position = {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i] or None, self.decoded_tokens[i])
            for i in range(start, end)
        }
        return position or None

    def _part(self, indices: range) -> "FlatLogprobs":
        part = FlatLogprobs()
        if indices.step != 1:
            for i in indices:
                part.append(self[i])
        elif indices:  # the arrays as they are, without dicts
            start, end = self._ends[indices.start - 1] if indices.start else 0, self._ends[indices[-1]]
            part.token_ids, part.logprobs = self.token_ids[start:end], self.logprobs[start:end]
            part.ranks, part.decoded_tokens = self.ranks[start:end], self.decoded_tokens[start:end]
            part._ends = array("q", [at - start for at in self._ends[indices.start : indices.stop]])
        return part

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[PositionLogprobs | None]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatLogprobs) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # it grows


type LogprobsList = list[PositionLogprobs] | list[PositionLogprobs | None] | FlatLogprobs


def position_logprobs(
    arrays: LogprobArrays,
    row: int,
    token: int,
    num_top: int,
    asked_ids: Sequence[int],
    decode: DecodeToken | None,
) -> PositionLogprobs:
    """One row of what a step gave: the token itself, the `num_top` likeliest (-1: all), those asked for."""
    end = None if num_top == -1 else num_top
    top_ids = arrays.top_ids[row, :end].tolist()
    ids = [token, *top_ids, *asked_ids]
    logprobs = [
        arrays.chosen[row].item(),
        *arrays.top[row, :end].tolist(),
        *arrays.asked[row, : len(asked_ids)].tolist(),
    ]
    ranks = [arrays.rank[row].item(), *range(1, len(top_ids) + 1), *[None] * len(asked_ids)]
    position: PositionLogprobs = {}
    for token_id, logprob, rank in zip(ids, logprobs, ranks, strict=True):
        if token_id not in position:
            position[token_id] = Logprob(logprob, rank, decode(token_id) if decode else None)
    return position


@dataclass
class OutputLogprobs:
    """Those of one continuation, growing with it."""

    edits: Edits
    is_flat: bool
    decode: DecodeToken | None
    positions: list[PositionLogprobs] | FlatLogprobs = field(init=False)
    cumulative: float = 0.0  # of the chosen tokens

    def __post_init__(self) -> None:
        self.positions = FlatLogprobs() if self.is_flat else []

    def add(self, arrays: LogprobArrays, row: int, token: int) -> None:
        """Takes the logprobs of a token, from its row of what a step gave."""
        num_top = self.edits.num_logprobs
        assert num_top is not None
        position = position_logprobs(arrays, row, token, num_top, self.edits.logprob_ids, self.decode)
        self.positions.append(position)
        self.cumulative += position[token].logprob


@dataclass
class PromptLogprobs:
    """Those of one prompt, filled in as its chunks are computed."""

    token_ids: list[int]
    num_top: int  # -1: the vocabulary
    is_flat: bool
    decode: DecodeToken | None
    first: int = 1  # position whose logprobs are wanted; that of 0 has nothing before it
    _parts: dict[int, LogprobArrays] = field(default_factory=dict)  # by their first position
    _num_known: int = field(init=False)  # positions, those before `first` among them
    _result: LogprobsList | None = None

    def __post_init__(self) -> None:
        self._num_known = self.first

    def put(self, start: int, arrays: LogprobArrays, first_row: int, length: int) -> None:
        """Takes what a step gave for the tokens from `start`: row t is about the token after it.

        A chunk computed again, after a preemption, is passed over.
        """
        end = min(start + length + 1, len(self.token_ids))
        skipped = self._num_known - (start + 1)  # known already
        if end <= self._num_known or skipped < 0:
            return
        rows = slice(first_row + skipped, first_row + end - (start + 1))
        # Copies: the arrays of the whole step would live as long as this part.
        self._parts[self._num_known] = LogprobArrays(*(np.array(array[rows]) for array in arrays))
        self._num_known = end

    def result(self) -> LogprobsList | None:
        """By position, those before `first` being None; None as long as the prompt is not computed."""
        if self._result is None and self._num_known == len(self.token_ids):
            result: list[PositionLogprobs | None] | FlatLogprobs = FlatLogprobs() if self.is_flat else []
            for _ in range(self.first):
                result.append(None)
            for start, arrays in self._parts.items():
                for row in range(len(arrays.chosen)):
                    token = self.token_ids[start + row]
                    result.append(position_logprobs(arrays, row, token, self.num_top, (), self.decode))
            self._result = result
            self._parts.clear()
        return self._result

    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Logprobs and ranks of the tokens from `first` on, as far as they are computed.

        Before `result`, which costs more.
        """
        empty = (np.zeros(0, np.float32), np.zeros(0, np.int32))
        arrays = list(self._parts.values())  # before the result, which another thread may put in their place
        if self._result is not None:
            own = zip(self.token_ids, self._result, strict=True)
            found = [position[token][:2] for token, position in own if position is not None]
            return np.array([own for own, _ in found], np.float32), np.array(
                [own for _, own in found], np.int32
            )
        parts = [empty, *((part.chosen, part.rank) for part in arrays)]
        logprobs, ranks = (np.concatenate(kind) for kind in zip(*parts, strict=True))
        return logprobs, ranks
