"""Logits -> tokens, on the device, every row by its own parameters.

Noise depends on the request's seed and the token's position alone, so the same request draws the
same noise whatever the batch, the schedule or a preemption.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

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
    threshold = keep_threshold(logits, temperature, top_k, top_p, min_p, backend=backend)
    kept = jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
    scores = noisy(kept, positions, seed_high, seed_low, temperature)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def has_nan(logits: Float[Array, "s v"]) -> Bool[Array, " s"]:
    """Whether any of a row is NaN. Its maximum would not tell: on a CPU, XLA's of long rows drops NaN."""
    return jnp.any(jnp.isnan(logits), axis=-1)


def noisy(
    logits: Float[Array, "s n"],
    positions: Int[Array, " s"],
    seed_high: Int[Array, " s"],
    seed_low: Int[Array, " s"],
    temperature: Float[Array, " s"],
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "s n"]:
    """What the token drawn has most of; greedy rows as they are. The columns are tokens from `first` on."""
    is_greedy = temperature == 0
    noise = gumbel_noise(seed_high, seed_low, positions, logits.shape[-1], first)
    hot = logits / jnp.where(is_greedy, 1.0, temperature)[:, None] + noise
    return jnp.where(is_greedy[:, None], logits, hot)


def gumbel_noise(
    seed_high: Int[Array, " s"],
    seed_low: Int[Array, " s"],
    positions: Int[Array, " s"],
    size: int,
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "s v"]:
    """Standard Gumbel noise for each row and column from `first` on: of seed, position and column alone.

    Threefry makes a key for each row; from there on a hash of key and column takes its place, since a
    hundred operations for each logit of a large batch would cost more than reading it.
    """
    words = jnp.stack([seed_high, seed_low], axis=-1).astype(jnp.uint32)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(words, impl="threefry2x32"), positions)
    key = jax.random.key_data(keys)[:, :, None]
    column = (jnp.asarray(first, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32))[None]
    bits = _mix(_mix(column ^ key[:, 0]) ^ key[:, 1])
    # In (0, 1), and finest near 0, where the exponential is smallest and so the noise largest.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * np.float32(2**-32), np.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-uniform))


def _mix(bits: UInt32[Array, "s v"]) -> UInt32[Array, "s v"]:
    """A bijection of 32 bits in which each bit of the input changes half of the output's.

    Source: C. Wellons, "Prospecting for Hash Functions", 2018 (`lowbias32`).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))
