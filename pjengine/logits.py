"""The rare edits of logits, on the device: bans, biases, bad words, penalties."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.edit_sizes import EditSizes
from pjengine.models.state import Batch


def apply_edits(
    logits: Float[Array, "s v"],
    parts: dict[str, Array],
    sizes: EditSizes,
    penalties: Sequence[Float[Array, " s"]],
    batch: Batch,
    token_ids: Int[Array, "pages page_size"],
    prompt_lens: Int[Array, " s"],
) -> Float[Array, "s v"]:
    """In the order: allowed ids, bad words, min_tokens and bias, then the penalties.

    `penalties`: repetition, frequency and presence.
    """
    if sizes.num_allowed:
        seq, token = parts["allowed"]
        is_limited = jnp.zeros(len(logits), bool).at[seq].set(True, mode="drop")
        is_allowed = jnp.zeros(logits.shape, bool).at[seq, token].set(True, mode="drop")
        logits = jnp.where(is_limited[:, None] & ~is_allowed, -jnp.inf, logits)
    if sizes.num_bad_words or sizes.has_penalties:
        history = token_ids[batch.page_table].reshape(len(logits), -1)
    if sizes.num_bad_words:
        logits = _forbid_words(logits, parts["bad_words"], history, batch.kv_lens)
    if sizes.num_bias:
        seq, token, bits = parts["bias"]
        logits = logits.at[seq, token].add(_floats(bits), mode="drop")
    if sizes.has_penalties:
        logits = _penalize(logits, penalties, history, prompt_lens, batch.kv_lens)
    return logits


def _forbid_words(
    logits: Float[Array, "s v"],
    words: Int[Array, "rows words"],
    history: Int[Array, "s slots"],
    lens: Int[Array, " s"],
) -> Float[Array, "s v"]:
    """Forbids the last token of each word whose other tokens are the last of the sequence."""
    seq, word_len, tokens = words[0], words[1], words[2:]
    width = len(tokens)
    owner = jnp.minimum(seq, len(logits) - 1)
    matches = seq < len(logits)
    for i in range(width - 1):  # the token i places from the front of the right-aligned word
        back = width - 1 - i  # so many tokens before the one to be sampled
        at = lens[owner] - back
        is_equal = history[owner, jnp.maximum(at, 0)] == tokens[i]
        matches &= (back >= word_len) | ((at >= 0) & is_equal)
    return logits.at[jnp.where(matches, seq, len(logits)), tokens[-1]].set(-jnp.inf, mode="drop")


def _penalize(
    logits: Float[Array, "s v"],
    penalties: Sequence[Float[Array, " s"]],
    history: Int[Array, "s slots"],
    prompt_lens: Int[Array, " s"],
    lens: Int[Array, " s"],
) -> Float[Array, "s v"]:
    """Repetition over prompt and output; frequency and presence over the output alone."""
    repetition, frequency, presence = (penalty[:, None] for penalty in penalties)
    seq = lax.broadcasted_iota(jnp.int32, history.shape, 0)
    position = lax.broadcasted_iota(jnp.int32, history.shape, 1)
    is_token = position < lens[:, None]
    is_output = is_token & (position >= prompt_lens[:, None])
    seen = (
        jnp.zeros(logits.shape, bool)
        .at[jnp.where(is_token, seq, len(logits)), history]
        .set(True, mode="drop")
    )
    counts = jnp.zeros(logits.shape, jnp.float32).at[seq, history].add(is_output.astype(jnp.float32))
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, scaled, logits)
    return logits - frequency * counts - presence * (counts > 0).astype(jnp.float32)


def _floats(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)
