"""A product of many rows by a layer's weights, read where they lie in the stack of all layers.

For Hopper, in Pallas's Mosaic GPU lowering. The k axis is cut into equal parts, each part is summed from its
first row to its last, and the parts are added in their order. Either one program makes all parts of a block
and adds them in registers, or each part is made by a program of its own, and XLA adds them in the kernel that
has their sum to read anyway. Of a program's three warpgroups one copies tiles into a ring, and two multiply,
as in `gated_linear`.

The number of parts decides about the bits, and nothing else that is chosen does: blocks are of any size. A
product that is batch-invariant, as the field says, has as many parts as its weights' shape says; a row then
has the same bits among any others. A library takes another kernel for another shape, and may take with it
another order of sums. This stands on tensor cores that add up an element alike in a block of any width, which
the kernel's GPU test tries.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import check_hopper, dispatch
from pjengine.pallas_kernels.gated_linear import wait_until_read

_WGS = 2  # warpgroups that multiply; the one after them loads
_WG_ROWS = 64  # of a warpgroup: what one wgmma has
_BLOCK_K = 64  # numbers of k in a step: a row of x is then one swizzled line of 128 bytes
_LINE_BYTES = 128  # of a row of a piece of the result
_OUT_PIECES = 2  # that a warpgroup has on their way to memory
_RING_BYTES = 194 << 10  # of the 227 KiB that a program may have; the pieces take 32
_SPLITS = (1, 2, 4)
_ROW_COUNTS = (64, 128, 256, 512)  # what the number of parts is chosen for where it is fixed
_LEAST_BYTES = 32 << 20  # of weights: with less the two are alike

type _Shaped = Array | jax.ShapeDtypeStruct
type _Place = tuple[Any, Any, Any]  # of a piece of work: part of k, first row and column


def stacked_linear(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers rows columns"],
    layer: int | Int[Array, ""],
    *,
    dtype: DTypeLike | None = None,
    is_transposed: bool = False,
    is_batch_invariant: bool = False,
    backend: str | None = None,
) -> Float[Array, "m n"]:
    """`x @ weights[layer]`, summed in float32.

    The kernel has no derivative; `reference` has. Aliases nothing.

    Args:
      x: rows of tokens.
      weights: of all layers, [layers, k, n]; no other layer than `layer` is read.
      dtype: of the result; None for that of x.
      is_transposed: weights are [layers, n, k], as those of a head are stored.
      is_batch_invariant: a row has the same bits with any number of other rows and in any place among them,
        by the kernel; by `reference` it is left to XLA whether it has.
      backend: None to let `dispatch` choose, which leaves to the library what was measured to be as fast
        there, unless it has to be batch-invariant.

    Raises:
      ValueError: x and weights do not belong together, or no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: He et al. 2025 (Defeating Nondeterminism in LLM Inference), for what it is called and needed for.
    """
    k = weights.shape[2 if is_transposed else 1]
    if x.shape[1] != k:
        raise ValueError(f"x has {x.shape[1]} columns: wanted {k}, as weights {weights.shape} are to have")
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype or x.dtype), "is_transposed": is_transposed}
    args = (x, weights, jnp.asarray(layer, jnp.int32))
    mosaic = functools.partial(stacked_mosaic, *args, is_batch_invariant=is_batch_invariant, **options)

    def where_it_pays() -> Float[Array, "m n"]:
        if backend is None and not is_batch_invariant:
            check_stacked_pays(x, weights)
        return mosaic()

    implementations: dict[str, Callable[[], Array]] = {
        "mosaic": where_it_pays,
        # An int stays a static slice.
        "reference": functools.partial(reference, x, weights, layer, **options),
        "mosaic_interpret": functools.partial(mosaic, interpret=plgpu.InterpretGPUParams()),
    }
    return dispatch("stacked_linear", implementations, backend)


def reference(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers rows columns"],
    layer: int | Int[Array, ""],
    *,
    dtype: DTypeLike,
    is_transposed: bool,
) -> Float[Array, "m n"]:
    """The spec of the numbers, not of their bits: the library's sums may depend on the number of rows."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        weights[layer],
        (((1,), (1 if is_transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=None if dtype == x.dtype else dtype,  # the same type, said, is another product
    )


@dataclass(frozen=True, kw_only=True)
class StackedTiles:
    """How the kernel cuts its work. Every field is a static choice; `num_splits` alone alters bits.

    A block of 128 rows has 64 for each warpgroup; one of 64 has half of the columns for each.
    """

    num_splits: int = 1  # parts that k has
    is_split: bool = False  # a part is a program's work; else all parts of a block, one after the other
    block_m: int = 128
    block_n: int = 128
    num_stages: int = 4  # steps that are on the processor
    group_m: int = 8  # blocks one below the other that are made before the next columns
    num_programs: int = 132  # as many as processors: each takes its share of the work

    @classmethod
    def choose(cls, *, num_rows: int, k: int, n: int, num_splits: int | None = None) -> "StackedTiles":
        """Picks the tiles of the least `estimate_us`, of so many parts, or of any number.

        Raises:
          NotImplementedError: no number of parts has whole steps, or columns are no multiple of a block's.
        """
        splits = [num for num in _SPLITS if k % (_BLOCK_K * num) == 0 and num_splits in (None, num)]
        choices = [tiles for num in splits for tiles in cls.choices(num_rows, n, num)]
        if not choices:
            raise NotImplementedError(f"mosaic: {k} x {n} weights: wanted multiples of {_BLOCK_K} and 128")
        return min(choices, key=lambda tiles: tiles.estimate_us(num_rows=num_rows, k=k, n=n))

    @classmethod
    def choices(cls, num_rows: int, n: int, num_splits: int) -> "Iterator[StackedTiles]":
        """Those that fit into shared memory and registers. Of more than 128 rows low blocks are slower."""
        heights = (64, 128) if num_rows <= 128 else (128,)
        for block_m, block_n, is_split in itertools.product(heights, (128, 192, 256), (False, True)):
            # Half of the columns is one swizzled line or more; beside its part's sum a thread has the total.
            is_cut = block_m == 64 and block_n % 128 != 0
            has_two_sums = num_splits > 1 and not is_split
            is_too_large = has_two_sums and block_m * block_n > 128 * 192
            if n % block_n == 0 and not is_cut and not is_too_large and not (is_split and num_splits == 1):
                num_stages = _RING_BYTES // (2 * _BLOCK_K * (block_m + block_n))
                yield cls(
                    num_splits=num_splits,
                    is_split=is_split,
                    block_m=block_m,
                    block_n=block_n,
                    num_stages=num_stages,
                )

    def estimate_us(self, *, num_rows: int, k: int, n: int) -> tuple[float, float]:
        """Microseconds of a product, and without the limit that memory sets, which decides between equals.

        A step takes a processor its share of 858 TFLOP/s, or the programs that run theirs of 12.5 TB/s from
        the L2 cache, and a block 0.19 us beside; weights come from memory at 3.69 TB/s. Parts are written and
        read again at 5.5 TB/s in all, and their sum is a kernel more: 1.9 us. These are fitted to 206 times
        of two H200s, 64 to 1024 rows of llama-8b's products, whole and halved, each with 9 us beside: the
        estimate is off by 7.5 % (root mean square), and what it chooses takes in the mean 1 % more than
        the fastest, at most 7 %.
        """
        parts = self.num_splits if self.is_split else 1
        items = pl.cdiv(num_rows, self.block_m) * (n // self.block_n) * parts
        multiply = 2 * self.block_m * self.block_n * _BLOCK_K / (858e6 / 132)
        # One program alone has at most a ninetieth of that rate.
        load = 2 * (self.block_m + self.block_n) * _BLOCK_K * max(90, min(items, self.num_programs)) / 12.5e6
        own = pl.cdiv(items, self.num_programs) * (k / _BLOCK_K / parts * max(multiply, load) + 0.19)
        add = 1.9 + 8 * parts * num_rows * n / 5.5e6 if self.is_split else 0.0
        return max(own, 2 * k * n / 3.69e6) + add, own + add


@functools.cache
def choose_splits(k: int, n: int) -> int:
    """Into how many parts k is cut where nothing but the weights' shape may have a say.

    The number with the least time for 64, 128, 256 and 512 rows together, by the tiles' estimate.

    Raises:
      NotImplementedError: see `StackedTiles.choose`.
    """

    def total_us(num_splits: int) -> float:
        sizes = [{"num_rows": m, "k": k, "n": n} for m in _ROW_COUNTS]
        tiles = [StackedTiles.choose(**each, num_splits=num_splits) for each in sizes]
        return sum(own.estimate_us(**each)[0] for own, each in zip(tiles, sizes, strict=True))

    return min((num for num in _SPLITS if num == 1 or k % (_BLOCK_K * num) == 0), key=total_us)


def check_stacked_pays(x: Array, weights: Array) -> None:
    """Refuses what the library was measured to be as fast at in an engine, or was not measured at all.

    The library's products add to the residual stream. Alone, as `pjengine bench kernels` has them, the kernel
    is faster at more sizes.

    Raises:
      NotImplementedError: rows other than 65 to 128 and more than 1024, or less than 32 MiB of weights in a
        layer.
    """
    num_bytes = weights.nbytes // len(weights)
    if not (64 < len(x) <= 128 or len(x) > 1024) or num_bytes < _LEAST_BYTES:
        raise NotImplementedError(
            f"mosaic: {len(x)} rows, {num_bytes} bytes of weights: "
            f"wanted 65 to 128 or more than 1024, and {_LEAST_BYTES} or more"
        )


def check_stacked_can(x: _Shaped, weights: _Shaped, dtype: DTypeLike, *, is_transposed: bool) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16 and float16, results of another dtype than
        x or float32, k no multiple of 64 or n of 128, a number of rows that is no multiple of 8.
    """
    if x.dtype != weights.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic: dtypes {x.dtype}, {weights.dtype}: wanted bfloat16 or float16 for both"
        )
    if jnp.dtype(dtype) not in (x.dtype, jnp.float32):
        raise NotImplementedError(f"mosaic: results in {dtype}: wanted {x.dtype} or float32")
    k, n = _sizes(weights, is_transposed=is_transposed)
    if k % _BLOCK_K or n % 128:
        raise NotImplementedError(f"mosaic: {k} x {n} weights: wanted multiples of {_BLOCK_K} and 128")
    if x.shape[0] % 8:
        raise NotImplementedError(f"mosaic: {x.shape[0]} rows: wanted a multiple of 8")


def _sizes(weights: _Shaped, *, is_transposed: bool) -> tuple[int, int]:
    """k and n."""
    _, k, n = weights.shape
    return (n, k) if is_transposed else (k, n)


@functools.partial(
    jax.jit, static_argnames=("dtype", "is_transposed", "is_batch_invariant", "tiles", "interpret")
)
def stacked_mosaic(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers rows columns"],
    layer: Int[Array, ""],
    *,
    dtype: DTypeLike,
    is_transposed: bool = False,
    is_batch_invariant: bool = False,
    tiles: StackedTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "m n"]:
    """`stacked_linear` as one program per processor, each with its share of the blocks or parts.

    The jit is there so that the layers of a model share one trace. `interpret` runs the kernel on a CPU.

    Raises:
      NotImplementedError: the device is no Hopper GPU, or see `check_stacked_can`.
    """
    if interpret is None:
        check_hopper()
    check_stacked_can(x, weights, dtype, is_transposed=is_transposed)
    k, n = _sizes(weights, is_transposed=is_transposed)
    if tiles is None:
        num_splits = choose_splits(k, n) if is_batch_invariant else None
        tiles = StackedTiles.choose(num_rows=len(x), k=k, n=n, num_splits=num_splits)
    blocks = pl.cdiv(len(x), tiles.block_m), n // tiles.block_n
    num_outs = tiles.num_splits if tiles.is_split else 1
    num_items = blocks[0] * blocks[1] * num_outs
    num_programs = min(tiles.num_programs, num_items)
    out_dtype = jnp.float32 if tiles.is_split else dtype
    kernel = plgpu.kernel(
        functools.partial(
            _stacked_kernel,
            tiles=tiles,
            blocks=blocks,
            num_programs=num_programs,
            is_transposed=is_transposed,
        ),
        out_type=jax.ShapeDtypeStruct((num_outs, len(x), n), out_dtype),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=_WGS + 1,
        thread_name="wg",
        kernel_name="stacked_linear_mosaic",
        scratch_types=_scratch(tiles, x.dtype, out_dtype, is_transposed=is_transposed),
        interpret=interpret,
    )
    outs = kernel(layer[None], x, weights)
    return _rounded(functools.reduce(jnp.add, list(outs)), dtype) if tiles.is_split else outs[0]


def _rounded(sums: Float[Array, "m n"], dtype: DTypeLike) -> Float[Array, "m n"]:
    """Rounds for good: left to itself, XLA takes the sums where what follows wants float32 again."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(sums, exponent_bits=8, mantissa_bits=7).astype(dtype)
    # The same of float16 would make small numbers zero. The barrier costs a pass through memory.
    return sums if dtype == jnp.float32 else lax.optimization_barrier(sums.astype(dtype))


def _scratch(tiles: StackedTiles, dtype: Any, out_dtype: Any, *, is_transposed: bool) -> dict[str, Any]:
    """Shared memory and barriers."""

    def smem(shape: tuple[int, ...], dtype: Any) -> Any:
        tile = 8, _LINE_BYTES // jnp.dtype(dtype).itemsize
        tiling, swizzle = plgpu.TilingTransform(tile), plgpu.SwizzleTransform(_LINE_BYTES)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

    weights = (tiles.block_n, _BLOCK_K) if is_transposed else (_BLOCK_K, tiles.block_n)
    out = (_WGS, _OUT_PIECES, _WG_ROWS, _LINE_BYTES // jnp.dtype(out_dtype).itemsize)
    return {
        "x_smem": smem((tiles.num_stages, tiles.block_m, _BLOCK_K), dtype),
        "weights_smem": smem((tiles.num_stages, *weights), dtype),
        "out_smem": smem(out, out_dtype),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.num_stages),
        "freed": plgpu.Barrier(num_arrivals=_WGS, num_barriers=tiles.num_stages),
    }


@dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the warpgroups of a program share; shapes as in `_scratch`."""

    is_transposed: bool
    num_parts: int  # of k that belong to a piece of work
    layer: Any  # [1]
    x: Any  # [m, k]
    weights: Any  # [layers, k, n], or [layers, n, k]
    out: Any  # [parts, m, n], with one part where programs add them
    x_smem: Any
    weights_smem: Any
    out_smem: Any
    loaded: Any
    freed: Any

    @property
    def block_m(self) -> int:
        return int(self.x_smem.shape[1])

    @property
    def wg_columns(self) -> int:
        """Of a block of 64 rows each warpgroup has half of the columns."""
        block_n = int(self.weights_smem.shape[1 if self.is_transposed else 2])
        return block_n if self.block_m == _WGS * _WG_ROWS else block_n // _WGS

    @property
    def num_steps(self) -> int:
        """Of a piece of work."""
        return int(self.x.shape[1]) // (_BLOCK_K * int(self.out.shape[0]))

    def next_slot(self, slot: Any) -> Any:
        return jnp.where(slot == self.x_smem.shape[0] - 1, 0, slot + 1)

    def corner(self, wg: Any) -> tuple[Any, Any]:
        """Where in a block a warpgroup's own results begin."""
        is_whole = self.block_m == _WGS * _WG_ROWS
        return (wg * _WG_ROWS, 0) if is_whole else (0, wg * self.wg_columns)


def _stacked_kernel(
    *args: Any,
    tiles: StackedTiles,
    blocks: tuple[int, int],
    num_programs: int,
    is_transposed: bool,
    **scratch: Any,
) -> None:
    refs = _Refs(
        is_transposed=is_transposed,
        num_parts=1 if tiles.is_split else tiles.num_splits,
        **dict(zip(("layer", "x", "weights", "out"), args, strict=True)),
        **scratch,
    )
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    num_blocks = blocks[0] * blocks[1]
    num_items = num_blocks * refs.out.shape[0]

    def for_each(do: Callable[[_Place, Any], Any], carry: Any) -> Any:
        """Goes through this program's work. What is made at the same time shares tiles in the L2 cache."""

        def turn(nth: Any, carry: Any) -> Any:
            item = program + nth * num_programs
            block = lax.rem(item, jnp.int32(num_blocks))
            i, j = plgpu.planar_snake(block, blocks, 0, min(tiles.group_m, blocks[0]))
            part = lax.div(item, jnp.int32(num_blocks))
            return do((part, i * tiles.block_m, j * tiles.block_n), carry)

        num_rounds = lax.div(num_items - program + (num_programs - 1), jnp.int32(num_programs))
        return lax.fori_loop(0, num_rounds, turn, carry)

    @pl.when(wg < _WGS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")

        def make(place: _Place, slot: Any) -> Any:
            slot, sums = _multiply(refs, wg, slot)
            _store(refs, wg, place, sums)
            return slot

        for_each(make, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == _WGS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load = functools.partial(_load, refs, refs.layer[0])
        count, slot = for_each(load, (jnp.int32(0), jnp.int32(0)))
        wait_until_read(refs.freed, refs.next_slot, count, slot, tiles.num_stages)


def _load(refs: _Refs, layer: Any, place: _Place, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    """Copies a piece's tiles into the ring; `carry` is how many went through it before, and the next slot."""
    part, row, column = place
    num_slots, x_rows = refs.x_smem.shape[0], pl.ds(row, refs.block_m)

    def load(step: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        count, slot = carry
        pl.when(count >= num_slots)(functools.partial(plgpu.barrier_wait, refs.freed.at[slot]))
        at, loaded = pl.ds((part * refs.num_steps + step) * _BLOCK_K, _BLOCK_K), refs.loaded.at[slot]
        # Rows past the end are copied as zeros.
        plgpu.copy_gmem_to_smem(refs.x.at[x_rows, at], refs.x_smem.at[slot], loaded)
        if refs.is_transposed:
            source = refs.weights.at[layer, pl.ds(column, refs.weights_smem.shape[1]), at]
        else:
            source = refs.weights.at[layer, at, pl.ds(column, refs.weights_smem.shape[2])]
        plgpu.copy_gmem_to_smem(source, refs.weights_smem.at[slot], loaded)
        return count + 1, refs.next_slot(slot)

    return lax.fori_loop(0, refs.num_steps, load, carry)


def _multiply(refs: _Refs, wg: Any, slot: Any) -> tuple[Any, Any]:
    """Returns the next slot, and a warpgroup's sums: those of the parts, added in their order."""
    row, column = refs.corner(wg)
    columns = pl.ds(column, refs.wg_columns)
    num_steps = refs.num_steps // refs.num_parts

    def multiply(slot: Any, acc: Any) -> tuple[Any, Any]:
        def add(step: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            slot, last = carry
            plgpu.barrier_wait(refs.loaded.at[slot])
            if refs.is_transposed:
                weights = refs.weights_smem.at[slot, columns].transpose((1, 0))
            else:
                weights = refs.weights_smem.at[slot, :, columns]
            plgpu.wgmma(acc, refs.x_smem.at[slot, pl.ds(row, _WG_ROWS)], weights)
            # The tensor cores have this step's products to go on with: only the last step's are over.
            plgpu.wgmma_wait(1)
            pl.when(step > 0)(functools.partial(plgpu.barrier_arrive, refs.freed.at[last]))
            return refs.next_slot(slot), slot

        next_slot, last = lax.fori_loop(0, num_steps, add, (slot, slot))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs.freed.at[last])
        return next_slot, acc[...]

    accumulator = plgpu.WGMMAAccumulatorRef((_WG_ROWS, refs.wg_columns), jnp.float32)

    def add_part(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        slot, total = carry
        slot, sums = pl.run_scoped(functools.partial(multiply, slot), accumulator)
        return slot, total + sums

    first = pl.run_scoped(functools.partial(multiply, slot), accumulator)
    return lax.fori_loop(1, refs.num_parts, add_part, first) if refs.num_parts > 1 else first


def _store(refs: _Refs, wg: Any, place: _Place, sums: Any) -> None:
    """Writes a warpgroup's results, as many columns at a time as there is room for; no rows past the end."""
    part, row, column = place
    wg_row, wg_column = refs.corner(wg)
    out, width = sums.astype(refs.out.dtype), int(refs.out_smem.shape[3])
    starts = range(0, refs.wg_columns, width)
    for pieces in itertools.batched(starts, _OUT_PIECES):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those before
        for piece, start in enumerate(pieces):
            refs.out_smem[wg, piece] = out[:, start : start + width]
        plgpu.commit_smem()
        for piece, start in enumerate(pieces):
            columns = pl.ds(column + wg_column + start, width)
            to = refs.out.at[part, pl.ds(row + wg_row, _WG_ROWS), columns]
            plgpu.copy_smem_to_gmem(refs.out_smem.at[wg, piece], to)
