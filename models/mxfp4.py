"""MXFP4: numbers of four bits, 32 of which share a scale of eight.

Source: Open Compute Project, Microscaling Formats (MX) v1.0: elements E2M1, scales E8M0.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pjengine.models.weight_table import Leaf, Source

BLOCK = 32  # elements that share a scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))  # by code: the highest bit is the sign


def unpack_mxfp4(
    blocks: UInt8[Array, "*n b 16"], scales: UInt8[Array, "*n b"], dtype: Any
) -> Float[Array, "*n 32*b"]:
    """Packed numbers to those they stand for: of each byte, the lower four bits come first.

    A scale is a power of 2, from 2**-127 for 0 to 2**127 for 254; 255 means that its block is not a number.
    """
    codes = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = jnp.asarray(_VALUES, jnp.float32)[codes]
    exponents = jnp.broadcast_to(scales.astype(jnp.int32)[..., None] - 127, values.shape)
    scaled = jnp.where(exponents == 128, jnp.nan, jnp.ldexp(values, exponents))
    return scaled.reshape(*scales.shape[:-1], -1).astype(dtype)


def mxfp4_leaf(name: str, shape: tuple[int, ...], transpose: tuple[int, ...]) -> Leaf:
    """A parameter that lies in two tensors, "{name}_blocks" and "{name}_scales".

    Args:
      shape: unpacked; the last axis is the packed one.
      transpose: is done last.
    """
    *rows, size = shape
    num_blocks = (*rows, size // BLOCK)

    def unpack(parts: tuple[Array, ...], dtype: Any) -> Array:
        blocks, scales = parts
        return unpack_mxfp4(blocks, scales, dtype).transpose(transpose)

    return Leaf(
        sources=(
            Source(name=f"{name}_blocks", reshape=(*num_blocks, BLOCK // 2)),
            Source(name=f"{name}_scales", reshape=num_blocks),
        ),
        unpack=unpack,
    )
