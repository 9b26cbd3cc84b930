"""Hidden states of a step, as they come down to the host."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.models.kept_states import KeptStates


class StepStates(NamedTuple):
    """Of the layers that the step keeps, in their order; more layers than asked for are zeros."""

    pooled: Float[
        Array, "k seqs e"
    ]  # float32: a sequence's sum over its tokens of the step, or the last one's
    tokens: Float[Array, "k tokens e"] | None = None  # of each token, where a request asks


def step_states(
    kept: KeptStates, cu_q_lens: Int[Array, " borders"], is_mean: Int[Array, " seqs"], *, has_tokens: bool
) -> StepStates:
    """Pools what was kept, sequence by sequence; `is_mean` says which are summed.

    By a product with ones and zeros: sums in a fixed order, whatever the lengths are. What is no number
    stays with the sequence that has it.
    """
    states = kept.wanted
    token = jnp.arange(states.shape[1], dtype=jnp.int32)[None]
    ends = cu_q_lens[1:, None]
    starts = jnp.where(is_mean[:, None] != 0, cu_q_lens[:-1, None], ends - 1)
    is_own = (token >= starts) & (token < ends)
    is_finite = jnp.all(jnp.isfinite(states), axis=-1)
    is_bad = jnp.any(is_own[None] & ~is_finite[:, None], axis=-1)
    clean = jnp.where(is_finite[..., None], states, jnp.zeros((), states.dtype))
    pooled = jnp.einsum(
        "st,kte->kse",
        is_own.astype(states.dtype),
        clean,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )
    pooled = jnp.where(is_bad[..., None], jnp.nan, pooled)
    return StepStates(pooled, states if has_tokens else None)
