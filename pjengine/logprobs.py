"""Log-probabilities of chosen tokens and of the likeliest ones, on the device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 256  # positions of a prompt whose logits exist at once


class Logprobs(NamedTuple):
    """For each of n positions; from raw logits, before any edit, temperature or filter."""

    chosen: Float[Array, " n"]  # of the token that was chosen
    rank: Int[Array, " n"]  # its rank, 1 for the likeliest
    top: Float[Array, "n k"]  # of the k likeliest, best first
    top_ids: Int[Array, "n k"]
    asked: Float[Array, "n a"]  # of the tokens that were asked for by id


def logprobs_of(
    logits: Float[Array, "n v"], tokens: Int[Array, " n"], num_top: int, asked_ids: Int[Array, "n a"]
) -> Logprobs:
    """Log-softmax of float32 logits at `tokens`, at the `num_top` likeliest, and at `asked_ids`."""
    # By kernels of its own: one that does more beside, as XLA likes to make it, adds up in another order.
    total = lax.optimization_barrier(jax.nn.logsumexp(lax.optimization_barrier(logits), axis=-1))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    top, top_ids = lax.top_k(logits, num_top)
    asked = jnp.take_along_axis(logits, asked_ids, axis=-1)
    return Logprobs(
        chosen=chosen[:, 0] - total,
        rank=1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32),
        top=top - total[:, None],
        top_ids=top_ids.astype(jnp.int32),
        asked=asked - total[:, None],
    )


def num_rows(num_tokens: int) -> int:
    """Positions that `prompt_logprobs_of` computes: whole blocks."""
    return -(-num_tokens // BLOCK) * BLOCK


def prompt_logprobs_of(
    hidden: Float[Array, "t e"],
    targets: Int[Array, " t"],
    num_top: int,
    unembed: Callable[[Float[Array, "n e"]], Float[Array, "n v"]],
) -> Logprobs:
    """`logprobs_of` for the hidden states of a prompt, a block at a time.

    `targets` are the tokens that follow; `unembed` maps [n, e] to float32 logits [n, v]. At most
    BLOCK rows of logits exist at once; what grows with the prompt is the result.
    """
    num_tokens = len(targets)
    num_blocks = num_rows(num_tokens) // BLOCK
    pad = num_blocks * BLOCK - num_tokens
    blocks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(num_blocks, BLOCK, -1)
    none = jnp.zeros((BLOCK, 0), jnp.int32)
    result = lax.map(
        lambda block: logprobs_of(unembed(block[0]), block[1], num_top, none),
        (blocks, jnp.pad(targets, (0, pad)).reshape(num_blocks, BLOCK)),
    )
    return jax.tree.map(lambda x: x.reshape(num_blocks * BLOCK, *x.shape[2:])[:num_tokens], result)
