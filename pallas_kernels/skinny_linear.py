"""Products of few rows with a layer's weights, as a decode step makes them: bytes in flight are what counts.

The weights are read where they lie in the stack of all layers, so no layer is ever copied out of it. What
would be a kernel of its own between two products belongs to one of them. RMSNorm is split in two for that:
the product that makes a residual stream also gives it scaled by the norm's weight, and its sums of squares
(`Normed`); the next product divides its sums by the root mean square.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.last_split import Counters, counters_for, finish_last

MAX_ROWS = 32  # with 64, cuBLAS is faster on an H200


class Normed(NamedTuple):
    """RMSNorm of some rows whose last factor is not applied yet: each row divided by its root mean square."""

    scaled: Float[Array, "m k"]  # the rows times the norm's weight
    squares: Float[Array, "parts m"]  # of the rows before that; their sum over the parts is what counts


class Residual(NamedTuple):
    """Rows that a product is added to, and the weight of the norm that the sum is to be prepared for."""

    rows: Float[Array, "m n"]
    norm_weights: Float[Array, "norms n"]
    norm: int | Int[Array, ""]  # which of them


def skinny_linear(
    x: Float[Array, "m k"] | Normed,
    weights: Float[Array, "layers k n"],
    layer: int | Int[Array, ""],
    *,
    biases: Float[Array, "layers n"] | None = None,
    eps: float = 0.0,
    is_gated: bool = False,
    counters: Counters | None = None,
    backend: str | None = None,
) -> Float[Array, "m out"]:
    """`x @ weights[layer] + biases[layer]`, summed in float32. The kernel has no derivative.

    Args:
      x: rows, or rows whose norm the product finishes with `eps`.
      weights: of all layers; no other layer than `layer` is read.
      is_gated: the first half of the n columns are gates: gives `silu(gates) * others`, n / 2 columns.
      counters: of the step, at least one for each block of columns; None for zeros of its own, which take a
        kernel.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: x and weights do not belong together, or no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: RMSNorm, Zhang & Sennrich 2019; gates, Shazeer 2020 (SwiGLU).
    """
    (out,) = _dispatch(x, weights, layer, biases, None, counters, eps=eps, is_gated=is_gated, backend=backend)
    return out


def skinny_residual(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers k n"],
    layer: int | Int[Array, ""],
    residual: Residual,
    *,
    biases: Float[Array, "layers n"] | None = None,
    counters: Counters | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "m n"], Normed]:
    """Adds `x @ weights[layer] + biases[layer]` to the residual rows, and starts the norm of the sum.

    Returns the new rows, and what the next product takes. `counters` and `backend` as in `skinny_linear`.

    Raises:
      ValueError: x and weights do not belong together, or no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    """
    rows, scaled, squares = _dispatch(
        x, weights, layer, biases, residual, counters, eps=0.0, is_gated=False, backend=backend
    )
    return rows, Normed(scaled, squares)


def start_norm(x: Float[Array, "m k"], weight: Float[Array, " k"]) -> Normed:
    """The norm of rows that no `skinny_residual` made."""
    wide = x.astype(jnp.float32)
    scaled = (wide * weight.astype(jnp.float32)[None]).astype(x.dtype)
    return Normed(scaled, jnp.sum(wide * wide, axis=-1)[None])


def _dispatch(
    x: Array | Normed,
    weights: Array,
    layer: int | Array,
    biases: Array | None,
    residual: Residual | None,
    counters: Counters | None,
    *,
    eps: float,
    is_gated: bool,
    backend: str | None,
) -> tuple[Array, ...]:
    rows = x.scaled if isinstance(x, Normed) else x
    if rows.shape[1] != weights.shape[1]:
        raise ValueError(f"x has {rows.shape[1]} columns, the weights {weights.shape[1]} rows: must be equal")
    args = (x, weights, jnp.asarray(layer, jnp.int32), biases, residual)
    options: dict[str, Any] = {"eps": eps, "is_gated": is_gated}
    lent = counters or Counters(weights.shape[2])

    def triton(*, interpret: bool) -> tuple[Array, ...]:
        *outs, lent.array = skinny_triton(*args, lent.array, **options, interpret=interpret)
        return tuple(outs)

    return dispatch(
        "skinny_linear",
        {
            "triton": functools.partial(triton, interpret=False),
            "reference": functools.partial(reference, *args, **options),
            "triton_interpret": functools.partial(triton, interpret=True),
        },
        backend,
    )


def reference(
    x: Float[Array, "m k"] | Normed,
    weights: Float[Array, "layers k n"],
    layer: Int[Array, ""],
    biases: Float[Array, "layers n"] | None,
    residual: Residual | None,
    *,
    eps: float,
    is_gated: bool,
) -> tuple[Float[Array, "..."], ...]:
    """The spec: the product in float32, then each of the steps asked for."""
    rows = x.scaled if isinstance(x, Normed) else x
    out = jnp.dot(rows, weights[layer], precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    if isinstance(x, Normed):
        out = out * lax.rsqrt(x.squares.sum(axis=0) / rows.shape[1] + eps)[:, None]
    if biases is not None:
        out = out + biases[layer].astype(jnp.float32)[None]
    if is_gated:
        gates, others = jnp.split(out, 2, axis=1)
        out = jax.nn.silu(gates) * others
    if residual is None:
        return (out.astype(rows.dtype),)
    sums = (out + residual.rows.astype(jnp.float32)).astype(rows.dtype)
    return sums, *start_norm(sums, residual.norm_weights[residual.norm])


MIN_PROGRAMS = 96  # fewer leave processors without work
LARGE = 2**23  # weights of a product; of smaller ones than the halves that were measured nothing is known


@dataclass(frozen=True, kw_only=True)
class SkinnyTiles:
    """How the product is cut: every field is a static choice, one compiled kernel each."""

    block_n: int  # columns of a program; with gates, of each half
    block_k: int  # rows of the weights in one step of the loop
    num_splits: int = 1  # programs that share the sums of one block of columns
    num_warps: int = 4
    num_stages: int = 4  # steps of the loop that are in flight, and one

    @classmethod
    def choose(cls, *, num_rows: int, k: int, n: int, is_gated: bool) -> "SkinnyTiles":
        """Picks tiles for `num_rows` by `k` times `k` by `n` (with gates, n is one half).

        Measured on an H200 with the four products of llama-8b and 1, 8, 16 and 32 rows, bfloat16: of the 7
        to 10 tiles tried for each, the best or within 4 % of it (4096 x 4096 with 16 rows: 9 %). The halves
        that each of two devices has of these products, with 1 and 32 rows: of 21 to 56 tiles, within 5 %.

        Raises:
          NotImplementedError: k or n is no multiple of a block.
        """
        is_narrow, is_large = num_rows <= 4, k * n >= LARGE
        if is_gated and is_large and n < MIN_PROGRAMS * 128:
            warps = 4 if is_narrow else 8
            tiles = cls(block_n=64, block_k=64, num_warps=warps, num_stages=6)
        elif is_gated and is_narrow:
            tiles = cls(block_n=64, block_k=64, num_stages=3)
        elif is_gated:
            tiles = cls(block_n=128, block_k=64, num_warps=8, num_stages=4)
        elif k > 2 * n:
            tiles = cls(block_n=64, block_k=128, num_splits=2, num_stages=6)
        elif k > n >= 4096 and k % 512 == 0 and n % 128 == 0:
            block_k, stages = (64, 4) if is_narrow else (128, 3)
            tiles = cls(block_n=128, block_k=block_k, num_splits=4, num_stages=stages)
        else:
            block_k, num_splits = 128 if is_narrow else 64, 1
            while num_splits < 8 and n // 64 * num_splits < 192 and k % (2 * num_splits * block_k) == 0:
                if is_large and n // 64 * num_splits >= MIN_PROGRAMS and k // num_splits < 2048:
                    break  # the next splits would have fewer than 1,024 rows
                num_splits *= 2
            stages = 4 if is_narrow else 6
            tiles = cls(block_n=64, block_k=block_k, num_splits=num_splits, num_stages=stages)
        tiles.check(k=k, n=n)
        return tiles

    def check(self, *, k: int, n: int) -> None:
        """Refuses sizes that these tiles do not divide.

        Raises:
          NotImplementedError: they do not.
        """
        if k % (self.block_k * self.num_splits) or n % self.block_n:
            raise NotImplementedError(f"{k} x {n} weights: wanted multiples of {self}")


def check_product_can(
    x: Array | Normed, weights: Array, residual: Residual | None, tiles: SkinnyTiles, *, is_gated: bool
) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16 and float16, more than MAX_ROWS rows,
        sizes that are no multiples of the tiles, a `Normed` or a `Residual` in float16 (rows that are not
        yet divided by their root mean square may leave its range).
    """
    rows = x.scaled if isinstance(x, Normed) else x
    if rows.dtype != weights.dtype or rows.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"dtypes {rows.dtype}, {weights.dtype}: wanted bfloat16 or float16 for both"
        )
    if rows.dtype == jnp.float16 and (isinstance(x, Normed) or residual is not None):
        raise NotImplementedError("float16 with a norm: wanted bfloat16, which has the range")
    if len(rows) > MAX_ROWS:
        raise NotImplementedError(f"{len(rows)} rows: at most {MAX_ROWS}")
    k, n = weights.shape[1], weights.shape[2] // (1 + is_gated)
    tiles.check(k=k, n=n)


@functools.partial(jax.jit, static_argnames=("eps", "is_gated", "tiles", "interpret"))
def skinny_triton(
    x: Float[Array, "m k"] | Normed,
    weights: Float[Array, "layers k n"],
    layer: Int[Array, ""],
    biases: Float[Array, "layers n"] | None,
    residual: Residual | None,
    counters: Int[Array, " c"] | None = None,
    *,
    eps: float,
    is_gated: bool,
    tiles: SkinnyTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """One program per block of columns and split; the last split of a block to be done adds up its sums.

    Returns the counters too, at the end, if they are given. The jit is there so that the layers of a model
    share one trace: the layer is an operand, so the compiled kernel is one too.

    Raises:
      NotImplementedError: see `check_product_can`.
      ValueError: fewer counters than blocks.
    """
    rows, squares = x if isinstance(x, Normed) else (x, None)
    num_rows, k, n = len(rows), weights.shape[1], weights.shape[2] // (1 + is_gated)
    tiles = tiles or SkinnyTiles.choose(num_rows=num_rows, k=k, n=n, is_gated=is_gated)
    check_product_can(x, weights, residual, tiles, is_gated=is_gated)
    extras = _extras_of(squares, biases, residual)
    operands = [layer[None], rows, weights, *extras.values()]
    outs = [jax.ShapeDtypeStruct((num_rows, n), rows.dtype)]
    if residual is not None:
        parts = jax.ShapeDtypeStruct((n // tiles.block_n, num_rows), jnp.float32)
        outs = [outs[0], outs[0], parts]
    num_results, aliases = len(outs), {}
    if tiles.num_splits > 1:
        counts = counters_for(n // tiles.block_n, counters)
        aliases = {len(operands): num_results + 1}
        operands.append(counts)
        partial = jax.ShapeDtypeStruct((1 + is_gated, tiles.num_splits, num_rows, n), jnp.float32)
        outs += [partial, jax.ShapeDtypeStruct(counts.shape, counts.dtype)]
    results = pl.pallas_call(
        functools.partial(
            _kernel,
            names=tuple(extras),
            tiles=tiles,
            block_m=max(16, pl.next_power_of_2(num_rows)),  # a tensor-core product has at least 16 rows
            is_gated=is_gated,
            interpret=interpret,
            mean_of=k,
            eps=eps,
        ),
        grid=(n // tiles.block_n, tiles.num_splits),
        out_shape=outs,
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="skinny_linear",
    )(*operands)
    returned = () if counters is None else (results[-1] if aliases else counters,)
    return (*results[:num_results], *returned)


def _extras_of(squares: Array | None, biases: Array | None, residual: Residual | None) -> dict[str, Array]:
    """What `_finish` reads, by its names for it."""
    extras = {"squares": squares, "biases": biases}
    if residual is not None:
        norm = jnp.asarray(residual.norm, jnp.int32)[None]
        extras |= {"residual": residual.rows, "norm": norm, "norm_weights": residual.norm_weights}
    return {name: extra for name, extra in extras.items() if extra is not None}


def _kernel(
    layer_ref: Any,  # [1]
    x_ref: Any,  # [m, k]
    weights_ref: Any,  # [layers, k, n], or [layers, k, 2 n] with gates
    # Those of `names`, then the results (see `_finish`). Of several splits: before the results the counters
    # as they come in; after them the splits' sums [1 or 2, splits, m, n], and the counters [blocks or more].
    *refs: Any,
    names: tuple[str, ...],
    tiles: SkinnyTiles,
    block_m: int,
    is_gated: bool,
    interpret: bool,
    **options: Any,
) -> None:
    block, split = pl.program_id(0), pl.program_id(1)
    row, column = jnp.arange(block_m), block * tiles.block_n + jnp.arange(tiles.block_n)
    is_row = row < x_ref.shape[0]
    at, mask = (block, row, column, is_row), is_row[:, None]
    extras, outs = dict(zip(names, refs, strict=False)), refs[len(names) :]

    def load() -> Any:
        return load_squares(extras["squares"], row, is_row) if "squares" in extras else None

    # Asked for before the loop and used after it: never waited for.
    squares = load() if tiles.num_splits == 1 else None
    sums = product_sums(layer_ref[0], x_ref, weights_ref, column, split, tiles, block_m, is_gated=is_gated)
    if tiles.num_splits == 1:
        _finish(sums, layer_ref, extras, outs, squares=squares, at=at, **options)
        return
    _, *results, partial_ref, counters_ref = outs
    for part, sum_ in enumerate(sums):
        plt.store(partial_ref.at[part, split, row[:, None], column[None, :]], sum_, mask=mask)

    def finish() -> None:
        totals = tuple(add_splits(partial_ref, part, row, column, mask) for part in range(1 + is_gated))
        _finish(totals, layer_ref, extras, results, squares=load(), at=at, **options)

    finish_last(counters_ref, block, tiles.num_splits, finish, interpret=interpret)


def product_sums(
    layer: Any,
    x_ref: Any,  # [m, k]
    weights_ref: Any,  # [layers, k, n], or [layers, k, 2 n] with gates
    column: Any,
    split: Any,
    tiles: SkinnyTiles,
    block_m: int,
    *,
    is_gated: bool = False,
) -> tuple[Any, ...]:
    """The split's share of the sums of some columns: a tile [block_m, block_n]; two with gates."""
    num_rows, k = x_ref.shape[0], weights_ref.shape[1]
    n = weights_ref.shape[2] // (1 + is_gated)
    split_k, row = k // tiles.num_splits, jnp.arange(block_m)

    def body(i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        at = split * split_k + i * tiles.block_k + jnp.arange(tiles.block_k)
        x = plt.load(x_ref.at[row[:, None], at[None, :]], mask=(row < num_rows)[:, None], other=0.0)

        def add(part: int, sum_: Any) -> Any:
            w = plt.load(weights_ref.at[layer, at[:, None], (part * n + column)[None, :]])
            return sum_ + jnp.dot(x, w, preferred_element_type=jnp.float32)

        return tuple(add(part, sum_) for part, sum_ in enumerate(sums))

    zeros = jnp.zeros((block_m, tiles.block_n), jnp.float32)
    return lax.fori_loop(0, split_k // tiles.block_k, body, (zeros,) * (1 + is_gated))


def add_splits(partial_ref: Any, part: int, row: Any, column: Any, mask: Any) -> Any:
    """The sum over the splits of [parts, splits, m, n], in their order, whichever came last."""

    def load(split: int) -> Any:
        return plt.load(partial_ref.at[part, split, row[:, None], column[None, :]], mask=mask, other=0.0)

    return functools.reduce(jnp.add, [load(split) for split in range(partial_ref.shape[1])])


def load_squares(squares_ref: Any, row: Any, is_row: Any) -> Any:
    num_parts = squares_ref.shape[0]
    part = jnp.arange(pl.next_power_of_2(num_parts))
    mask = (part < num_parts)[:, None] & is_row[None, :]
    return plt.load(squares_ref.at[part[:, None], row[None, :]], mask=mask, other=0.0)


def _finish(
    sums: tuple[Any, ...],  # one tile [block_m, block_n]; two with gates
    layer_ref: Any,
    # squares [parts, m], biases [layers, n], residual [m, n], norm [1], norm_weights [norms, n]
    extras: dict[str, Any],
    outs: Any,  # [m, n]; with a residual also the scaled rows [m, n] and the squares [blocks, m]
    *,
    squares: Any,
    at: tuple[Any, Any, Any, Any],
    mean_of: int,
    eps: float,
) -> None:
    """What follows the product, tile by tile."""
    block, row, column, is_row = at
    tile, mask = (row[:, None], column[None, :]), is_row[:, None]
    out_dtype, n = outs[0].dtype, outs[0].shape[1]
    if squares is not None:
        root = lax.rsqrt(squares.sum(axis=0) / mean_of + eps)
        sums = tuple(sum_ * root[:, None] for sum_ in sums)
    if "biases" in extras:
        loads = [plt.load(extras["biases"].at[layer_ref[0], part * n + column]) for part in range(len(sums))]
        sums = tuple(sum_ + load.astype(jnp.float32)[None, :] for sum_, load in zip(sums, loads, strict=True))
    out = sums[0] if len(sums) == 1 else sums[0] * jax.nn.sigmoid(sums[0]) * sums[1]
    if "residual" in extras:
        residual = plt.load(extras["residual"].at[tile], mask=mask, other=0.0)
        out = (out + residual.astype(jnp.float32)).astype(out_dtype).astype(jnp.float32)
        weight = plt.load(extras["norm_weights"].at[extras["norm"][0], column])
        scaled = out * weight.astype(jnp.float32)[None, :]
        plt.store(outs[1].at[tile], scaled.astype(out_dtype), mask=mask)
        plt.store(outs[2].at[block, row], (out * out).sum(axis=1), mask=is_row)
    plt.store(outs[0].at[tile], out.astype(out_dtype), mask=mask)
