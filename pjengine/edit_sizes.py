"""The room for edits in a step's program, and how they are written into it. Plain Python and numpy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from pjengine.beam_search import BeamStep
from pjengine.edits import NEEDS, Edits
from pjengine.processors import Chain
from pjengine.schedule import Masks

OUT_OF_RANGE = 2**30  # of sequences, rows and tokens: stands for nothing


@dataclass(frozen=True)
class EditSizes:
    """What a program has room for; nothing in the common one. Powers of two, so programs are few."""

    num_bias: int = 0
    num_allowed: int = 0
    num_bad_words: int = 0
    num_masks: int = 0
    mask_words: int = 0  # of 32 tokens each
    bad_word_len: int = 0
    has_penalties: bool = False
    num_top: int | None = None  # logprobs; None: none
    num_asked: int = 0
    num_processed: int = 0  # sequences with logits processors
    chains: tuple[Chain, ...] = ()  # that any of these may have
    num_beams: int = 0  # of all searches together
    num_beam_searches: int = 0
    beam_width: int = 0
    num_beam_ends: int = 0

    @property
    def can_forbid(self) -> bool:
        return bool(self.num_bias or self.num_allowed or self.num_bad_words or self.num_masks)

    def covers(self, other: "EditSizes") -> bool:
        """Whether there is room for all that `other` has room for."""
        if not set(other.chains).issubset(self.chains):
            return False
        for name in _NUMBERS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None and (mine is None or mine < theirs):
                return False
        return True

    def within(self, num_seqs: int) -> "EditSizes":
        """The same for a program that holds so many sequences."""
        return self if self.num_masks <= num_seqs else replace(self, num_masks=num_seqs)

    def parts(self, num_seqs: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what travels in the program's vector."""
        return {
            "bias": (3, self.num_bias),  # sequence, token, float bits
            "allowed": (2, self.num_allowed),  # sequence, token
            "bad_words": (2 + self.bad_word_len, self.num_bad_words),  # sequence, length, tokens
            "mask_of": (num_seqs if self.num_masks else 0,),  # which of the masks; num_masks: none
            "masks": (self.num_masks, self.mask_words),  # a bit for each token
            "asked": (num_seqs, self.num_asked),
            "processed": (2, self.num_processed),  # sequence, number of its chain
            "beam_seqs": (self.num_beams,),
            "beam_ends": (self.num_beams, self.num_beam_ends),
            "beam_of": (self.num_beam_searches, self.beam_width),  # by search: which of `beam_seqs`
            "beam_rows": (self.num_beam_searches, self.beam_width),
        }


NO_SIZES = EditSizes()
_NUMBERS = [own.name for own in fields(EditSizes) if own.name != "chains"]


def sizes_for(needs: np.ndarray, vocab_size: int, chains: Iterable[Chain] = ()) -> EditSizes:
    """The program for a step that needs so much room: every number the next power of two.

    `chains` are those of all its requests.
    """
    bias, allowed, bad_words, masks, processed, beams, beam_searches, _, *largest = needs.tolist()
    bad_word_len, penalties, top, asked, beam_width, beam_ends, *_ = largest
    return EditSizes(
        num_bias=_room(bias),
        num_allowed=_room(allowed),
        num_bad_words=_room(bad_words),
        num_masks=_room_for_masks(masks),
        mask_words=-(-vocab_size // 32) if masks else 0,
        bad_word_len=_room(bad_word_len),
        has_penalties=bool(penalties),
        num_top=_room_for_top(top, vocab_size),
        num_asked=min(_room(asked), vocab_size),
        num_processed=_room(processed),
        chains=tuple(sorted(chains, key=hash)),  # the same ones are the same program
        num_beams=_room(beams),
        num_beam_searches=_room(beam_searches),
        beam_width=_room(beam_width),
        num_beam_ends=_room(beam_ends),
    )


def prompt_top_for(needs: np.ndarray, vocab_size: int) -> int | None:
    """The same for the likeliest tokens of each position of a prompt; None: none are asked for."""
    return _room_for_top(int(needs[NEEDS.index("prompt_top")]), vocab_size)


def num_states_for(needs: np.ndarray) -> int:
    """The same for the layers whose hidden states are kept of a prompt."""
    return _room(int(needs[NEEDS.index("states")]))


def has_token_states(needs: np.ndarray) -> bool:
    """Whether the states of each token are asked for, not only pooled ones."""
    return bool(needs[NEEDS.index("token_states")])


def _room_for_top(count: int, vocab_size: int) -> int | None:
    """`count` as in `edits.NEEDS`."""
    return min(_room(count - 1), vocab_size) if count else None


def _room(count: int) -> int:
    return 0 if count == 0 else 1 << (count - 1).bit_length()


def _room_for_masks(count: int) -> int:
    """Powers of four: what stays empty is soon uploaded, and another program takes long to make."""
    room = 4 if count else 0
    while room < count:
        room *= 4
    return room


def pack_edits(
    parts: dict[str, np.ndarray],
    all_edits: Sequence[tuple[int, Edits, int]],
    num_seqs: int,
    chains: Sequence[Chain] = (),
) -> None:
    """Writes edits into the vector's parts, each with its sequence and the number of outputs so far.

    `chains` are those of the program.
    """
    bias: list[tuple[int, int, float]] = []
    allowed: list[tuple[int, int]] = []
    words: list[tuple[int, tuple[int, ...]]] = []
    parts["asked"][:] = 0
    for seq, edits, num_outputs in all_edits:
        bias += [(seq, token, value) for token, value in edits.bias.items()]
        if num_outputs < edits.min_tokens:
            bias += [(seq, token, -np.inf) for token in edits.stops]
        allowed += [(seq, token) for token in edits.allowed]
        words += [(seq, word) for word in edits.bad_words]
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
    numbers = {chain: number for number, chain in enumerate(chains)}
    processed = [(seq, numbers[edits.processors]) for seq, edits, _ in all_edits if edits.processors]
    parts["processed"][:] = num_seqs
    if processed:
        parts["processed"][:, : len(processed)] = np.array(processed, np.int32).T


def pack_beams(parts: dict[str, np.ndarray], steps: Sequence[BeamStep]) -> None:
    """Writes which sequences are beams, of which searches, and what ends them."""
    for name in ("beam_seqs", "beam_ends", "beam_of", "beam_rows"):
        parts[name][:] = OUT_OF_RANGE
    first = 0
    for index, step in enumerate(steps):
        end = first + len(step.seqs)
        parts["beam_seqs"][first:end] = step.seqs
        parts["beam_ends"][first:end, : len(step.ends)] = step.ends
        parts["beam_of"][index, : len(step.seqs)] = np.arange(first, end)
        parts["beam_rows"][index, : len(step.rows)] = step.rows
        first = end


def pack_masks(parts: dict[str, np.ndarray], masks: Masks) -> None:
    """Writes masks into the vector's parts."""
    parts["mask_of"][:] = len(parts["masks"])
    if masks.seqs:
        parts["mask_of"][masks.seqs] = np.arange(len(masks.seqs))
        parts["masks"][: len(masks.seqs)] = masks.words
