"""The second program of a step with edits: from the model's logits to tokens.

The model needs the last tokens only, and these are on the device. What may come after them may need the
host, which reads them meanwhile. So such a step is two programs: one with the model, which knows nothing of
edits, and a small one, which knows nothing of the model and is compiled in a moment.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pjengine.batching import PENALTIES, Layout, Rows, Vector, sampled_by
from pjengine.call_processors import apply_processors
from pjengine.edit_sizes import EditSizes, pack_beams, pack_edits, pack_masks
from pjengine.logits import History, apply_edits
from pjengine.logprobs import Logprobs, logprobs_of
from pjengine.sampler import has_nan, sample
from pjengine.schedule import BROKEN, FORBIDDEN, Masks, Schedule
from pjengine.speculative_step import Drafted, accept


@dataclass(frozen=True)
class DrawLayout(Vector):
    """A program that draws tokens."""

    num_seqs: int  # that the model's program before it has logits of
    edits: EditSizes
    num_groups: int = 1  # of KV pages
    num_drafts: int = 0  # then logits follow each sequence's last token, and each of so many drafts of it

    def covers(self, other: "DrawLayout") -> bool:
        """Whether it has room for all that `other` has room for."""
        is_alike = self.num_drafts == other.num_drafts
        return is_alike and self.num_seqs >= other.num_seqs and self.edits.covers(other.edits)

    @cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        return self.edits.parts(self.num_seqs)


class Stages(NamedTuple):
    """The programs of one step."""

    model: Layout
    draw: DrawLayout | None = None  # where the first ends in logits

    @property
    def layouts(self) -> list[Layout | DrawLayout]:
        return [self.model] if self.draw is None else [self.model, self.draw]

    @property
    def size(self) -> int:
        return sum(layout.size for layout in self.layouts)

    def covers(self, other: "Stages") -> bool:
        """Whether a step that `other` was chosen for may run as this."""
        if self.draw is None or other.draw is None:
            return self.draw is other.draw and self.model.covers(other.model)
        return self.model.covers(other.model) and self.draw.covers(other.draw)


class Undrawn(NamedTuple):
    """What the model leaves: sequences without their next tokens."""

    logits: Float[Array, "seqs vocab"]
    row: Int[Array, " seqs"]  # out of range: stands for nothing
    sampled_rows: Int[Array, " seqs"]  # where the token goes; out of range: nowhere
    kv_lens: Int[Array, " seqs"]  # which is the position of the token
    drafted: Drafted | None = None  # with drafts: what the sequences are


def pack_draw(schedule: Schedule, masks: Masks, layout: DrawLayout) -> Int[np.ndarray, " size"]:
    """Writes edits, masks and beams into a fresh vector."""
    blob = np.empty(layout.size, np.int32)
    parts = layout.split(blob)
    pack_edits(parts, schedule.edits, layout.num_seqs, layout.edits.chains)
    depth = layout.num_drafts + 1
    parts["asked"][:] = np.repeat(parts["asked"][: layout.num_seqs // depth], depth, axis=0)
    pack_masks(parts, masks)
    pack_beams(parts, schedule.beams)
    return blob


def draw(
    rows: Rows,
    token_ids: Int[Array, "pages page_size"],
    undrawn: Undrawn,
    blob: Int[Array, " size"],
    *,
    layout: DrawLayout,
    backend: str | None,
) -> tuple[Rows, Int[Array, "depth seqs"], Logprobs | None, Int[Array, "2 seqs"] | None]:
    """Edits the logits and draws a token for each sequence; the parts of `StepOutput`. Donates `rows`."""
    # The compiler of JAX 0.11 crashes on an input of no elements that several devices read.
    blob = blob if layout.size else jnp.zeros_like(blob)
    tokens, logprobs, _ = edit_and_draw(
        rows, token_ids, undrawn, layout.split(blob), layout=layout, backend=backend
    )
    if undrawn.drafted is not None:
        rows, sampled, counts = accept(rows, undrawn.row, undrawn.drafted, tokens)
        return rows, sampled, logprobs, counts
    return take_tokens(rows, undrawn, tokens), tokens[None], logprobs, None


def take_tokens(rows: Rows, undrawn: Undrawn, tokens: Int[Array, " seqs"]) -> Rows:
    """Has the next step go on from these tokens."""
    return rows._replace(last_token=rows.last_token.at[undrawn.sampled_rows].set(tokens, mode="drop"))


def edit_and_draw(
    rows: Rows,
    token_ids: Int[Array, "pages page_size"],
    undrawn: Undrawn,
    parts: dict[str, Array],
    *,
    layout: DrawLayout,
    backend: str | None,
) -> tuple[Int[Array, " seqs"], Logprobs | None, Float[Array, "seqs vocab"]]:
    """A token for each sequence, its logprobs where they are asked for, and the edited logits."""
    row, raw = undrawn.row, undrawn.logits
    page_table = rows.page_table.at[row].get(mode="fill", fill_value=0)
    prompt_lens = rows.field("prompt_len").at[row].get(mode="clip")
    penalties = [rows.field(name).at[row].get(mode="clip") for name in PENALTIES]
    logprobs = None
    with jax.named_scope("sample"):
        full = jnp.split(page_table, layout.num_groups, axis=1)[0]
        history = History(token_ids, full, undrawn.kv_lens, prompt_lens)
        logits = apply_edits(raw, parts, layout.edits, penalties, history)
        if chains := layout.edits.chains:
            logits, failures = apply_processors(logits, parts["processed"], chains, history)
        tokens = sample(logits, backend=backend, **sampled_by(rows, row, undrawn.kv_lens))
        if layout.edits.can_forbid:
            tokens = jnp.where(jnp.max(logits, axis=-1) == -jnp.inf, FORBIDDEN, tokens)
        if chains:
            tokens = jnp.where(failures < 0, failures, tokens)
        tokens = jnp.where(has_nan(raw), BROKEN, tokens)
        if layout.edits.num_top is not None:
            logprobs = logprobs_of(raw, tokens, layout.edits.num_top, parts["asked"])
    return tokens, logprobs, logits
