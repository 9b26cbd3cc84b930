"""A decode step that drafts tokens and verifies them, on the device, without the host between.

Lossless, token for token. The noise that a token is drawn with comes from its request's seed and its position
alone. So the step computes each drafted token as if it were a sequence's last, samples with that position's
own noise what follows, and keeps drafts as long as each is the very token that was sampled before it.
What comes out is what plain steps sample, at any temperature and with any filter, whatever was drafted. A
draft that does not look at the noise is kept with the probability that the model gives it, which is that
of rejection sampling.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pjengine.batching import Layout, Rows, sampled_by, unpack
from pjengine.models.attention import PagedAttend
from pjengine.models.decoder import Decoder, Params
from pjengine.models.pair import Pair
from pjengine.models.state import Batch, KVCache
from pjengine.sampler import sample
from pjengine.speculation_config import SpeculationConfig


class Drafted(NamedTuple):
    """The tokens that a step computes: of each sequence its last one, then its drafts."""

    tokens: Int[Array, "seqs depth"]
    is_real: Bool[Array, "seqs depth"]  # the others are padding
    position: Int[Array, " seqs"]  # of the first


def draft(
    params: Params,
    cache: KVCache,
    rows: Rows,
    parts: dict[str, Array],
    *,
    model: Decoder,
    layout: Layout,
    num_pages: int,
    backend: str | None,
    speculation: SpeculationConfig | None,
) -> tuple[KVCache, Drafted]:
    """Drafts for the rows of a step, as many as the host has room for: the draft model's, or n-grams."""
    assert speculation is not None, "a program with drafts is of an engine that speculates"
    row, lengths = parts["rows"], parts["lengths"]
    last, position = (x.at[row].get(mode="fill", fill_value=0) for x in (rows.last_token, rows.position))
    index = jnp.arange(layout.num_drafts + 1, dtype=jnp.int32)[None]
    is_real = (row < layout.num_rows)[:, None] & (index < lengths[:, None])
    if isinstance(model, Pair):
        tokens = jnp.pad(last[:, None], ((0, 0), (0, layout.num_drafts)))
        cache, tokens = continue_with_model(
            params,
            cache,
            rows,
            parts,
            tokens,
            model=model,
            layout=layout,
            num_pages=num_pages,
            backend=backend,
        )
        return cache, Drafted(tokens, is_real, position)
    pages = rows.page_table.at[row].get(mode="fill", fill_value=0)
    pages = pages[:, : pages.shape[1] // layout.num_groups]
    known = cache.token_ids[pages].reshape(len(row), -1)
    drafts, is_found = look_up(known, last, position, speculation)
    is_real &= (index == 0) | is_found[:, None]
    return cache, Drafted(jnp.concatenate([last[:, None], drafts], axis=1), is_real, position)


def continue_with_model(
    params: Params,
    cache: KVCache,
    rows: Rows,
    parts: dict[str, Array],
    tokens: Int[Array, "seqs depth"],
    *,
    model: Pair,
    layout: Layout,
    num_pages: int,
    backend: str | None,
) -> tuple[KVCache, Int[Array, "seqs depth"]]:
    """Fills in what the draft model samples behind the first of `tokens`, one token after the other.

    With the noise that the target samples its own token of that position with: where both give the same
    probabilities, they sample the same token.
    """

    def once(index: Int[Array, ""], carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, tokens = carry
        row = jnp.where(index < parts["lengths"], parts["rows"], layout.num_rows)
        batch = unpack(rows, row, parts, layout, index)._replace(tokens=tokens[:, index])
        attend = PagedAttend(batch, num_pages, backend)
        hidden, cache = model.run_draft(params, batch.tokens, batch.positions, batch.rope_lens, cache, attend)
        logits, own = model.draft_logits(params, hidden), sampled_by(rows, row, batch.kv_lens)
        return cache, tokens.at[:, index + 1].set(sample(logits, backend=backend, **own))

    return lax.fori_loop(0, layout.num_drafts, once, (cache, tokens))


def look_up(
    known: Int[Array, "seqs length"],
    last: Int[Array, " seqs"],
    position: Int[Array, " seqs"],
    speculation: SpeculationConfig,
) -> tuple[Int[Array, "seqs drafts"], Bool[Array, " seqs"]]:
    """What followed, earlier in each sequence, the longest run of tokens that it ends with now.

    Of runs from `lookup_min` to `lookup_max` tokens, and of equal ones the last. Where what followed is
    shorter than the drafts, it is taken to go on from its beginning, as a loop does. The second result
    says where there is such a run.

    Args:
      known: tokens of each sequence up to `position`, where the token is `last`; what lies there and
        behind it means nothing.
    """
    length, lookup_min, lookup_max = known.shape[1], speculation.lookup_min, speculation.lookup_max
    at = lax.broadcasted_iota(jnp.int32, known.shape, 1)
    known = jnp.where(at == position[:, None], last[:, None], known)
    # How many tokens up to each place are the last ones of the sequence.
    padded = jnp.pad(known, ((0, 0), (lookup_max - 1, 0)), constant_values=-1)
    is_run, run = at < position[:, None], jnp.zeros(known.shape, jnp.int32)
    for back in range(lookup_max):
        own = jnp.maximum(position - back, 0)
        wanted = jnp.take_along_axis(known, own[:, None], axis=1)
        is_run &= (padded[:, lookup_max - 1 - back :][:, :length] == wanted) & (position >= back)[:, None]
        run += is_run.astype(jnp.int32)
    best = jnp.max(jnp.where(run >= lookup_min, run * length + at, -1), axis=1)
    is_found = best >= 0
    end = jnp.where(is_found, best % length, 0)
    step = jnp.arange(speculation.num_drafts, dtype=jnp.int32)[None]
    period = jnp.maximum(position - end, 1)[:, None]
    return jnp.take_along_axis(known, end[:, None] + 1 + step % period, axis=1), is_found


def draft_batch(
    rows: Rows, parts: dict[str, Array], drafted: Drafted, layout: Layout
) -> tuple[Int[Array, " tokens"], Batch]:
    """The step's tokens, each as the last one of a sequence of its own; and the row of each.

    Each layer writes the keys and values of all of them before it attends, so that a draft sees those before
    it, and none behind it.
    """
    row = jnp.where(drafted.is_real, parts["rows"][:, None], layout.num_rows).reshape(-1)
    ahead = jnp.tile(jnp.arange(layout.num_drafts + 1, dtype=jnp.int32), len(drafted.position))
    return row, unpack(rows, row, parts, layout, ahead)._replace(tokens=drafted.tokens.reshape(-1))


def verify(drafted: Drafted, sampled: Int[Array, "seqs depth"]) -> Int[Array, " seqs"]:
    """How many of the tokens sampled at each place are those of plain steps: one more than drafts were right.

    The token sampled at a place holds if all tokens before it do, and are those it was computed from.
    """
    is_right = drafted.is_real[:, 1:] & (drafted.tokens[:, 1:] == sampled[:, :-1])
    num_right = jnp.sum(jnp.cumprod(is_right.astype(jnp.int32), axis=1), axis=1)
    return jnp.where(drafted.is_real[:, 0], num_right + 1, 0)


def accept(
    rows: Rows, row: Int[Array, " tokens"], drafted: Drafted, sampled: Int[Array, " tokens"]
) -> tuple[Rows, Int[Array, "depth seqs"], Int[Array, "2 seqs"]]:
    """Moves each row on by the tokens that hold.

    Args:
      row: as of `draft_batch`.
      sampled: what follows each token of the step.

    Returns:
      The rows; `sampled`, place by place; of each sequence, how many tokens hold, and how many drafts
      were tried.
    """
    num_seqs, depth = drafted.tokens.shape
    own, places = row.reshape(num_seqs, depth)[:, 0], sampled.reshape(num_seqs, depth)
    taken = verify(drafted, places)
    last = jnp.take_along_axis(places, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
    rows = rows._replace(
        last_token=rows.last_token.at[own].set(last, mode="drop"),
        position=rows.position.at[own].set(drafted.position + taken, mode="drop"),
    )
    num_tried = jnp.sum(drafted.is_real[:, 1:], axis=1, dtype=jnp.int32)
    return rows, places.T, jnp.stack([taken, num_tried])
