"""What hidden states that a step keeps take on the device, and how many it may keep."""

import jax.numpy as jnp

from pjengine.models.config import ModelConfig

SHARE = 0.005  # of the device's budget


def state_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """One token's of one layer.

    Kept beside a slot for the layers that nobody wants, cleaned, and given to the host, which reads those of
    the step before; there pooled ones are no more than there are tokens, in float32.
    """
    return config.hidden_size * (5 * jnp.dtype(dtype).itemsize + 2 * 4)


def max_states(
    config: ModelConfig, dtype: jnp.dtype, budget_bytes: int | None, max_num_batched_tokens: int
) -> int:
    """How many a step may keep, tokens times layers: one layer of whole steps, if that keeps to the share."""
    if budget_bytes is None:
        return max_num_batched_tokens
    return min(int(SHARE * budget_bytes) // state_bytes(config, dtype), max_num_batched_tokens)
