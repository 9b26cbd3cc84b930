"""Logits -> tokens, on the device, every row by its own parameters.

Noise depends on the request's seed and the token's position alone, so the same request draws the
same noise whatever the batch, the schedule or a preemption.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.keep_threshold import keep_threshold


def sample(
    logits: Float[Array, "s v"],
    positions: Int[Array, " s"],
    seed_high: Int[Array, " s"],
    seed_low: Int[Array, " s"],
    temperature: Float[Array, " s"],
    top_k: Int[Array, " s"],
    top_p: Float[Array, " s"],
    min_p: Float[Array, " s"],
    *,
    backend: str | None = None,
) -> Int[Array, " s"]:
    """The next token of each row: temperature, then min_p, top_k, top_p, then Gumbel-argmax.

    `positions` are those of the tokens being drawn. Temperature 0 is greedy: no filter, no noise.
    Rows that filter nothing pay nothing for those that do.
    """
    is_greedy = temperature == 0
    threshold = keep_threshold(logits, temperature, top_k, top_p, min_p, backend=backend)
    kept = jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
    draw = partial(_gumbel, size=logits.shape[-1])
    noise = jax.vmap(draw)(seed_high, seed_low, positions)
    noisy = kept / jnp.where(is_greedy, 1.0, temperature)[:, None] + noise
    return jnp.argmax(jnp.where(is_greedy[:, None], kept, noisy), axis=-1).astype(jnp.int32)


def _gumbel(
    seed_high: Int[Array, ""], seed_low: Int[Array, ""], position: Int[Array, ""], size: int
) -> Float[Array, " v"]:
    words = jnp.stack([seed_high, seed_low]).astype(jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)
