"""Hidden states of prompts: which are wanted, and how they are put together from steps. Plain Python."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

POOLINGS = ("mean", "last")


@dataclass(frozen=True, kw_only=True)
class HiddenStatesParams:
    """Which hidden states of a prompt a request wants.

    They are numbered as Hugging Face's `output_hidden_states`: 0 is what goes into the first layer, i what
    layer i of n has made of it, and n has been through the last norm, too; -1 is n, -2 the one before.

    Raises:
      ValueError: a field has the wrong type or an unknown value; the text names field, value and range.
    """

    layers: Sequence[int] = (-1,)
    pooling: str | None = None  # one for the prompt: "mean" of its tokens, or the "last" one's. None: all

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ValueError(f"layers must be a list of at least one number, got {self.layers!r:.80}")
        for layer in self.layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise ValueError(f"layers must hold whole numbers, got {layer!r:.80}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be 'mean', 'last' or None, got {self.pooling!r:.80}")

    def numbers(self, num_layers: int) -> tuple[int, ...]:
        """The layers, counted from the first.

        Raises:
          ValueError: there is no such layer.
        """
        for layer in self.layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(
                    f"layers must be within [{-num_layers - 1}, {num_layers}] with this model, "
                    f"got {layer!r:.80}"
                )
        return tuple(layer % (num_layers + 1) for layer in self.layers)


class StateArrays(NamedTuple):
    """What a step gave, brought to the host: the fields of `pjengine.pooling.StepStates`."""

    pooled: np.ndarray
    tokens: np.ndarray | None


def states_to_host(states: Iterable[Any]) -> StateArrays:
    pooled, tokens = states
    return StateArrays(np.asarray(pooled), None if tokens is None else np.asarray(tokens))


@dataclass
class PromptStates:
    """Those of one prompt, put together as its chunks are computed."""

    num_tokens: int
    places: list[int]  # of the layers wanted, among those that come
    pooling: str | None
    _parts: list[np.ndarray] = field(default_factory=list)
    _num_known: int = 0  # tokens
    _result: np.ndarray | None = None

    def put(self, start: int, length: int, arrays: StateArrays, seq: int, row: int) -> None:
        """Takes what a step gave for `length` tokens from `start`: of its sequence `seq`, from `row` on."""
        if self._result is not None:
            return  # computed again, after a preemption
        if self.pooling == "last":
            if start + length == self.num_tokens:
                self._result = arrays.pooled[self.places, seq].astype(np.float32)
            return
        if start == 0:  # from the beginning, for the first time or after a preemption
            self._parts.clear()
            self._num_known = 0
        if start != self._num_known:
            return  # under way when the request was preempted
        self._num_known += length
        if self.pooling == "mean":
            total = arrays.pooled[self.places, seq].astype(np.float64)
            self._parts = [total + self._parts[0] if self._parts else total]
        else:
            assert arrays.tokens is not None
            self._parts.append(arrays.tokens[:, row : row + length][self.places].astype(np.float32))
        if self._num_known == self.num_tokens:
            self._result = self._whole()
            self._parts.clear()

    def _whole(self) -> np.ndarray:
        if self.pooling == "mean":
            return (self._parts[0] / self.num_tokens).astype(np.float32)
        return np.concatenate(self._parts, axis=1)

    def result(self) -> np.ndarray | None:
        """float32 [layers, tokens, width], or pooled [layers, width]; None until the prompt is computed."""
        return self._result
