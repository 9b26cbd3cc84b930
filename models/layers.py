"""What every architecture is made of: linear products, norms, activations, tables of rotary positions."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pjengine.models.config import Activation, ModelConfig
from pjengine.models.rope import RopeConfig, dynamic_rope_theta, rope_frequencies
from pjengine.pallas_kernels.precision import wide_dtype, widened
from pjengine.pallas_kernels.stacked_linear import stacked_linear


def linear(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    contract: int = 1,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Contracts the last `contract` axes of `x` with the first of `weight`, then adds `bias`.

    The only place where a weight meets an activation, but for kernels that read a layer's weights from the
    stack of all layers. Sums in float32; float32 inputs keep full precision on GPUs that would otherwise
    round them to tf32.
    """
    axes = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = lax.dot_general(x, weight, (axes, ((), ())), precision=precision, preferred_element_type=out_dtype)
    return out if bias is None else with_bias(out, bias)


def with_bias(out: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product with a bias along its last axes."""
    # XLA would have cuBLAS add it, and for such products copies each layer's weights out of the stack.
    out = lax.optimization_barrier(out)
    return out + lax.broadcast_in_dim(bias, out.shape, range(out.ndim - bias.ndim, out.ndim))


def unembed(
    x: Float[Array, "*t d"],
    table: Float[Array, "v d"],
    bias: Float[Array, " v"] | None = None,
    *,
    is_batch_invariant: bool = False,
) -> Float[Array, "*t v"]:
    """Hidden states to float32 logits; `is_batch_invariant` as in `stacked_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    if is_batch_invariant:
        padded = jnp.pad(rows, ((0, -len(rows) % 8), (0, 0)))  # as the kernel takes them
        dtype = wide_dtype(x.dtype)
        logits = stacked_linear(
            padded, table[None], 0, dtype=dtype, is_transposed=True, is_batch_invariant=True
        )[: len(rows)]
        logits = logits if bias is None else with_bias(logits, widened(bias))
        return logits.reshape(*x.shape[:-1], len(table))
    # XLA computes one row with a float32 result as a float32 product, and converts the whole table for it.
    padded = jnp.pad(rows, ((0, 8 - len(rows)), (0, 0))) if len(rows) == 1 else rows
    wide_bias = None if bias is None else widened(bias)
    logits = linear(padded, table.T, wide_bias, out_dtype=wide_dtype(x.dtype))[: len(rows)]
    return logits.reshape(*x.shape[:-1], len(table))


def normalize(
    config: ModelConfig,
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None = None,
    *,
    num_axes: int = 1,
) -> Float[Array, "..."]:
    """The model's norm over the last `num_axes` axes; `weight` and `bias` are broadcast from the last on."""
    if config.norm == "layer":
        return layer_norm(x, weight, bias, eps=config.norm_eps, offset=config.norm_offset, num_axes=num_axes)
    assert bias is None, "an RMS norm has no bias"
    return rms_norm(x, weight, eps=config.norm_eps, offset=config.norm_offset, num_axes=num_axes)


def rms_norm(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | None,
    *,
    eps: float,
    offset: float = 0.0,
    num_axes: int = 1,
) -> Float[Array, "..."]:
    """Divides by the root mean square over the last axes, then scales by `weight`. Sums in float32.

    With an offset, which is added to the weight, the scaling too is in float32.
    """
    wide = widened(x)
    axes = tuple(range(-num_axes, 0))
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    if weight is None:
        return (wide * scale).astype(x.dtype)
    if offset:
        return (wide * scale * _trailing(offset + widened(weight), wide)).astype(x.dtype)
    return (wide * scale).astype(x.dtype) * _trailing(weight, x)


def layer_norm(
    x: Float[Array, "..."],
    weight: Float[Array, "..."] | None,
    bias: Float[Array, "..."] | None,
    *,
    eps: float,
    offset: float = 0.0,
    num_axes: int = 1,
) -> Float[Array, "..."]:
    """Over the last axes: less the mean, by the standard deviation, scaled and shifted; all in float32."""
    wide = widened(x)
    axes = tuple(range(-num_axes, 0))
    wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    if weight is not None:
        wide = wide * _trailing(offset + widened(weight), wide)
    if bias is not None:
        wide = wide + _trailing(widened(bias), wide)
    return wide.astype(x.dtype)


def _trailing(array: Array, like: Array) -> Array:
    """Broadcast to the shape of `like`, from the last axis on."""
    return jnp.broadcast_to(array, like.shape)


ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def gate(activation: Activation, gate_up: Float[Array, "*t 2 i"]) -> Float[Array, "*t i"]:
    """activation(gate) * up, where gate and up lie side by side."""
    return ACTIVATIONS[activation](gate_up[..., 0, :]) * gate_up[..., 1, :]


def soft_cap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Bends values smoothly into (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


def rotary_table(
    rope: RopeConfig, positions: Int[Array, "*t"], rope_lens: Int[Array, "*t"]
) -> tuple[Float[Array, "*t r"], Float[Array, "*t r"]]:
    """The cosines and sines that rotate each token's queries and keys, in float32.

    Float32 because bfloat16 rounds position 257 to 256, whose sine is another number altogether.
    `rope_lens` is the sequence length that dynamic scaling sees at each token: the prompt's length
    within the prompt, position + 1 after it; so a token's rotation never depends on the schedule.
    """
    if rope.kind == "longrope":
        short, amplitude = rope_frequencies(rope)
        long, _ = rope_frequencies(rope, is_long=True)
        shape = (*positions.shape, len(short))
        is_long = jnp.broadcast_to((rope_lens > rope.original_max_position_embeddings)[..., None], shape)
        inv_freq = jnp.where(is_long, jnp.broadcast_to(long, shape), jnp.broadcast_to(short, shape))
    elif rope.kind == "dynamic":
        length = jnp.maximum(rope_lens, rope.original_max_position_embeddings).astype(jnp.float32)
        base = dynamic_rope_theta(rope, length)
        exponent = jnp.arange(0, rope.rotary_dim, 2, dtype=jnp.float32) / rope.rotary_dim
        inv_freq = 1.0 / base[..., None] ** exponent.reshape((1,) * base.ndim + exponent.shape)
        amplitude = 1.0
    else:
        table, amplitude = rope_frequencies(rope)
        inv_freq = jnp.asarray(table, jnp.float32).reshape((1,) * positions.ndim + table.shape)
    angle = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * np.float32(amplitude), jnp.sin(angle) * np.float32(amplitude)
