"""The product for queries, keys and values in a decode step, which also rotates them and writes the KV cache."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels import rope_kv_write, skinny_linear
from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.last_split import Counters, finish_last
from pjengine.pallas_kernels.skinny_linear import (
    Normed,
    SkinnyTiles,
    add_splits,
    check_kernel_can,
    load_squares,
    product_sums,
)


class Destination(NamedTuple):
    """How the rows are rotated, and where their keys and values go: see `rope_kv_write`."""

    cos: Float[Array, "m r"]
    sin: Float[Array, "m r"]
    k_pages: Float[Array, "pages hk p d"]
    v_pages: Float[Array, "pages hk p d"]
    slots: Int[Array, " m"]
    page_offset: Int[Array, ""]


type Written = tuple[Float[Array, "m h d"], Float[Array, "pages hk p d"], Float[Array, "pages hk p d"]]


def skinny_qkv(
    x: Normed,
    weights: Float[Array, "layers k n"],
    layer: int | Int[Array, ""],
    destination: Destination,
    *,
    biases: Float[Array, "layers n"] | None = None,
    eps: float,
    counters: Counters | None = None,
    backend: str | None = None,
) -> Written:
    """`rope_kv_write` of `skinny_linear`: the rotated queries, and the caches with the rows' keys and values.

    Of the n columns, each KV head has its queries', its key's and its value's, in this order. `counters` as in
    `skinny_linear`.

    Raises:
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    """
    if not can_fuse(destination):
        qkv = skinny_linear.skinny_linear(
            x, weights, layer, biases=biases, eps=eps, counters=counters, backend=backend
        )
        _, num_kv_heads, _, head_dim = destination.k_pages.shape
        qkv = qkv.reshape(len(qkv), num_kv_heads, -1, head_dim)
        *args, page_offset = destination
        return rope_kv_write.rope_kv_write(qkv, *args, page_offset=page_offset, backend=backend)
    args = (x, weights, jnp.asarray(layer, jnp.int32), destination, biases)

    def triton(*, interpret: bool = False) -> Written:
        if counters is None:
            return skinny_qkv_triton(*args, eps=eps, interpret=interpret)[:3]
        *outs, counters.array = skinny_qkv_triton(*args, counters.array, eps=eps, interpret=interpret)
        return tuple(outs)

    return dispatch(
        "skinny_qkv",
        {
            "triton": triton,
            "reference": functools.partial(reference, *args, eps=eps),
            "triton_interpret": functools.partial(triton, interpret=True),
        },
        backend,
    )


def reference(
    x: Normed,
    weights: Float[Array, "layers k n"],
    layer: Int[Array, ""],
    destination: Destination,
    biases: Float[Array, "layers n"] | None,
    *,
    eps: float,
) -> Written:
    """The spec: one after the other."""
    (qkv,) = skinny_linear.reference(x, weights, layer, biases, None, eps=eps, is_gated=False)
    _, num_kv_heads, _, head_dim = destination.k_pages.shape
    return rope_kv_write.reference(qkv.reshape(len(qkv), num_kv_heads, -1, head_dim), *destination)


def can_fuse(destination: Destination) -> bool:
    """Whether heads are whole numbers of blocks, and rotated as a whole: else, there are two kernels."""
    head_dim = destination.k_pages.shape[3]
    is_rotated = 2 * destination.cos.shape[1] == head_dim
    return is_rotated and 16 <= head_dim <= 256 and head_dim == pl.next_power_of_2(head_dim)


@functools.partial(jax.jit, static_argnames=("eps", "tiles", "interpret"))
def skinny_qkv_triton(
    x: Normed,
    weights: Float[Array, "layers k n"],
    layer: Int[Array, ""],
    destination: Destination,
    biases: Float[Array, "layers n"] | None,
    counters: Int[Array, " c"] | None = None,
    *,
    eps: float,
    tiles: SkinnyTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """One program per block of columns and split; the last of a head's to be done rotates and writes it.

    Returns the counters too, at the end.

    Raises:
      NotImplementedError: what `skinny_linear` refuses, caches of another dtype, what `can_fuse` denies.
    """
    num_rows, k, n = len(x.scaled), weights.shape[1], weights.shape[2]
    cos, sin, k_pages, v_pages, slots, page_offset = destination
    _, num_kv_heads, _, head_dim = k_pages.shape
    if tiles is None:
        tiles = SkinnyTiles.choose(num_rows=num_rows, k=k, n=n, is_gated=False)
        tiles = replace(tiles, block_n=min(tiles.block_n, head_dim))
    check_kernel_can(x, weights, None, tiles, is_gated=False)
    if k_pages.dtype != x.scaled.dtype or v_pages.dtype != x.scaled.dtype:
        raise NotImplementedError(f"dtypes {k_pages.dtype}, {v_pages.dtype}: wanted {x.scaled.dtype} for all")
    if not can_fuse(destination) or head_dim % tiles.block_n:
        raise NotImplementedError(
            f"heads of {head_dim}: wanted all rotated, and a multiple of {tiles.block_n}"
        )
    num_heads = n // head_dim
    counts = jnp.zeros((num_heads,), jnp.int32) if counters is None else counters
    operands = [layer[None], x.scaled, weights, x.squares, cos, sin, slots, page_offset[None]]
    operands += [] if biases is None else [biases]
    aliased = len(operands)
    outs = pl.pallas_call(
        functools.partial(
            _kernel,
            tiles=tiles,
            block_m=max(16, pl.next_power_of_2(num_rows)),  # a tensor-core product has at least 16 rows
            has_biases=biases is not None,
            eps=eps,
            interpret=interpret,
        ),
        grid=(n // tiles.block_n, tiles.num_splits),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, num_heads - 2 * num_kv_heads, head_dim), x.scaled.dtype),
            jax.ShapeDtypeStruct((1, tiles.num_splits, num_rows, n), jnp.float32),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
            jax.ShapeDtypeStruct(counts.shape, counts.dtype),
        ],
        input_output_aliases={aliased: 2, aliased + 1: 3, aliased + 2: 4},
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="skinny_qkv",
    )(*operands, k_pages, v_pages, counts)
    return outs[0], outs[2], outs[3], outs[4]


def _kernel(
    layer_ref: Any,  # [1]
    x_ref: Any,  # [m, k]
    weights_ref: Any,  # [layers, k, n]
    squares_ref: Any,  # [parts, m]
    cos_ref: Any,  # [m, d / 2]
    sin_ref: Any,
    slots_ref: Any,  # [m]
    page_offset_ref: Any,  # [1]
    # The biases [layers, n], if any; the caches and counters as they come in; then the queries [m, h, d], the
    # splits' sums [1, splits, m, n], the caches [pages, hk, p, d] and the counters [heads or more].
    *refs: Any,
    tiles: SkinnyTiles,
    block_m: int,
    has_biases: bool,
    eps: float,
    interpret: bool,
) -> None:
    *_, q_ref, partial_ref, k_ref, v_ref, counters_ref = refs
    _, num_splits, num_rows, _ = partial_ref.shape
    _, num_kv_heads, page_size, head_dim = k_ref.shape
    group, half = q_ref.shape[1] // num_kv_heads, head_dim // 2
    block, split, layer = pl.program_id(0), pl.program_id(1), layer_ref[0]
    row, column = jnp.arange(block_m), block * tiles.block_n + jnp.arange(tiles.block_n)
    is_row = row < num_rows
    mask = is_row[:, None]
    (sums,) = product_sums(layer, x_ref, weights_ref, column, split, tiles, block_m)
    plt.store(partial_ref.at[0, split, row[:, None], column[None, :]], sums, mask=mask)
    blocks_per_head = head_dim // tiles.block_n
    head = lax.div(block, blocks_per_head)

    def finish() -> None:
        i = jnp.arange(half)
        squares = load_squares(squares_ref, row, is_row)
        cos = plt.load(cos_ref.at[row[:, None], i[None, :]], mask=mask, other=0.0)
        sin = plt.load(sin_ref.at[row[:, None], i[None, :]], mask=mask, other=0.0)
        slot = plt.load(slots_ref.at[row], mask=is_row, other=-1)
        halves = [head * head_dim + i, head * head_dim + half + i]
        plain = [add_splits(partial_ref, 0, row, column, mask) for column in halves]
        root = lax.rsqrt(squares.sum(axis=0) / x_ref.shape[1] + eps)
        plain = [part * root[:, None] for part in plain]
        if has_biases:
            loads = [plt.load(refs[0].at[layer, column]) for column in halves]
            plain = [
                part + load.astype(jnp.float32)[None, :] for part, load in zip(plain, loads, strict=True)
            ]
        first, second = (part.astype(q_ref.dtype).astype(jnp.float32) for part in plain)
        turned = [first * cos - second * sin, second * cos + first * sin]
        kv_head, member = lax.div(head, group + 2), lax.rem(head, group + 2)
        page, offset = lax.div(slot, page_size) + page_offset_ref[0], lax.rem(slot, page_size)
        is_kept = (slot >= 0)[:, None]
        for part, d in enumerate((i[None, :], half + i[None, :])):
            rotated = turned[part].astype(q_ref.dtype)
            at = (page[:, None], kv_head, offset[:, None], d)
            plt.store(
                q_ref.at[row[:, None], kv_head * group + member, d], rotated, mask=mask & (member < group)
            )
            plt.store(k_ref.at[at], rotated, mask=is_kept & (member == group))
            plt.store(v_ref.at[at], plain[part].astype(v_ref.dtype), mask=is_kept & (member > group))

    finish_last(counters_ref, head, blocks_per_head * num_splits, finish, interpret=interpret)
