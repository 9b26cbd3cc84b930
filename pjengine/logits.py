"""The rare edits of logits, on the device: masks, bans, biases, bad words, penalties."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pjengine.edit_sizes import EditSizes

HISTORY_BLOCK = 2**20  # tokens of prompts and outputs, of all sequences together, that are looked at at once


def history_bytes(num_seqs: int, max_model_len: int, page_size: int) -> int:
    """What looking at a block of them takes, at most, however long the sequences are."""
    return 32 * min(num_seqs * (max_model_len + page_size), max(HISTORY_BLOCK, num_seqs * page_size))


class History(NamedTuple):
    """Where the tokens of each sequence are."""

    token_ids: Int[Array, "pages page_size"]
    page_table: Int[Array, "s pages_per_seq"]
    lens: Int[Array, " s"]  # prompt and output together
    prompt_lens: Int[Array, " s"]


def apply_edits(
    logits: Float[Array, "s v"],
    parts: dict[str, Array],
    sizes: EditSizes,
    penalties: Sequence[Float[Array, " s"]],
    history: History,
) -> Float[Array, "s v"]:
    """In the order: masks, allowed ids, bad words, min_tokens and bias, then the penalties.

    `penalties`: repetition, frequency and presence.
    """
    if sizes.num_masks:
        logits = jnp.where(_unmask(parts["mask_of"], parts["masks"], logits.shape), logits, -jnp.inf)
    if sizes.num_allowed:
        seq, token = parts["allowed"]
        is_limited = jnp.zeros(len(logits), bool).at[seq].set(True, mode="drop")
        is_allowed = jnp.zeros(logits.shape, bool).at[seq, token].set(True, mode="drop")
        logits = jnp.where(is_limited[:, None] & ~is_allowed, -jnp.inf, logits)
    if sizes.num_bad_words:
        logits = _forbid_words(logits, parts["bad_words"], history)
    if sizes.num_bias:
        seq, token, bits = parts["bias"]
        logits = logits.at[seq, token].add(_floats(bits), mode="drop")
    if sizes.has_penalties:
        seen, counts = _count_tokens(logits.shape, history)
        logits = _penalize(logits, penalties, seen, counts)
    return logits


def _unmask(
    mask_of: Int[Array, " s"], masks: Int[Array, "masks words"], shape: tuple[int, ...]
) -> Bool[Array, "s v"]:
    """The bits of each sequence's mask; all ones where it has none."""
    words = masks.at[mask_of].get(mode="fill", fill_value=-1)
    bits = (words[:, :, None] >> lax.broadcasted_iota(jnp.int32, (1, 1, 32), 2)) & 1
    return bits.reshape(len(words), -1)[:, : shape[1]] == 1


def _forbid_words(
    logits: Float[Array, "s v"], words: Int[Array, "rows words"], history: History
) -> Float[Array, "s v"]:
    """Forbids the last token of each word whose other tokens are the last of the output."""
    seq, word_len, tokens = words[0], words[1], words[2:]
    width, page_size = len(tokens), history.token_ids.shape[1]
    owner = jnp.minimum(seq, len(logits) - 1)[None]
    # Of all but a word's last token, right-aligned: how many tokens before the one to be sampled.
    back = jnp.arange(width - 1, 0, -1, dtype=jnp.int32)[:, None]
    at = history.lens[owner] - back
    page = history.page_table[owner, jnp.maximum(at, 0) // page_size]
    is_equal = history.token_ids[page, at % page_size] == tokens[:-1]
    is_met = (back >= word_len[None]) | ((at >= history.prompt_lens[owner]) & is_equal)
    matches = (seq < len(logits)) & is_met.all(axis=0)
    return logits.at[jnp.where(matches, seq, len(logits)), tokens[-1]].set(-jnp.inf, mode="drop")


def _count_tokens(shape: tuple[int, ...], history: History) -> tuple[Bool[Array, "s v"], Float[Array, "s v"]]:
    """Which tokens are in each sequence, and how often each is in its output; a block of pages at a time."""
    num_seqs, page_size = shape[0], history.token_ids.shape[1]
    most_pages = history.page_table.shape[1]
    num_pages = min(max(1, HISTORY_BLOCK // (num_seqs * page_size)), most_pages)  # of a block
    num_blocks = -(-most_pages // num_pages)
    pad = num_blocks * num_pages - most_pages
    blocks = jnp.pad(history.page_table, ((0, 0), (0, pad))).reshape(num_seqs, num_blocks, num_pages)
    lens, prompt_lens = history.lens[:, None], history.prompt_lens[:, None]

    def add(
        index: int | Int[Array, ""], found: tuple[Bool[Array, "s v"], Float[Array, "s v"]]
    ) -> tuple[Bool[Array, "s v"], Float[Array, "s v"]]:
        tokens = history.token_ids[blocks[:, index]].reshape(num_seqs, -1)
        seq = lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
        position = lax.broadcasted_iota(jnp.int32, tokens.shape, 1) + index * tokens.shape[1]
        is_token = position < lens
        is_output = is_token & (position >= prompt_lens)
        seen, counts = found
        seen = seen.at[jnp.where(is_token, seq, num_seqs), tokens].set(True, mode="drop")
        counts = counts.at[jnp.where(is_output, seq, num_seqs), tokens].add(1.0, mode="drop")
        return seen, counts

    # The number of rounds is known, so that no host has to look whether another one follows.
    return lax.fori_loop(0, num_blocks, add, (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)))


def _penalize(
    logits: Float[Array, "s v"],
    penalties: Sequence[Float[Array, " s"]],
    seen: Bool[Array, "s v"],
    counts: Float[Array, "s v"],
) -> Float[Array, "s v"]:
    """Repetition over prompt and output; frequency and presence over the output alone."""
    repetition, frequency, presence = (penalty[:, None] for penalty in penalties)
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, scaled, logits)
    return logits - frequency * counts - presence * (counts > 0).astype(jnp.float32)


def _floats(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)
