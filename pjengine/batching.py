"""A schedule -> one int32 vector -> the Batch and the row updates of one step.

`Layout` names the parts of the vector; the host packs by it, the device unpacks by it, so that the model's
program costs a single upload.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pjengine.activation_edits import EditRoom, pack_edited
from pjengine.models.state import Batch
from pjengine.schedule import Chunk, Schedule

# What a row is told about its request when it is admitted.
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FLOAT_FIELDS = ("temperature", "top_p", "min_p", *PENALTIES)
# `top_k`: the vocabulary's size keeps all. `temperature`: 0 is greedy.
ROW_FIELDS = ("prompt_len", "seed_high", "seed_low", "top_k", *FLOAT_FIELDS)
SAMPLED_BY = ("seed_high", "seed_low", "temperature", "top_k", "top_p", "min_p")
NO_LAYER = 2**30  # in place of a layer's number
# In place of a token id or a position: those of the row's last token, known to the device only.
FROM_DEVICE = -1


class Rows(NamedTuple):
    """What the device knows of each running request, by row; donated through every step."""

    last_token: Int[Array, " rows"]  # the token to compute next, while decoding
    position: Int[Array, " rows"]  # its position
    beam_score: Float[Array, " rows"]  # in a beam search: the sum of the logprobs of its output
    told: Int[Array, "rows fields"]  # ROW_FIELDS: one array, since each costs the host time in every step
    page_table: Int[Array, "rows columns"]  # where layers have windows, their columns follow the others

    @classmethod
    def empty(cls, num_rows: int, num_columns: int) -> "Rows":
        return cls(
            last_token=jnp.zeros(num_rows, jnp.int32),
            position=jnp.zeros(num_rows, jnp.int32),
            beam_score=jnp.zeros(num_rows, jnp.float32),
            told=jnp.zeros((num_rows, len(ROW_FIELDS)), jnp.int32),
            page_table=jnp.zeros((num_rows, num_columns), jnp.int32),
        )

    def field(self, name: str) -> Int[Array, " rows"] | Float[Array, " rows"]:
        """One of ROW_FIELDS; floats are kept as their bits."""
        bits = self.told[:, ROW_FIELDS.index(name)]
        return jax.lax.bitcast_convert_type(bits, jnp.float32) if name in FLOAT_FIELDS else bits


class Vector(ABC):
    """How an int32 vector is divided that goes up to the device."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Their shapes, in order."""

    @cached_property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.parts.values())

    def split[T: (np.ndarray, Array)](self, blob: T) -> dict[str, T]:
        """Views of the parts."""
        views, offset = {}, 0
        for name, shape in self.parts.items():
            length = int(np.prod(shape))
            views[name] = blob[offset : offset + length].reshape(shape)
            offset += length
        return views


@dataclass(frozen=True)
class Layout(Vector):
    """A program with the model. Rows that stand for nothing are `num_rows`, out of range."""

    num_tokens: int  # the program's bucket
    num_rows: int
    page_size: int
    is_decode: bool
    depth: int = 1  # tokens computed of each sequence, one after the other; more than one in decodes alone
    num_groups: int = 1  # of KV pages; 2: some layers see a window only
    ends_in_logits: bool = False  # another program draws the tokens
    num_prompt_top: int | None = None  # logprobs of prompts, where it ends in logits; None: none
    num_states: int = 0  # layers whose hidden states are kept of prompts, where it ends in logits
    has_token_states: bool = False  # those of each token come down, not only pooled ones
    num_drafts: int = 0  # tokens of each sequence that are verified beside its last one, in decodes alone
    has_filters: bool = True  # top_k, top_p, min_p; it has none only where devices divide the vocabulary
    edit_room: EditRoom | None = None  # for activation edits, where it ends in logits; None: none

    @property
    def num_seqs(self) -> int:
        return min(self.num_tokens, self.num_rows)

    @property
    def num_sampled(self) -> int:
        """Tokens that it samples, or has logits for: of each sequence one, and one after each draft."""
        return self.num_seqs * (1 + self.num_drafts)

    @property
    def max_page_updates(self) -> int:
        return self.parts["page_updates"][1]

    @property
    def depends_on_edits(self) -> bool:
        """Whether requests ask for something that only few programs have."""
        return self.num_prompt_top is not None or self.num_states > 0 or self.edit_room is not None

    def covers(self, other: "Layout") -> bool:
        """Whether a step that `other` was chosen for may run as this one."""
        kind, wanted = (
            (own.is_decode, own.depth, own.ends_in_logits, own.num_drafts) for own in (self, other)
        )
        if kind != wanted or self.num_tokens < other.num_tokens or self.has_filters < other.has_filters:
            return False
        if self.num_states < other.num_states or self.has_token_states < other.has_token_states:
            return False
        if other.edit_room is not None and (
            self.edit_room is None or not self.edit_room.covers(other.edit_room)
        ):
            return False
        return other.num_prompt_top is None or (
            self.num_prompt_top is not None and self.num_prompt_top >= other.num_prompt_top
        )

    @cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        seqs = (self.num_seqs,)
        # Which chain of activation edits, and which of their args.
        edited = {} if self.edit_room is None else {"edited": (2, self.num_seqs)}
        if self.is_decode:
            lengths = {"lengths": seqs} if self.depth > 1 or self.num_drafts else {}
            updates = (3, self.num_groups * self.num_seqs)
            return {"rows": seqs, **lengths, "page_updates": updates, **edited}
        return {
            "targets": (0 if self.num_prompt_top is None else self.num_tokens,),
            "layers": (self.num_states,),
            "is_mean": (self.num_seqs if self.num_states else 0,),  # of all its tokens; 0: the last one's
            "tokens": (self.num_tokens,),
            "rows": seqs,
            "starts": seqs,  # position of each sequence's first token
            "cu_q_lens": (self.num_seqs + 1,),
            "sampled_rows": seqs,  # the row where the sampled token goes
            "admitted": (1 + len(ROW_FIELDS), self.num_seqs),  # row, then its fields
            # A chunk of n tokens opens at most n / page_size + 1 pages; cached ones may come on top.
            "page_updates": (3, self.num_groups * (self.num_tokens // self.page_size + self.num_seqs)),
            **edited,
        }

    def empty(self) -> tuple[Int[np.ndarray, " size"], dict[str, np.ndarray]]:
        """A fresh vector, filled with out-of-range rows, and views of its parts.

        Fresh every step: an earlier step may still be reading the last one.
        """
        blob = np.full(self.size, self.num_rows, np.int32)
        return blob, self.split(blob)


def page_updates(schedule: Schedule, pages_per_seq: int) -> Int[np.ndarray, "3 updates"]:
    """The entries of the page table that a schedule changes: row, column, page."""
    full, window = (np.array(part, np.int32).reshape(-1, 3) for part in schedule.page_updates)
    if len(window):
        full = np.concatenate([full, window + np.array([0, pages_per_seq, 0], np.int32)])
    return full.T


def pack(
    schedule: Schedule,
    updates: Int[np.ndarray, "3 updates"],
    layout: Layout,
    vocab_size: int,
) -> Int[np.ndarray, " size"]:
    """Writes a schedule and its page updates, as many as the layout holds at most, into a fresh vector."""
    blob, parts = layout.empty()
    decodes, num_decodes = schedule.decodes, len(schedule.decodes.requests)
    parts["rows"][:num_decodes] = decodes.rows
    parts["page_updates"][:, : updates.shape[1]] = updates
    if "lengths" in parts:
        parts["lengths"][:num_decodes] = decodes.lengths
    if layout.edit_room is not None:
        pack_edited(parts["edited"], schedule.edited, layout.edit_room)
    if not layout.is_decode:
        _pack_chunks(parts, schedule, layout, vocab_size)
    return blob


def _pack_chunks(parts: dict[str, np.ndarray], schedule: Schedule, layout: Layout, vocab_size: int) -> None:
    """Writes what a mixed step has beyond one of decodes alone."""
    decodes, chunks = schedule.decodes, schedule.chunks
    first, end = len(decodes.requests), schedule.num_seqs
    parts["rows"][first:end] = parts["sampled_rows"][first:end] = [chunk.row for chunk in chunks]
    parts["starts"][:first] = FROM_DEVICE
    parts["starts"][first:end] = [chunk.start for chunk in chunks]
    cu_q_lens = parts["cu_q_lens"]
    cu_q_lens[: first + 1] = np.arange(first + 1)
    np.cumsum([first, *(chunk.length for chunk in chunks)], out=cu_q_lens[first : end + 1])
    cu_q_lens[end + 1 :] = cu_q_lens[end]
    tokens = parts["tokens"]
    tokens[:first] = FROM_DEVICE
    tokens[first:] = 0
    for chunk, start in zip(chunks, cu_q_lens[first:end], strict=True):
        tokens[start : start + chunk.length] = chunk.request.known_tokens(
            chunk.start, chunk.start + chunk.length
        )
    if layout.num_prompt_top is not None:
        _pack_targets(parts["targets"], chunks, cu_q_lens[first:end])
    if layout.num_states:
        _pack_layers(parts, chunks, first)
    parts["sampled_rows"][:first] = decodes.rows
    unsampled = [seq for seq, chunk in enumerate(chunks, first) if not chunk.is_sampled]
    parts["sampled_rows"][unsampled] = layout.num_rows
    admitted = [_row_record(chunk, vocab_size) for chunk in chunks if chunk.is_admitted]
    if admitted:
        parts["admitted"][:, : len(admitted)] = np.stack(admitted, axis=1)


def _pack_targets(targets: np.ndarray, chunks: list[Chunk], starts: np.ndarray) -> None:
    """For each token of a prompt, the one that follows it; 0 where nothing is asked."""
    targets[:] = 0
    for chunk, start in zip(chunks, starts, strict=True):
        if chunk.request.edits.num_prompt_logprobs is not None:
            request, end = chunk.request, chunk.start + chunk.length
            following = request.prompt_token_ids[chunk.start + 1 : end + 1]
            if end == len(request.prompt_token_ids) and request.next_token is not None:
                following = [*following, request.next_token]
            targets[start : start + len(following)] = following


def _pack_layers(parts: dict[str, np.ndarray], chunks: list[Chunk], first: int) -> None:
    """The layers whose states are kept, the same for all who ask in a step, and how to pool them."""
    parts["layers"][:] = NO_LAYER
    parts["is_mean"][:] = 0
    for seq, chunk in enumerate(chunks, first):
        edits = chunk.request.edits
        if chunk.start < len(chunk.request.prompt_token_ids):
            parts["layers"][: len(edits.layers)] = edits.layers
            parts["is_mean"][seq] = edits.pooling == "mean"


def _row_record(chunk: Chunk, vocab_size: int) -> Int[np.ndarray, " fields"]:
    """What a new row is told about its request; floats travel as their bits."""
    request, params = chunk.request, chunk.request.params
    top_k = vocab_size if params.top_k <= 0 else min(params.top_k, vocab_size)
    seed_low, seed_high = np.array([request.seed], np.uint64).view(np.int32)  # little-endian
    penalties = [getattr(request.edits, name) for name in PENALTIES]
    floats = np.array([params.temperature, params.top_p, params.min_p, *penalties], np.float32)
    return np.array(
        [chunk.row, len(request.prompt_token_ids), seed_high, seed_low, top_k, *floats.view(np.int32)],
        np.int32,
    )


def update_rows(rows: Rows, parts: dict[str, Array], layout: Layout) -> Rows:
    """Sets what admitted rows are told, beam scores to 0, and new entries of page tables. On the device."""
    rows = update_page_table(rows, parts["page_updates"])
    if layout.is_decode:
        return rows
    row, told = parts["admitted"][0], parts["admitted"][1:]
    return rows._replace(
        told=rows.told.at[row].set(told.T, mode="drop"),
        beam_score=rows.beam_score.at[row].set(0, mode="drop"),
    )


def update_page_table(rows: Rows, updates: Int[Array, "3 updates"]) -> Rows:
    """Sets entries of the page table; rows out of range stand for nothing. On the device."""
    row, column, page = updates
    return rows._replace(page_table=rows.page_table.at[row, column].set(page, mode="drop"))


def live_rows(parts: dict[str, Array], layout: Layout, index: int | Array) -> Int[Array, " seqs"]:
    """The rows of the step that compute a token for the `index`-th time; out of range: the others."""
    if layout.depth == 1:
        return parts["rows"]
    return jnp.where(index < parts["lengths"], parts["rows"], layout.num_rows)


def unpack(
    rows: Rows,
    row: Int[Array, " seqs"],
    parts: dict[str, Array],
    layout: Layout,
    ahead: int | Int[Array, ""] | Int[Array, " seqs"] = 0,
) -> Batch:
    """The tokens to compute now, from the vector and the rows; `row` as `live_rows`. On the device.

    `ahead`: of decodes, how far each is behind the position of its row.
    """
    is_real = row < layout.num_rows
    page_table = rows.page_table.at[row].get(mode="fill", fill_value=0)
    page_tables = jnp.split(page_table, 2, axis=1) if layout.num_groups == 2 else [page_table]
    if layout.is_decode:
        positions = jnp.where(is_real, rows.position.at[row].get(mode="fill", fill_value=0) + ahead, 0)
        tokens = rows.last_token.at[row].get(mode="fill", fill_value=0)
        seq, is_token, cu_q_lens = jnp.arange(len(row), dtype=jnp.int32), is_real, None
        kv_lens = jnp.where(is_real, positions + 1, 0)
    else:
        cu_q_lens, position = parts["cu_q_lens"], rows.position.at[row].get(mode="fill", fill_value=0)
        starts = jnp.where(parts["starts"] == FROM_DEVICE, position, parts["starts"])
        token = jnp.arange(layout.num_tokens, dtype=jnp.int32)
        # Not the default method: its loop would be driven by the host.
        seq = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all").astype(jnp.int32)
        is_token = token < cu_q_lens[-1]
        seq = jnp.minimum(seq, layout.num_seqs - 1)
        positions = jnp.where(is_token, starts[seq] + token - cu_q_lens[seq], 0)
        last = rows.last_token.at[row].get(mode="fill", fill_value=0)
        tokens = jnp.where(parts["tokens"] == FROM_DEVICE, last[seq], parts["tokens"])
        kv_lens = jnp.where(is_real, starts + jnp.diff(cu_q_lens), 0)

    def slots_in(page_table: Int[Array, "seqs pages_per_seq"]) -> Int[Array, " tokens"]:
        page = page_table[seq, positions // layout.page_size]
        return jnp.where(is_token, page * layout.page_size + positions % layout.page_size, -1)

    slots = [slots_in(page_table) for page_table in page_tables]
    prompt_len = rows.field("prompt_len").at[row].get(mode="fill", fill_value=0)
    return Batch(
        tokens=tokens,
        positions=positions,
        rope_lens=jnp.maximum(positions + 1, prompt_len[seq]),
        slots=slots[0],
        page_table=page_tables[0],
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        window_slots=slots[-1] if layout.num_groups == 2 else None,
        window_page_table=page_tables[-1] if layout.num_groups == 2 else None,
    )


def sampled_by(
    rows: Rows, row: Int[Array, " seqs"], positions: Int[Array, " seqs"]
) -> dict[str, Int[Array, " seqs"] | Float[Array, " seqs"]]:
    """What `sample` goes by: the parameters of these rows, and the positions of the tokens to draw."""
    own = {name: rows.field(name).at[row].get(mode="clip") for name in SAMPLED_BY}
    return {**own, "positions": positions}
