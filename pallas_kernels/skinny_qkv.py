"""The product for queries, keys and values in a decode step: it rotates them and writes the KV cache too."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.last_split import Counters, counters_for, finish_last
from pjengine.pallas_kernels.rope_kv_write import reference as rope_kv_write_reference
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write
from pjengine.pallas_kernels.skinny_linear import (
    LARGE,
    MIN_PROGRAMS,
    Normed,
    SkinnyTiles,
    add_splits,
    check_product_can,
    load_squares,
    product_sums,
    skinny_linear,
)
from pjengine.pallas_kernels.skinny_linear import reference as product_reference


class Destination(NamedTuple):
    """How rows are rotated, and where their keys and values go: see `rope_kv_write`."""

    cos: Float[Array, "m r"]
    sin: Float[Array, "m r"]
    k_pages: Float[Array, "pages hk p d"]
    v_pages: Float[Array, "pages hk p d"]
    slots: Int[Array, " m"]
    page_offset: Int[Array, ""]

    def split_heads(self, qkv: Float[Array, "m n"]) -> Float[Array, "m hk g d"]:
        _, num_kv_heads, _, head_dim = self.k_pages.shape
        return qkv.reshape(len(qkv), num_kv_heads, -1, head_dim)

    def has_block_heads(self) -> bool:
        """Whether a head can be blocks of a kernel's columns, and is rotated as a whole."""
        head_dim = self.k_pages.shape[3]
        return 16 <= head_dim == pl.next_power_of_2(head_dim) == 2 * self.cos.shape[1]


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

    Of the n columns, each KV head has its queries', its key's and its value's, in this order. One kernel, or
    two where heads are no blocks. `counters` and `backend` as in `skinny_linear`; donated caches are updated
    in place. Equivalent to `reference`, which has a derivative; the kernel has none.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    """
    if not destination.has_block_heads():
        qkv = skinny_linear(x, weights, layer, biases=biases, eps=eps, counters=counters, backend=backend)
        *where, page_offset = destination
        heads = destination.split_heads(qkv)
        return rope_kv_write(heads, *where, page_offset=page_offset, backend=backend)
    args = (x, weights, jnp.asarray(layer, jnp.int32), destination, biases)
    lent = counters or Counters(weights.shape[2])

    def triton(*, interpret: bool) -> Written:
        q, k, v, lent.array = skinny_qkv_triton(*args, lent.array, eps=eps, interpret=interpret)
        return q, k, v

    return dispatch(
        "skinny_qkv",
        {
            "triton": functools.partial(triton, interpret=False),
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
    (qkv,) = product_reference(x, weights, layer, biases, None, eps=eps, is_gated=False)
    return rope_kv_write_reference(destination.split_heads(qkv), *destination)


def check_kernel_can(x: Normed, weights: Array, destination: Destination, tiles: SkinnyTiles) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: what `skinny_linear` refuses, caches of another dtype, heads that are no whole
        number of blocks, and dimensions that are not rotated.
    """
    check_product_can(x, weights, None, tiles, is_gated=False)
    dtypes = {x.scaled.dtype, destination.k_pages.dtype, destination.v_pages.dtype}
    if len(dtypes) > 1:
        raise NotImplementedError(f"dtypes {', '.join(sorted(map(str, dtypes)))}: wanted one for all")
    head_dim = destination.k_pages.shape[3]
    if not destination.has_block_heads() or head_dim % tiles.block_n:
        raise NotImplementedError(
            f"{2 * destination.cos.shape[1]} of {head_dim} dimensions rotated, blocks of {tiles.block_n}: "
            "wanted all, a power of two, and a multiple of the block"
        )


def choose_tiles(num_rows: int, k: int, n: int, head_dim: int) -> SkinnyTiles:
    """`SkinnyTiles.choose`, with blocks that are no wider than a head.

    A split of large products has 2,048 rows or more, where that leaves enough programs: what follows the
    last one, rotation and the write, is not divided.

    Raises:
      NotImplementedError: k or n is no multiple of a block.
    """
    tiles = SkinnyTiles.choose(num_rows=num_rows, k=k, n=n, is_gated=False)
    num_splits, num_blocks = tiles.num_splits, n // tiles.block_n
    while k * n >= LARGE and num_blocks * num_splits > MIN_PROGRAMS and k < 2048 * num_splits:
        num_splits //= 2
    return replace(tiles, block_n=min(tiles.block_n, head_dim), num_splits=num_splits)


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
) -> tuple[Array, Array, Array, Array]:
    """One program per block of columns and split; the last of a head to be done rotates and writes it.

    Returns queries, caches and counters: zeros, as they came, or of its own.

    Raises:
      NotImplementedError: see `check_kernel_can`.
      ValueError: fewer counters than heads.
    """
    num_rows, k, n = len(x.scaled), weights.shape[1], weights.shape[2]
    cos, sin, k_pages, v_pages, slots, page_offset = destination
    _, num_kv_heads, _, head_dim = k_pages.shape
    tiles = tiles or choose_tiles(num_rows, k, n, head_dim)
    check_kernel_can(x, weights, destination, tiles)
    counters = counters_for(n // head_dim, counters)
    operands = [layer[None], x.scaled, weights, x.squares, cos, sin, slots, page_offset[None]]
    operands += [] if biases is None else [biases]
    num_read = len(operands)
    num_heads = n // head_dim - 2 * num_kv_heads
    q, k_pages, v_pages, counters, _ = pl.pallas_call(
        functools.partial(
            _kernel,
            tiles=tiles,
            block_m=max(16, pl.next_power_of_2(num_rows)),  # a tensor-core product has at least 16 rows
            eps=eps,
            interpret=interpret,
        ),
        grid=(n // tiles.block_n, tiles.num_splits),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, num_heads, head_dim), x.scaled.dtype),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (k_pages, v_pages, counters)),
            jax.ShapeDtypeStruct((1, tiles.num_splits, num_rows, n), jnp.float32),
        ],
        input_output_aliases={num_read + i: 1 + i for i in range(3)},
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="skinny_qkv",
    )(*operands, k_pages, v_pages, counters)
    return q, k_pages, v_pages, counters


def _kernel(
    layer_ref: Any,  # [1]
    x_ref: Any,  # [m, k]
    weights_ref: Any,  # [layers, k, n]
    squares_ref: Any,  # [parts, m]
    cos_ref: Any,  # [m, d / 2]
    sin_ref: Any,
    slots_ref: Any,  # [m]
    page_offset_ref: Any,  # [1]
    # The biases [layers, n] if there are any; caches and counters as they come in; the queries [m, h, d]; the
    # caches [pages, hk, p, d]; the counters [heads or more]; the splits' sums [1, splits, m, n].
    *refs: Any,
    tiles: SkinnyTiles,
    block_m: int,
    eps: float,
    interpret: bool,
) -> None:
    *biases_ref, _, _, _, q_ref, k_ref, v_ref, counters_ref, partial_ref = refs
    _, num_kv_heads, page_size, head_dim = k_ref.shape
    group, half = q_ref.shape[1] // num_kv_heads, head_dim // 2
    block, split, layer = pl.program_id(0), pl.program_id(1), layer_ref[0]
    row, column = jnp.arange(block_m), block * tiles.block_n + jnp.arange(tiles.block_n)
    is_row = row < x_ref.shape[0]
    mask = is_row[:, None]
    (sums,) = product_sums(layer, x_ref, weights_ref, column, split, tiles, block_m)
    plt.store(partial_ref.at[0, split, row[:, None], column[None, :]], sums, mask=mask)
    blocks_per_head = head_dim // tiles.block_n
    head = lax.div(block, blocks_per_head)
    kv_head, member = lax.div(head, group + 2), lax.rem(head, group + 2)  # a query, the key or the value

    def finish() -> None:
        i = jnp.arange(half)
        squares = load_squares(squares_ref, row, is_row)
        cos, sin = (
            plt.load(ref.at[row[:, None], i[None, :]], mask=mask, other=0.0) for ref in (cos_ref, sin_ref)
        )
        slot = plt.load(slots_ref.at[row], mask=is_row, other=-1)
        columns = [head * head_dim + i, head * head_dim + half + i]
        plain = [add_splits(partial_ref, 0, row, column, mask) for column in columns]
        root = lax.rsqrt(squares.sum(axis=0) / x_ref.shape[1] + eps)
        plain = [part * root[:, None] for part in plain]
        if biases_ref:
            loads = [plt.load(biases_ref[0].at[layer, column]) for column in columns]
            plain = [
                part + load.astype(jnp.float32)[None, :] for part, load in zip(plain, loads, strict=True)
            ]
        first, second = (part.astype(q_ref.dtype).astype(jnp.float32) for part in plain)
        turned = [first * cos - second * sin, second * cos + first * sin]
        page, offset = lax.div(slot, page_size) + page_offset_ref[0], lax.rem(slot, page_size)
        is_kept = (slot >= 0)[:, None]
        for part, d in enumerate((i[None, :], half + i[None, :])):
            rotated, value = turned[part].astype(q_ref.dtype), plain[part].astype(v_ref.dtype)
            at = (page[:, None], kv_head, offset[:, None], d)
            to_query = q_ref.at[row[:, None], kv_head * group + member, d]
            plt.store(to_query, rotated, mask=mask & (member < group))
            plt.store(k_ref.at[at], rotated, mask=is_kept & (member == group))
            plt.store(v_ref.at[at], value, mask=is_kept & (member > group))

    num_programs = blocks_per_head * tiles.num_splits
    finish_last(counters_ref, head, num_programs, finish, interpret=interpret)
