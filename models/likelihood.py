"""How likely given tokens are, without the logits of all positions at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.precision import widened

ROWS = 1024  # positions whose logits exist at once; of more rows than that, one of each


def chosen_logprobs(
    unembed: Callable[[Any, Float[Array, "b n e"]], Float[Array, "b n v"]],
    params: Any,
    hidden: Float[Array, "b t e"],
    chosen: Int[Array, "b t"],
    *,
    temperature: float,
) -> Float[Array, "b t"]:
    """Log-softmax of `unembed(params, hidden) / temperature` at `chosen`, some positions at a time.

    Their logits are computed anew for the derivative. What the parameters get of it is summed over the
    positions in float32, and rounded once.
    """
    num_rows, length = chosen.shape
    size = max(1, min(length, ROWS // num_rows))
    num_chunks = -(-length // size)
    wide = jax.tree.map(widened, params)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(num_rows, num_chunks, size, *x.shape[2:]), 1, 0)

    def of_chunk(chunk: tuple[Array, Array]) -> Array:
        hidden, chosen = chunk
        narrow = jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), wide, params)
        logits = unembed(narrow, hidden) / temperature
        of_chosen = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
        return of_chosen - jax.nn.logsumexp(logits, axis=-1)

    # A loop keeps its rounds apart, so that nothing else has to.
    found = lax.map(jax.checkpoint(of_chunk, prevent_cse=False), (chunks(hidden), chunks(chosen)))
    return jnp.moveaxis(found, 0, 1).reshape(num_rows, -1)[:, :length]
