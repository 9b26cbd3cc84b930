"""Functions of the caller's that change the hidden states of their own request. Plain Python and numpy.

`call_activation_edits.py` checks them, and calls them on the device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

MAX_ACTIVATION_EDITS = 64  # of one request
MAX_EDIT_WORDS = 65_536  # numbers in the args of one edit: each token of a step gets a copy of them
MAX_WORDS = 262_144  # in those of one request: a step has room for as many of each


class EditedToken(NamedTuple):
    """Whose hidden state it is: int32 scalars."""

    token_id: Any
    position: Any  # 0: the first of the prompt
    prompt_len: Any  # tokens; where `position` is not less, the token is one of the output


@dataclass(frozen=True, eq=False)
class ActivationEdit:
    """A change of the hidden states of one request, at one place on their way through the layers.

    `function(state, token, *args)` gets the state of one token, float32 [width], the `EditedToken` that says
    which, and `args`; it returns another state of the same shape and dtype. JAX traces it, and requests whose
    edits have the same functions at the same layers, with args of the same shapes, share a program: what
    differs from request to request, as a direction and its strength, belongs into `args`.

    Layers are numbered as `HiddenStatesParams` does: 0 is what goes into the first layer, i what layer i has
    made of it (from 1). Of the last layer, -1, it is changed before the last norm.

    Raises:
      ValueError: a field has the wrong type; the text names field and value.
    """

    layer: int
    function: Callable[..., Any]
    args: Sequence[Any] = ()  # pytrees of numbers and arrays, which come as float32, int32 or bool

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int) or isinstance(self.layer, bool):
            raise ValueError(f"layer must be a whole number, got {self.layer!r:.80}")
        if not callable(self.function):
            raise ValueError(f"function must take (state, token, *args), got {self.function!r:.80}")
        if not isinstance(self.args, list | tuple):
            raise ValueError(f"args must be a list or a tuple, one item an argument, got {self.args!r:.80}")


class EditForm(NamedTuple):
    """What of an edit is part of a program."""

    layer: int  # counted from the first
    function: Callable[..., Any]
    tree: Any  # of its args
    leaves: tuple[tuple[tuple[int, ...], str], ...]  # shapes and dtypes of the arrays in them

    @property
    def num_words(self) -> int:
        return sum(int(np.prod(shape)) for shape, _ in self.leaves)

    @property
    def name(self) -> str:
        """As an error calls it."""
        own = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"{own:.80} at layer {self.layer}"


@dataclass(frozen=True)
class EditChain:
    """The forms of one request's edits, in their order."""

    forms: tuple[EditForm, ...]

    @property
    def num_words(self) -> int:
        return sum(form.num_words for form in self.forms)

    def at(self, layer: int) -> list[tuple[EditForm, int]]:
        """Those at a layer, and where their args begin among the words of the request."""
        ends = np.cumsum([form.num_words for form in self.forms]).tolist()
        starts = [0, *ends[:-1]]
        return [own for own in zip(self.forms, starts, strict=True) if own[0].layer == layer]


@dataclass(frozen=True, eq=False)
class ActivationEdits:
    """All of one request, checked. The same only if it is the same object."""

    chain: EditChain
    words: np.ndarray  # int32: the bits of all args, one after the other

    @property
    def why_no_number(self) -> str:
        """The error of a request whose logits are NaN."""
        names = ", ".join(form.name for form in self.chain.forms)
        return (
            f"the logits are not a number (NaN) behind activation_edits ({names}): one of them returned NaN "
            "or infinity, or states so large that the layers behind overflow. Check what it returns, or "
            "lower its strength"
        )


@dataclass(frozen=True)
class EditRoom:
    """What a program with the model has room for."""

    chains: tuple[EditChain, ...]
    num_slots: int  # sequences with edits; a power of two

    @cached_property
    def num_words(self) -> int:
        """Of each slot."""
        return max(chain.num_words for chain in self.chains)

    def covers(self, other: "EditRoom") -> bool:
        """Whether there is room for all that `other` has room for."""
        return set(other.chains).issubset(self.chains) and self.num_slots >= other.num_slots


def room_for(num_edited: int, chains: Iterable[Any]) -> EditRoom | None:
    """The room for so many sequences whose edits are among `chains`; None: none needs any."""
    own = sorted((chain for chain in chains if isinstance(chain, EditChain)), key=hash)
    if not own or num_edited == 0:
        return None
    return EditRoom(tuple(own), 1 << (num_edited - 1).bit_length())


def pack_edited(part: np.ndarray, edited: Sequence[tuple[int, ActivationEdits]], room: EditRoom) -> None:
    """Writes into `part`, [2, seqs], which chain and which slot each sequence has; -1: none."""
    part[:] = -1
    for slot, (seq, own) in enumerate(edited):
        part[:, seq] = room.chains.index(own.chain), slot


class SentWords(NamedTuple):
    """The args of a step's edits as they are on the device."""

    edits: tuple[ActivationEdits, ...]  # by slot
    array: Any


def words_by_slot(edits: Sequence[ActivationEdits], room: EditRoom) -> np.ndarray:
    """int32 [slots, words]."""
    table = np.zeros((room.num_slots, room.num_words), np.int32)
    for slot, own in enumerate(edits):
        table[slot, : len(own.words)] = own.words
    return table
