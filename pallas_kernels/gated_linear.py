"""The first half of a gated MLP for many rows, in one kernel: the products, then silu(gates) * ups.

For Hopper, in Pallas's Mosaic GPU lowering. The weights are read where they lie in the stack of all layers.
Of a program's three warpgroups one copies tiles of x and of both halves of the weights into a ring, and two
multiply. A program makes several blocks of the result, and the ring does not stop between them: the next
block's tiles are on their way while the gates of the last one are applied.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import check_hopper, dispatch

_WGS = 2  # warpgroups that multiply; the one after them loads
_WG_ROWS = 64  # of a warpgroup: what one wgmma has
_BLOCK_N = 128  # columns of a block, each of a gate and an up
_HALF_N = _BLOCK_N // _WGS
_BLOCK_K = 64  # rows of the weights in a step: a row of x is then one swizzled line of 128 bytes


def gated_linear(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers k 2 n"],
    layer: int | Int[Array, ""],
    *,
    backend: str | None = None,
) -> Float[Array, "m n"]:
    """`silu(x @ weights[layer, :, 0]) * (x @ weights[layer, :, 1])`, summed in float32.

    The kernel has no derivative; `reference` has. Aliases nothing.

    Args:
      x: rows of tokens, already normalized.
      weights: of all layers, gates and ups beside each other; no other layer than `layer` is read.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: Shazeer 2020 (SwiGLU).
    """
    args = (x, weights, jnp.asarray(layer, jnp.int32))
    return dispatch(
        "gated_linear",
        {
            "mosaic": functools.partial(gated_mosaic, *args),
            "reference": functools.partial(reference, x, weights, layer),  # an int stays a static slice
            "mosaic_interpret": functools.partial(gated_mosaic, *args, interpret=plgpu.InterpretGPUParams()),
        },
        backend,
    )


def reference(
    x: Float[Array, "m k"], weights: Float[Array, "layers k 2 n"], layer: int | Int[Array, ""]
) -> Float[Array, "m n"]:
    """The spec. It rounds gates and ups to their dtype; a kernel need not."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    gate_up = lax.dot_general(x, weights[layer], (((1,), (0,)), ((), ())), precision=precision)
    return jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]


@dataclass(frozen=True, kw_only=True)
class GatedTiles:
    """How the kernel cuts its work: every field is a static choice, one compiled kernel each.

    A whole block has 128 rows, 64 for each warpgroup; half a block has 64, and half of the columns for each.
    """

    is_halved: bool = False  # every block; else those of a last round that few programs would have part in
    num_stages: int = 4  # steps that are on the processor
    group_m: int = 8  # blocks one below the other that are made before the next columns
    num_programs: int = 132  # as many as processors: each takes its share of the blocks

    @classmethod
    def choose(cls, *, num_rows: int, n: int) -> "GatedTiles":
        """Picks tiles for `num_rows` and 2 n columns of weights.

        Measured on an H100 with llama-8b's weights, bfloat16, beside cuBLAS and XLA's kernel for the gates:
        2 % less time with 32 and 64 rows, 4 to 10 % from 128 to 1024, 2 to 7 % with 2048, 8 to 10 % with 8192
        and 16,384. Up to 192 rows halves are better than whole blocks. With 32 blocks, of a model of 768 x
        2048, the two were equal.

        Raises:
          NotImplementedError: less work than was measured to pay.
        """
        tiles = cls(is_halved=True, num_stages=5) if num_rows <= 192 else cls()
        num_halves = pl.cdiv(num_rows, _WG_ROWS) * (n // _BLOCK_N)
        if num_rows < 32 or num_halves < 32:
            raise NotImplementedError(
                f"mosaic: {num_rows} x {n} results: wanted 32 rows, and 32 blocks of {_WG_ROWS} x {_BLOCK_N}"
            )
        return tiles

    @property
    def block_m(self) -> int:
        return _WG_ROWS if self.is_halved else _WGS * _WG_ROWS

    def counts(self, num_blocks: int) -> tuple[int, int]:
        """Of so many blocks, how many are made whole, and how many halves the others are."""
        if self.is_halved:
            return 0, num_blocks
        rest = num_blocks % self.num_programs
        num_cut = rest if 2 * rest <= self.num_programs else 0
        return num_blocks - num_cut, 2 * num_cut


def check_gated_can(x: Array | jax.ShapeDtypeStruct, weights: Array | jax.ShapeDtypeStruct) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16 and float16, k no multiple of 64 or n of
        128, a number of rows that is no multiple of 8.
    """
    if x.dtype != weights.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic: dtypes {x.dtype}, {weights.dtype}: wanted bfloat16 or float16 for both"
        )
    k, n = weights.shape[1], weights.shape[3]
    if k % _BLOCK_K or n % _BLOCK_N:
        raise NotImplementedError(f"mosaic: {k} x {n} weights: wanted multiples of {_BLOCK_K} and {_BLOCK_N}")
    if x.shape[0] % 8:
        raise NotImplementedError(f"mosaic: {x.shape[0]} rows: wanted a multiple of 8")


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def gated_mosaic(
    x: Float[Array, "m k"],
    weights: Float[Array, "layers k 2 n"],
    layer: Int[Array, ""],
    *,
    tiles: GatedTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "m n"]:
    """`gated_linear` as one program per processor, each with its share of the blocks.

    The jit is there so that the layers of a model share one trace: the layer is an operand, so the compiled
    kernel is one too. `interpret` runs the kernel on a CPU.

    Raises:
      NotImplementedError: the device is no Hopper GPU, or see `check_gated_can`.
    """
    if interpret is None:
        check_hopper()
    check_gated_can(x, weights)
    (num_rows, k), (num_layers, _, _, n) = x.shape, weights.shape
    tiles = tiles or GatedTiles.choose(num_rows=num_rows, n=n)
    counts = tiles.counts(pl.cdiv(num_rows, tiles.block_m) * (n // _BLOCK_N))
    num_programs = min(tiles.num_programs, max(counts))
    kernel = plgpu.kernel(
        functools.partial(_gated_kernel, tiles=tiles, counts=counts, num_programs=num_programs),
        out_type=jax.ShapeDtypeStruct((num_rows, n), x.dtype),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=_WGS + 1,
        thread_name="wg",
        kernel_name="gated_linear_mosaic",
        scratch_types=_scratch(tiles, x.dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(layer[None], x, weights.reshape(num_layers, k, 2 * n))


def _scratch(tiles: GatedTiles, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers. 227 KiB is what a program may have; four stages of 128 rows take 224."""
    tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=(tiling, swizzle))
    out_pieces = 1 if tiles.is_halved else 2
    return {
        "x_smem": smem((tiles.num_stages, tiles.block_m, _BLOCK_K)),
        "weights_smem": smem((tiles.num_stages, 2, _BLOCK_K, _BLOCK_N)),
        "out_smem": smem((_WGS, out_pieces, _WG_ROWS, _HALF_N)),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=tiles.num_stages),
        "freed": plgpu.Barrier(num_arrivals=_WGS, num_barriers=tiles.num_stages),
    }


@dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the warpgroups of a program share; shapes as in `_scratch`."""

    layer: Any  # [1]
    x: Any  # [m, k]
    weights: Any  # [layers, k, 2 n]
    out: Any  # [m, n]
    x_smem: Any
    weights_smem: Any
    out_smem: Any
    loaded: Any
    freed: Any

    @property
    def num_steps(self) -> int:
        return int(self.x.shape[1]) // _BLOCK_K

    def next_slot(self, slot: Any) -> Any:
        return jnp.where(slot == self.x_smem.shape[0] - 1, 0, slot + 1)


def _gated_kernel(
    *args: Any, tiles: GatedTiles, counts: tuple[int, int], num_programs: int, **scratch: Any
) -> None:
    refs = _Refs(**dict(zip(("layer", "x", "weights", "out"), args, strict=True)), **scratch)
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    blocks = (pl.cdiv(refs.out.shape[0], tiles.block_m), refs.out.shape[1] // _BLOCK_N)
    num_whole = counts[0]

    def place_of(item: Any, is_whole: bool) -> tuple[Any, Any]:
        """First row and column. What is made at the same time shares rows and columns in the L2 cache."""
        halves = jnp.int32(1 if is_whole else tiles.block_m // _WG_ROWS)
        block = lax.div(item, halves) + (0 if is_whole else num_whole)
        i, j = plgpu.planar_snake(block, blocks, 0, min(tiles.group_m, blocks[0]))
        return i * tiles.block_m + lax.rem(item, halves) * _WG_ROWS, j * _BLOCK_N

    def for_each(do: Callable[[tuple[Any, Any], bool, Any], Any], carry: Any) -> Any:
        """Goes through this program's blocks, then through its halves."""
        for count, is_whole in zip(counts, (True, False), strict=True):

            def turn(nth: Any, carry: Any, is_whole: bool = is_whole) -> Any:
                return do(place_of(program + nth * num_programs, is_whole), is_whole, carry)

            if count > 0:
                num_rounds = lax.div(count - program + (num_programs - 1), jnp.int32(num_programs))
                carry = lax.fori_loop(0, num_rounds, turn, carry)
        return carry

    @pl.when(wg < _WGS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")

        def make(place: tuple[Any, Any], is_whole: bool, slot: Any) -> Any:
            slot, gates, ups = _multiply(refs, wg, slot, is_whole=is_whole)
            _store(refs, wg, place, gates, ups, is_whole=is_whole)
            return slot

        for_each(make, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == _WGS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load = functools.partial(_load, refs, refs.layer[0])
        count, slot = for_each(load, (jnp.int32(0), jnp.int32(0)))
        wait_until_read(refs.freed, refs.next_slot, count, slot, tiles.num_stages)


def wait_until_read(
    freed: Any, next_slot: Callable[[Any], Any], count: Any, slot: Any, num_stages: int
) -> None:
    """Ends a loader that has filled `count` slots of its ring, `slot` being the next one.

    No barrier may end with an arrival that its waiter did not see: the interpreter insists.
    """

    def wait(_: Any, slot: Any) -> Any:
        plgpu.barrier_wait(freed.at[slot])
        return next_slot(slot)

    is_full = count >= num_stages
    lax.fori_loop(0, jnp.minimum(count, num_stages), wait, jnp.where(is_full, slot, 0))


def _load(
    refs: _Refs, layer: Any, place: tuple[Any, Any], is_whole: bool, carry: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Copies a block's tiles into the ring; `carry` is how many went through it before, and the next slot."""
    (row, column), n = place, refs.out.shape[1]
    num_slots, num_rows = refs.x_smem.shape[0], _WG_ROWS * (_WGS if is_whole else 1)

    def load(step: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        count, slot = carry
        pl.when(count >= num_slots)(functools.partial(plgpu.barrier_wait, refs.freed.at[slot]))
        at, loaded = pl.ds(step * _BLOCK_K, _BLOCK_K), refs.loaded.at[slot]
        # Rows past the end are copied as zeros.
        x_smem = refs.x_smem.at[slot, pl.ds(0, num_rows)]
        plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(row, num_rows), at], x_smem, loaded)
        for half in range(2):
            source = refs.weights.at[layer, at, pl.ds(half * n + column, _BLOCK_N)]
            plgpu.copy_gmem_to_smem(source, refs.weights_smem.at[slot, half], loaded)
        return count + 1, refs.next_slot(slot)

    return lax.fori_loop(0, refs.num_steps, load, carry)


def _multiply(refs: _Refs, wg: Any, slot: Any, *, is_whole: bool) -> tuple[Any, Any, Any]:
    """Returns the next slot, and a warpgroup's gates and ups of a block."""

    def multiply(*accs: Any) -> tuple[Any, Any, Any]:
        def add(step: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            slot, last = carry
            plgpu.barrier_wait(refs.loaded.at[slot])
            x = refs.x_smem.at[slot, pl.ds(wg * _WG_ROWS if is_whole else 0, _WG_ROWS)]
            for half, acc in enumerate(accs):
                weights = refs.weights_smem.at[slot, half]
                if not is_whole:
                    weights = weights.at[:, pl.ds(wg * _HALF_N, _HALF_N)]
                plgpu.wgmma(acc, x, weights)
            # The tensor cores have this step's products to go on with: only the last step's are over.
            plgpu.wgmma_wait(2)
            pl.when(step > 0)(functools.partial(plgpu.barrier_arrive, refs.freed.at[last]))
            return refs.next_slot(slot), slot

        next_slot, last = lax.fori_loop(0, refs.num_steps, add, (slot, slot))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(refs.freed.at[last])
        return next_slot, accs[0][...], accs[1][...]

    acc = plgpu.WGMMAAccumulatorRef((_WG_ROWS, _BLOCK_N if is_whole else _HALF_N), jnp.float32)
    return pl.run_scoped(multiply, acc, acc)


def _store(refs: _Refs, wg: Any, place: tuple[Any, Any], gates: Any, ups: Any, *, is_whole: bool) -> None:
    """Applies the gates; rows past the end are not written."""
    # 1 / y as the square of 1 / sqrt(y), which is one instruction; a division is many.
    root = lax.rsqrt(1.0 + jnp.exp(-gates))
    out = (gates * root * root * ups).astype(refs.out.dtype)
    row, column = place
    row, column = (row + wg * _WG_ROWS, column) if is_whole else (row, column + wg * _HALF_N)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last block's
    pieces = range(out.shape[1] // _HALF_N)
    for piece in pieces:
        refs.out_smem[wg, piece] = out[:, piece * _HALF_N : (piece + 1) * _HALF_N]
    plgpu.commit_smem()
    for piece in pieces:
        to = refs.out.at[pl.ds(row, _WG_ROWS), pl.ds(column + piece * _HALF_N, _HALF_N)]
        plgpu.copy_smem_to_gmem(refs.out_smem.at[wg, piece], to)
