"""Beam search, on the device: the best candidates of each search, and its rows as their continuations.

A beam is a row. Going on as another beam's continuation, a row takes over that one's pages by reference, but
for the one that is not full: of that it has its own, into which the other's is copied.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjengine.batching import PENALTIES, ROW_FIELDS, Rows
from pjengine.draw import DrawLayout, Undrawn, edit_and_draw, take_tokens
from pjengine.logprobs import Logprobs
from pjengine.models.state import KVCache
from pjengine.models.window_group import WindowGroup

# The columns of `Rows.told` that all beams of a search take from its first row.
SHARED = np.array([ROW_FIELDS.index(name) for name in ("prompt_len", "temperature", *PENALTIES)])


class BeamOutput(NamedTuple):
    """What was chosen, of each search; first the beams that go on, by row, then those that have ended."""

    scores: Float[Array, "searches 2 width"]  # sums of logprobs, best first; minus infinity: none
    parents: Int[Array, "searches 2 width"]  # the beam before
    tokens: Int[Array, "searches 2 width"]  # and the token after it


def draw_beams(
    cache: KVCache,
    rows: Rows,
    undrawn: Undrawn,
    blob: Int[Array, " size"],
    *,
    layout: DrawLayout,
    num_layers: int,
    num_pages: int,
    window_group: WindowGroup | None,
    backend: str | None,
) -> tuple[KVCache, Rows, Int[Array, "1 seqs"], Logprobs | None, BeamOutput]:
    """As `draw`; then each search goes on with its best candidates. Donates `cache` and `rows`.

    A token's logprob is its edited logit less what normalizes the raw ones: a token that is forbidden makes
    no other likelier, as in Hugging Face's search. The width of a search may be less than the program's;
    what is chosen beyond it goes nowhere.
    """
    parts = layout.split(blob)
    tokens, logprobs, edited = edit_and_draw(
        rows, cache.token_ids, undrawn, parts, layout=layout, backend=backend
    )
    rows = take_tokens(rows, undrawn, tokens)
    first_pages = _first_pages(num_layers, num_pages, window_group)
    with jax.named_scope("beams"):
        scores = rows.beam_score.at[undrawn.row].get(mode="clip")
        chosen = _choose(undrawn.logits, edited, scores, parts)
        cache, rows = _go_on(cache, rows, chosen, undrawn.kv_lens, parts, first_pages)
    return cache, rows, tokens[None], logprobs, chosen


def _choose(
    raw: Float[Array, "s v"], edited: Float[Array, "s v"], scores: Float[Array, " s"], parts: dict[str, Array]
) -> BeamOutput:
    """The best candidates that go on, and the best that end. First of each beam, then of each search."""
    seqs, ends, beam_of = parts["beam_seqs"], parts["beam_ends"], parts["beam_of"]
    num_searches, width = beam_of.shape
    own_raw, own, start = (array.at[seqs].get(mode="clip") for array in (raw, edited, scores))
    totals = own + (start - jax.nn.logsumexp(own_raw, axis=-1))[:, None]
    totals = jnp.where(jnp.isnan(totals), -jnp.inf, totals)  # the host ends that search
    beam = jnp.arange(len(seqs), dtype=jnp.int32)[:, None]
    ended = totals.at[beam, ends].get(mode="fill", fill_value=-jnp.inf)
    totals = totals.at[beam, ends].set(-jnp.inf, mode="drop")
    best, best_ids = lax.top_k(totals, min(width, totals.shape[1]))

    def of_each(
        totals: Float[Array, "beams n"], ids: Int[Array, "beams n"]
    ) -> tuple[Float[Array, "searches width"], Int[Array, "searches width"], Int[Array, "searches width"]]:
        theirs = totals.at[beam_of].get(mode="fill", fill_value=-jnp.inf).reshape(num_searches, -1)
        tokens = ids.at[beam_of].get(mode="clip").reshape(num_searches, -1)
        top, at = lax.top_k(theirs, width)
        at = at.astype(jnp.int32)
        # What is not there goes on as what it is: its pages are its own search's.
        own = lax.broadcasted_iota(jnp.int32, at.shape, 1)
        parents = jnp.where(top == -jnp.inf, own, at // totals.shape[1])
        return top, parents, jnp.take_along_axis(tokens, at, axis=1)

    going_on, over = of_each(best, best_ids.astype(jnp.int32)), of_each(ended, ends)
    return BeamOutput(*(jnp.stack(pair, axis=1) for pair in zip(going_on, over, strict=True)))


def _go_on(
    cache: KVCache,
    rows: Rows,
    chosen: BeamOutput,
    kv_lens: Int[Array, " s"],
    parts: dict[str, Array],
    first_pages: list[np.ndarray],
) -> tuple[KVCache, Rows]:
    """Makes each row of a search what was chosen."""
    beam_rows, page_size = parts["beam_rows"], cache.token_ids.shape[1]
    num_columns = rows.page_table.shape[1] // len(first_pages)
    kv_lens = kv_lens.at[parts["beam_seqs"]].get(mode="clip")
    kv_lens = kv_lens.at[parts["beam_of"][:, :1]].get(mode="clip")  # the first one's is every beam's
    full = kv_lens // page_size  # pages
    parent_rows = jnp.take_along_axis(beam_rows, chosen.parents[:, 0], axis=1)
    own, theirs = (rows.page_table.at[which].get(mode="clip") for which in (beam_rows, parent_rows))
    column = lax.broadcasted_iota(jnp.int32, (1, 1, rows.page_table.shape[1]), 2) % num_columns
    page_table = jnp.where(column < full[:, :, None], theirs, own)
    is_copied = (kv_lens % page_size > 0) & (parent_rows != beam_rows) & (beam_rows < len(rows.last_token))
    last = jnp.minimum(full, num_columns - 1)[:, :, None]
    sources, targets = (
        [
            jnp.take_along_axis(table, last + i * num_columns, axis=2).reshape(-1)
            for i in range(len(first_pages))
        ]
        for table in (theirs, own)
    )
    cache = _copy_pages(cache, sources, targets, is_copied.reshape(-1), first_pages)
    shared = rows.told.at[beam_rows[:, :1]].get(mode="clip")[..., SHARED]
    changed = {"last_token": chosen.tokens[:, 0], "beam_score": chosen.scores[:, 0], "position": kv_lens}
    changed = {name: jnp.broadcast_to(value, beam_rows.shape) for name, value in changed.items()}
    changed["page_table"] = page_table
    told = rows.told.at[beam_rows[..., None], SHARED].set(shared, mode="drop")
    others = {
        name: getattr(rows, name).at[beam_rows].set(value, mode="drop") for name, value in changed.items()
    }
    return cache, rows._replace(told=told, **others)


def _copy_pages(
    cache: KVCache,
    sources: list[Int[Array, " n"]],
    targets: list[Int[Array, " n"]],
    is_copied: Bool[Array, " n"],
    first_pages: list[np.ndarray],
) -> KVCache:
    """Copies pages of each KV group, of all its layers: all are read before one is written."""

    def copy(pages: Array, first_pages: list[np.ndarray]) -> Array:
        source, target = (
            jnp.concatenate(
                [
                    (first[:, None] + page[None]).reshape(-1)
                    for page, first in zip(own, first_pages, strict=False)  # a draft model has one group
                ]
            )
            for own in (sources, targets)
        )
        target = jnp.where(jnp.tile(is_copied, sum(map(len, first_pages))), target, len(pages))
        return pages.at[target].set(pages[source], mode="drop", unique_indices=True)

    into = jnp.where(is_copied, targets[0], len(cache.token_ids))
    token_ids = cache.token_ids.at[into].set(cache.token_ids[sources[0]], mode="drop", unique_indices=True)
    k, v, draft_k, draft_v = copy(cache.k, first_pages), copy(cache.v, first_pages), None, None
    if cache.draft_k is not None and cache.draft_v is not None:
        num_pages = len(cache.token_ids)
        own_first = _first_pages(len(cache.draft_k) // num_pages, num_pages, None)
        draft_k, draft_v = copy(cache.draft_k, own_first), copy(cache.draft_v, own_first)
    return KVCache(k, v, token_ids, draft_k, draft_v, cache.inboxes)


def _first_pages(num_layers: int, num_pages: int, window_group: WindowGroup | None) -> list[np.ndarray]:
    """Where the pages of each layer begin, of the layers that see everything and of those with a window."""
    if window_group is None:
        return [np.arange(num_layers, dtype=np.int32) * num_pages]
    num_windows = len(window_group.layers)
    start = num_windows * window_group.num_pages
    full = np.arange(num_layers - num_windows, dtype=np.int32) * num_pages + np.int32(start)
    return [full, np.arange(num_windows, dtype=np.int32) * window_group.num_pages]
