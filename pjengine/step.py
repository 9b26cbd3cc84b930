"""One engine step on the device: the heart of pjengine."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.batching import PENALTIES, Layout, Rows, live_rows, unpack, update_rows
from pjengine.edit_sizes import NO_SIZES
from pjengine.logits import apply_edits
from pjengine.logprobs import Logprobs, logprobs_of, prompt_logprobs_of
from pjengine.models.attention import PagedAttend
from pjengine.models.decoder import Decoder, Params
from pjengine.models.state import Batch, KVCache
from pjengine.models.window_group import WindowGroup
from pjengine.sampler import sample
from pjengine.schedule import BROKEN, FORBIDDEN

# Steps that read prompts have room for many sequences, and most hold no more than these. Each costs logits.
FEW = 64
SAMPLED_BY = ("seed_high", "seed_low", "temperature", "top_k", "top_p", "min_p")

type Draw = Callable[[Array, dict[str, Array]], Array]  # as `draw_tokens`, its parameters bound


class StepOutput(NamedTuple):
    """What comes down to the host."""

    tokens: Int[Array, "depth seqs"]  # for each sequence of the layout, those sampled one after the other
    logprobs: Logprobs | None = None  # of the tokens sampled first, where a request asks
    prompt_logprobs: Logprobs | None = None  # by token of the batch: of the token after it


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
) -> tuple[KVCache, Rows, StepOutput]:
    """Computes the batch in `blob` and samples, `layout.depth` times. Donates `cache` and `rows`.

    The only function the engine jits, once for each layout.
    """
    parts = layout.split(blob)
    rows = update_rows(rows, parts, layout)
    once = partial(
        compute_tokens,
        params,
        parts=parts,
        model=model,
        layout=layout,
        num_pages=num_pages,
        window_group=window_group,
        backend=backend,
    )
    if layout.depth == 1:
        cache, rows, output = once(cache, rows, 0)
        return cache, rows, output._replace(tokens=output.tokens[None])

    def again(
        index: Int[Array, ""], carry: tuple[KVCache, Rows, Int[Array, "depth seqs"]]
    ) -> tuple[KVCache, Rows, Int[Array, "depth seqs"]]:
        cache, rows, tokens = carry
        cache, rows, output = once(cache, rows, index)
        return cache, rows, tokens.at[index].set(output.tokens)

    tokens = jnp.zeros((layout.depth, layout.num_seqs), jnp.int32)
    cache, rows, tokens = lax.fori_loop(0, layout.depth, again, (cache, rows, tokens))
    return cache, rows, StepOutput(tokens)


def compute_tokens(
    params: Params,
    cache: KVCache,
    rows: Rows,
    index: int | Int[Array, ""],
    *,
    parts: dict[str, Array],
    model: Decoder,
    layout: Layout,
    num_pages: int,
    window_group: WindowGroup | None = None,
    backend: str | None,
) -> tuple[KVCache, Rows, StepOutput]:
    """The model once, and a token for each sequence, those without a `depth` axis."""
    row = live_rows(parts, layout, index)
    batch = unpack(rows, row, parts, layout)
    attend = PagedAttend(batch, num_pages, backend, window_group)
    hidden, updated = model.forward(params, batch.tokens, batch.positions, batch.rope_lens, cache, attend)
    assert updated is not None
    updated = updated._replace(token_ids=write_tokens(updated.token_ids, batch))
    prompt_logprobs = None
    if layout.edits.num_prompt_top is not None:
        prompt_logprobs = prompt_logprobs_of(
            hidden, parts["targets"], layout.edits.num_prompt_top, lambda rows: model.logits(params, rows)
        )
    if batch.cu_q_lens is not None:
        hidden = hidden[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)]  # each sequence's last token
    own = {name: getattr(rows, name).at[row].get(mode="clip") for name in SAMPLED_BY}
    own["positions"] = batch.kv_lens
    draw = partial(draw_tokens, params, model=model, backend=backend)
    logprobs = None
    with jax.named_scope("sample"):
        if layout.edits == NO_SIZES and (layout.is_decode or layout.num_seqs <= FEW):
            tokens = draw(hidden, own)
        elif layout.edits == NO_SIZES:
            is_few = jnp.sum(row < layout.num_rows) <= FEW
            tokens = lax.cond(is_few, partial(draw_few, draw), draw, hidden, own)
        else:
            raw = model.logits(params, hidden)
            prompt_lens = rows.prompt_len.at[row].get(mode="clip")
            penalties = [getattr(rows, name).at[row].get(mode="clip") for name in PENALTIES]
            logits = apply_edits(raw, parts, layout.edits, penalties, batch, updated.token_ids, prompt_lens)
            tokens = sample(logits, backend=backend, **own)
            if layout.edits.can_forbid:
                tokens = jnp.where(jnp.max(logits, axis=-1) == -jnp.inf, FORBIDDEN, tokens)
            tokens = jnp.where(jnp.isnan(jnp.max(raw, axis=-1)), BROKEN, tokens)
            if layout.edits.num_top is not None:
                logprobs = logprobs_of(raw, tokens, layout.edits.num_top, parts["asked"])
    sampled_rows = row if layout.is_decode else parts["sampled_rows"]
    rows = rows._replace(
        last_token=rows.last_token.at[sampled_rows].set(tokens, mode="drop"),
        position=rows.position.at[row].set(batch.kv_lens, mode="drop"),
    )
    return updated, rows, StepOutput(tokens, logprobs, prompt_logprobs)


def draw_tokens(
    params: Params, hidden: Float[Array, "s e"], own: dict[str, Array], *, model: Decoder, backend: str | None
) -> Int[Array, " s"]:
    """Hidden states and the parameters of their rows to tokens, without edits."""
    logits = model.logits(params, hidden)
    return jnp.where(jnp.isnan(jnp.max(logits, axis=-1)), BROKEN, sample(logits, backend=backend, **own))


def draw_few(draw: Draw, hidden: Float[Array, "s e"], own: dict[str, Array]) -> Int[Array, " s"]:
    """Of the first FEW alone; zeros for the others."""
    first = jax.tree.map(lambda array: array[:FEW], (hidden, own))
    return jnp.pad(draw(*first), (0, len(hidden) - FEW))


def write_tokens(token_ids: Int[Array, "pages page_size"], batch: Batch) -> Int[Array, "pages page_size"]:
    """Notes the batch's tokens in the slots where their K and V went."""
    slots = jnp.where(batch.slots < 0, token_ids.size, batch.slots)
    flat = token_ids.reshape(-1).at[slots].set(batch.tokens, mode="drop", unique_indices=True)
    return flat.reshape(token_ids.shape)
