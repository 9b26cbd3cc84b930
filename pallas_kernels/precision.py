"""In what sums, norms and exponentials are computed."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32; of float64, in which gradients are held against finite differences, float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return x.astype(wide_dtype(x.dtype))
