"""One engine step on the device: the heart of pjengine."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.batching import Layout, Rows, live_rows, sampled_by, unpack, update_rows
from pjengine.beam_selection import BeamOutput
from pjengine.call_activation_edits import state_edit
from pjengine.divided_sampler import draw_divided
from pjengine.draw import Undrawn
from pjengine.logprobs import Logprobs, prompt_logprobs_of
from pjengine.models.attention import PagedAttend
from pjengine.models.decoder import Decoder, Params, StateEdit
from pjengine.models.kept_states import KeptStates
from pjengine.models.state import Batch, KVCache
from pjengine.models.window_group import WindowGroup
from pjengine.pooling import StepStates, step_states
from pjengine.sampler import has_nan, sample
from pjengine.schedule import BROKEN
from pjengine.speculation_config import SpeculationConfig
from pjengine.speculative_step import Drafted, accept, draft, draft_batch

# Steps that read prompts have room for many sequences, and most hold no more than these. Each costs logits.
FEW = 64

type Run = Callable[..., tuple[KVCache, Array, KeptStates | None]]  # as `run_model`, its settings bound
type Draw = Callable[[Array, dict[str, Array]], Array]  # as `draw_tokens`, its parameters bound


class StepOutput(NamedTuple):
    """What comes down to the host."""

    tokens: Int[Array, "depth seqs"]  # for each sequence of the layout, those sampled one after the other
    # Where a request asks: of the tokens sampled first, or with drafts of all, sequence after sequence.
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None  # by token of the batch: of the token after it
    states: StepStates | None = None  # hidden ones, where a request asks
    beams: BeamOutput | None = None  # of the beam searches, whose rows have no use for `tokens`
    drafted: Int[Array, "2 seqs"] | None = None  # with drafts: tokens that hold, and drafts that were tried


def step(
    params: Params,
    cache: KVCache,
    rows: Rows,
    blob: Int[Array, " size"],
    *,
    model: Decoder,
    layout: Layout,
    num_pages: int,
    window_group: WindowGroup | None = None,
    backend: str | None,
    speculation: SpeculationConfig | None = None,
) -> tuple[KVCache, Rows, StepOutput]:
    """Computes the batch in `blob` and samples, `layout.depth` times. Donates `cache` and `rows`.

    The whole of a step without edits, jitted once for each layout.
    """
    parts = layout.split(blob)
    rows = update_rows(rows, parts, layout)
    settings: dict[str, Any] = {"model": model, "num_pages": num_pages, "backend": backend}
    run: Run = partial(run_model, params, window_group=window_group, **settings)
    draw = partial(draw_tokens, params, model=model, has_filters=layout.has_filters, backend=backend)
    if layout.num_drafts:
        cache, drafted = draft(params, cache, rows, parts, layout=layout, speculation=speculation, **settings)
        return verify_drafts(cache, rows, parts, drafted, layout, run, draw)

    def once(
        cache: KVCache, rows: Rows, index: int | Int[Array, ""]
    ) -> tuple[KVCache, Rows, Int[Array, " seqs"]]:
        row = live_rows(parts, layout, index)
        batch = unpack(rows, row, parts, layout)
        cache, hidden, _ = run(cache, batch)
        hidden, own = last_of_each(hidden, batch), sampled_by(rows, row, batch.kv_lens)
        with jax.named_scope("sample"):
            if layout.is_decode or layout.num_seqs <= FEW:
                drawn = draw(hidden, own)
            else:
                is_few = jnp.sum(row < layout.num_rows) <= FEW
                drawn = lax.cond(is_few, partial(draw_few, draw), draw, hidden, own)
        sampled_rows = row if layout.is_decode else parts["sampled_rows"]
        rows = rows._replace(
            last_token=rows.last_token.at[sampled_rows].set(drawn, mode="drop"),
            position=rows.position.at[row].set(batch.kv_lens, mode="drop"),
        )
        return cache, rows, drawn

    if layout.depth == 1:
        cache, rows, drawn = once(cache, rows, 0)
        return cache, rows, StepOutput(drawn[None])

    def again(
        index: Int[Array, ""], carry: tuple[KVCache, Rows, Int[Array, "depth seqs"]]
    ) -> tuple[KVCache, Rows, Int[Array, "depth seqs"]]:
        cache, rows, tokens = carry
        cache, rows, drawn = once(cache, rows, index)
        return cache, rows, tokens.at[index].set(drawn)

    tokens = jnp.zeros((layout.depth, layout.num_seqs), jnp.int32)
    cache, rows, tokens = lax.fori_loop(0, layout.depth, again, (cache, rows, tokens))
    return cache, rows, StepOutput(tokens)


def verify_drafts(
    cache: KVCache,
    rows: Rows,
    parts: dict[str, Array],
    drafted: Drafted,
    layout: Layout,
    run: Run,
    draw: Draw,
) -> tuple[KVCache, Rows, StepOutput]:
    """The model once, over the last token of each sequence and its drafts, and a token after each of them."""
    row, batch = draft_batch(rows, parts, drafted, layout)
    cache, hidden, _ = run(cache, batch)
    with jax.named_scope("sample"):
        drawn = draw(hidden, sampled_by(rows, row, batch.kv_lens))
    rows, drawn, counts = accept(rows, row, drafted, drawn)
    return cache, rows, StepOutput(drawn, drafted=counts)


def compute_logits(
    params: Params,
    cache: KVCache,
    rows: Rows,
    blob: Int[Array, " size"],
    words: Int[Array, "slots words"] | None = None,
    *,
    model: Decoder,
    layout: Layout,
    num_pages: int,
    window_group: WindowGroup | None = None,
    backend: str | None,
    speculation: SpeculationConfig | None = None,
) -> tuple[KVCache, Rows, Undrawn, Logprobs | None, StepStates | None]:
    """Computes the batch in `blob` for `draw`, and what is asked of prompts. Donates `cache` and `rows`.

    The first program of a step with edits, whatever they are; `words` are the args of those of activations.
    """
    parts = layout.split(blob)
    rows = update_rows(rows, parts, layout)
    settings: dict[str, Any] = {"model": model, "num_pages": num_pages, "backend": backend}
    if layout.num_drafts:
        cache, drafted = draft(params, cache, rows, parts, layout=layout, speculation=speculation, **settings)
        row, batch = draft_batch(rows, parts, drafted, layout)
        sampled_rows = jnp.full(row.shape, layout.num_rows, jnp.int32)
    else:
        drafted, row = None, parts["rows"]
        batch = unpack(rows, row, parts, layout)
        sampled_rows = row if layout.is_decode else parts["sampled_rows"]
    edit = None
    if layout.edit_room is not None:
        assert words is not None
        edit = state_edit(layout.edit_room, parts["edited"], words, rows, row, batch)
    run: Run = partial(run_model, params, window_group=window_group, edit=edit, **settings)
    states = None
    if batch.cu_q_lens is None or layout.num_states == 0:
        cache, hidden, _ = run(cache, batch)
    else:
        room = KeptStates.empty(parts["layers"], model.config, layout.num_tokens, model.dtype)
        cache, hidden, kept = run(cache, batch, room=room)
        assert kept is not None
        states = step_states(kept, batch.cu_q_lens, parts["is_mean"], has_tokens=layout.has_token_states)
    hidden = lax.optimization_barrier(hidden)  # what follows changes nothing before it
    prompt_logprobs = None
    if layout.num_prompt_top is not None:
        prompt_logprobs = prompt_logprobs_of(
            hidden, parts["targets"], layout.num_prompt_top, lambda rows: model.logits(params, rows)
        )
    with jax.named_scope("sample"):
        logits = model.logits(params, last_of_each(hidden, batch))
    if drafted is None:
        rows = rows._replace(position=rows.position.at[row].set(batch.kv_lens, mode="drop"))
    undrawn = Undrawn(logits, row, sampled_rows, batch.kv_lens, drafted)
    return cache, rows, undrawn, prompt_logprobs, states


def run_model(
    params: Params,
    cache: KVCache,
    batch: Batch,
    *,
    model: Decoder,
    num_pages: int,
    window_group: WindowGroup | None = None,
    backend: str | None,
    room: KeptStates | None = None,
    edit: StateEdit | None = None,
) -> tuple[KVCache, Float[Array, "t e"], KeptStates | None]:
    """The model once: the final hidden state of each token of a batch, and what there is `room` for on the
    way; `edit` is done to them between the layers.
    """
    attend = PagedAttend(batch, num_pages, backend, window_group)
    inputs, kept = (batch.tokens, batch.positions, batch.rope_lens), None
    if room is None and edit is None:
        hidden, updated = model.run(params, *inputs, cache, attend)
    else:
        hidden, updated, kept = model.run_keeping(params, *inputs, cache, attend, room, edit)
    assert updated is not None
    return updated._replace(token_ids=write_tokens(updated.token_ids, batch)), hidden, kept


def last_of_each(hidden: Float[Array, "t e"], batch: Batch) -> Float[Array, "s e"]:
    """The hidden state of each sequence's last token."""
    return hidden if batch.cu_q_lens is None else hidden[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)]


def draw_tokens(
    params: Params,
    hidden: Float[Array, "s e"],
    own: dict[str, Array],
    *,
    model: Decoder,
    has_filters: bool,
    backend: str | None,
) -> Int[Array, " s"]:
    """Hidden states and the parameters of their rows to tokens, without edits."""

    def whole(logits: Float[Array, "s v"], own: dict[str, Array]) -> Int[Array, " s"]:
        return jnp.where(has_nan(logits), BROKEN, sample(logits, backend=backend, **own))

    logits = model.own_logits(params, hidden)
    if model.own.share is None:
        return whole(logits, own)
    return draw_divided(model.own, logits, own, whole if has_filters else None)


def draw_few(draw: Draw, hidden: Float[Array, "s e"], own: dict[str, Array]) -> Int[Array, " s"]:
    """Of the first FEW alone; zeros for the others."""
    first = jax.tree.map(lambda array: array[:FEW], (hidden, own))
    return jnp.pad(draw(*first), (0, len(hidden) - FEW))


def write_tokens(token_ids: Int[Array, "pages page_size"], batch: Batch) -> Int[Array, "pages page_size"]:
    """Notes the batch's tokens in the slots where their K and V went."""
    slots = jnp.where(batch.slots < 0, token_ids.size, batch.slots)
    flat = token_ids.reshape(-1).at[slots].set(batch.tokens, mode="drop", unique_indices=True)
    return flat.reshape(token_ids.shape)
