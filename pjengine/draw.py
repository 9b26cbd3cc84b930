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
from pjengine.edit_sizes import EditSizes, pack_edits, pack_masks
from pjengine.logits import History, apply_edits
from pjengine.logprobs import Logprobs, logprobs_of
from pjengine.sampler import sample
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


class Undrawn(NamedTuple):
    """What the model leaves: sequences without their next tokens."""

    logits: Float[Array, "seqs vocab"]
    row: Int[Array, " seqs"]  # out of range: stands for nothing
    sampled_rows: Int[Array, " seqs"]  # where the token goes; out of range: nowhere
    kv_lens: Int[Array, " seqs"]  # which is the position of the token
    drafted: Drafted | None = None  # with drafts: what the sequences are


def pack_draw(schedule: Schedule, masks: Masks, layout: DrawLayout) -> Int[np.ndarray, " size"]:
    """Writes edits and masks into a fresh vector."""
    blob = np.empty(layout.size, np.int32)
    parts = layout.split(blob)
    pack_edits(parts, schedule.edits, layout.num_seqs)
    depth = layout.num_drafts + 1
    parts["asked"][:] = np.repeat(parts["asked"][: layout.num_seqs // depth], depth, axis=0)
    pack_masks(parts, masks)
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
    parts, row, raw = layout.split(blob), undrawn.row, undrawn.logits
    page_table = rows.page_table.at[row].get(mode="fill", fill_value=0)
    prompt_lens = rows.prompt_len.at[row].get(mode="clip")
    penalties = [getattr(rows, name).at[row].get(mode="clip") for name in PENALTIES]
    logprobs = None
    with jax.named_scope("sample"):
        full = jnp.split(page_table, layout.num_groups, axis=1)[0]
        history = History(token_ids, full, undrawn.kv_lens, prompt_lens)
        logits = apply_edits(raw, parts, layout.edits, penalties, history)
        tokens = sample(logits, backend=backend, **sampled_by(rows, row, undrawn.kv_lens))
        if layout.edits.can_forbid:
            tokens = jnp.where(jnp.max(logits, axis=-1) == -jnp.inf, FORBIDDEN, tokens)
        tokens = jnp.where(jnp.isnan(jnp.max(raw, axis=-1)), BROKEN, tokens)
        if layout.edits.num_top is not None:
            logprobs = logprobs_of(raw, tokens, layout.edits.num_top, parts["asked"])
    if undrawn.drafted is not None:
        rows, sampled, counts = accept(rows, row, undrawn.drafted, tokens)
        return rows, sampled, logprobs, counts
    last_token = rows.last_token.at[undrawn.sampled_rows].set(tokens, mode="drop")
    return rows._replace(last_token=last_token), tokens[None], logprobs, None
