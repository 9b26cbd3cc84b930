"""Prefill attention for Hopper in Pallas's Mosaic GPU lowering: TMA, wgmma, one warpgroup that loads.

A block is 128 rows: some tokens of one sequence, each with the query heads of one KV head. Two warpgroups
compute, 64 rows each; while one is at its exponentials the other has the tensor cores. A third warpgroup
copies pages into a ring of tiles of K and V. Each program goes through several blocks, and the ring does not
stop between them: the next block's Q, K and V are on their way while the last one is finished.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.attention_variant import (
    LOG2_E,
    LOWEST,
    PLAIN,
    AttentionVariant,
    TileBounds,
    bend_tile,
    tile_bounds,
    window_start,
)
from pjengine.pallas_kernels.dispatch import check_hopper

_ROWS = 128  # of a block
_WG_ROWS = 64  # of a warpgroup: what one wgmma has
_NUM_Q = 2  # blocks of Q in shared memory: one warpgroup may be a block ahead of the other
_WGS = _ROWS // _WG_ROWS  # that compute; the one after them loads


@dataclass(frozen=True, kw_only=True)
class MosaicTiles:
    """How the kernel cuts its work: every field is a static choice, one compiled kernel each.

    Measured on an H200 (8192, 2048 and 32 of 512 tokens, 32/8 heads of 128, bfloat16): 128 slots, 2 stages
    and a program for each processor, which keeps its pipeline full from one block to the next.
    """

    block_kv: int = 128  # slots per step of the loop
    num_stages: int = 2  # tiles of K and of V on the processor
    num_programs: int = 132  # as many as processors: each takes its share of the blocks


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """Static sizes of one kernel, and which rows of a block are which.

    Row r of a block is query head r // tokens of its KV head, and token r % tokens. A warpgroup has whole
    heads (`heads` of them), or, with one head, half of its tokens.
    """

    group: int
    tokens: int  # of a block
    num_kv_heads: int
    head_dim: int
    page_size: int
    tiles: MosaicTiles
    scale: float  # times log2(e): exponentials are powers of 2
    softcap: float | None
    window: int | None
    dtype: Any

    @classmethod
    def of(
        cls, q: Array, k_pages: Array, variant: AttentionVariant, *, tiles: MosaicTiles, scale: float
    ) -> "_Geometry":
        _, num_kv_heads, page_size, head_dim = k_pages.shape
        if tiles.block_kv % max(64, page_size):
            raise ValueError(
                f"block_kv {tiles.block_kv}: wanted a multiple of 64 and of page_size {page_size}"
            )
        group = q.shape[1] // num_kv_heads
        return cls(
            group=group,
            tokens=_ROWS // pl.next_power_of_2(group),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            tiles=tiles,
            scale=scale * LOG2_E,
            **variant.static,
            dtype=q.dtype,
        )

    @property
    def wg_tokens(self) -> int:
        return min(self.tokens, _WG_ROWS)

    @property
    def heads(self) -> int:
        return _WG_ROWS // self.wg_tokens

    @property
    def pages(self) -> int:
        return self.tiles.block_kv // self.page_size

    def head(self, wg: Any, i: int) -> Any:
        """The i-th head of a warpgroup, in its group."""
        return wg * self.heads + i if self.tokens <= _WG_ROWS else 0

    def offset(self, wg: Any) -> Any:
        """A warpgroup's first token, in its block."""
        return 0 if self.tokens <= _WG_ROWS else wg * _WG_ROWS


def check_mosaic_can(q: Array, k_pages: Array, v_pages: Array) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: dtypes other than bfloat16 and float16, head_dim other than 64 and 128, more than
        16 query heads per KV head, page sizes other than 8, 16, 32, 64 and 128, a number of tokens that is
        no multiple of 8.
    """
    dtypes = {x.dtype for x in (q, k_pages, v_pages)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(f"mosaic: dtypes {names}: wanted bfloat16 or float16 for all")
    if q.shape[2] not in (64, 128):
        raise NotImplementedError(f"mosaic: head_dim {q.shape[2]}: wanted 64 or 128")
    if (group := q.shape[1] // k_pages.shape[1]) > 16:
        raise NotImplementedError(f"mosaic: {group} query heads per KV head: at most 16")
    if (page_size := k_pages.shape[2]) not in (8, 16, 32, 64, 128):
        raise NotImplementedError(f"mosaic: page_size {page_size}: wanted 8, 16, 32, 64 or 128")
    if q.shape[0] % 8:
        raise NotImplementedError(f"mosaic: {q.shape[0]} tokens: wanted a multiple of 8")


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def ragged_mosaic(
    q: Float[Array, "t h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "s w"],
    kv_lens: Int[Array, " s"],
    cu_q_lens: Int[Array, " s+1"],
    page_offset: Int[Array, ""],
    variant: AttentionVariant = PLAIN,
    *,
    scale: float,
    tiles: MosaicTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "t h d"]:
    """`ragged_paged_attention` as one program per processor, each with its share of the blocks.

    The jit is there for the same reason as in `decode_triton`. The plan of blocks is the same in every
    layer: XLA computes it once a step. `interpret` runs the kernel on a CPU.

    Raises:
      ValueError: tiles that cut a page.
      NotImplementedError: the device is no Hopper GPU, or see `check_mosaic_can`.
    """
    if interpret is None:
        check_hopper()
    check_mosaic_can(q, k_pages, v_pages)
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    geometry = _Geometry.of(q, k_pages, variant, tiles=tiles or MosaicTiles(), scale=scale)
    plan = plan_aligned_blocks(
        kv_lens,
        cu_q_lens,
        num_tokens=q.shape[0],
        tokens_per_block=geometry.tokens,
        window=variant.window,
    )
    num_programs = min(geometry.tiles.num_programs, plan.shape[0] * num_kv_heads)
    kernel = plgpu.kernel(
        functools.partial(_prefill_kernel, geometry=geometry, num_programs=num_programs),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=_WGS + 1,
        thread_name="wg",
        kernel_name="ragged_paged_attention_mosaic",
        scratch_types=_scratch(geometry, is_interpreted=interpret is not None),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    scalars = jnp.stack([(plan[:, 3] > 0).sum(dtype=jnp.int32), page_offset])
    rows = (num_pages * num_kv_heads, page_size, head_dim)  # a page of one KV head is one copy
    slopes, sinks = (
        None if values is None else _by_row(values, geometry)
        for values in (variant.alibi_slopes, variant.sinks)
    )
    return kernel(scalars, plan, page_table, q, k_pages.reshape(rows), v_pages.reshape(rows), slopes, sinks)


def _by_row(values: Float[Array, " h"], geometry: _Geometry) -> Float[Array, "hk wgs rows"]:
    """One number a head for each row of a KV head's blocks; rows beyond the group's heads have any."""
    head = jnp.minimum(jnp.arange(_ROWS) // geometry.tokens, geometry.group - 1)
    rows = values.astype(jnp.float32).reshape(-1, geometry.group)[:, head]
    return rows.reshape(-1, _WGS, _WG_ROWS)


def plan_aligned_blocks(
    kv_lens: Int[Array, " s"],
    cu_q_lens: Int[Array, " s+1"],
    *,
    num_tokens: int,
    tokens_per_block: int,
    window: int | None = None,
) -> Int[Array, "n 6"]:
    """Cuts the tokens into blocks of one sequence each, heaviest first; a block's columns are

    page-table row, number of its aligned range of tokens, how many of them come before its own, how many are
    its own, position of the range's first token, kv_len.

    A block's tokens lie in one aligned range of `tokens_per_block` (copies of swizzled tiles start at a
    multiple of 8); sequences that meet inside a range have a block each there, numbered range + sequence.
    The padding after the last sequence is planned as one more sequence at positions below 0, which therefore
    see nothing. Blocks without tokens come last.
    """
    num_seqs = kv_lens.shape[0]
    starts = jnp.append(cu_q_lens, num_tokens)
    block = jnp.arange(num_tokens // tokens_per_block + num_seqs + 1)
    first_block = cu_q_lens // tokens_per_block + jnp.arange(num_seqs + 1)
    seq = (first_block[None, :] <= block[:, None]).sum(axis=1) - 1
    row, aligned = jnp.minimum(seq, num_seqs - 1), block - seq
    token = aligned * tokens_per_block
    before = jnp.clip(starts[seq] - token, 0, tokens_per_block)
    valid = jnp.clip(starts[seq + 1] - token, 0, tokens_per_block) - before
    kv_len = jnp.append(kv_lens, 0)[seq]
    position = token - starts[seq + 1] + kv_len
    seen = jnp.maximum(position + before + valid, 0) - window_start(position + before, window)
    weight = jnp.where(valid > 0, jnp.maximum(seen, 0), -1)
    plan = jnp.stack([row, aligned, before, valid, position, kv_len], axis=1)
    return plan[jnp.argsort(-weight)].astype(jnp.int32)


def _scratch(geometry: _Geometry, *, is_interpreted: bool) -> dict[str, Any]:
    """Shared memory and barriers. 227 KiB is what a block may have; 128 by 128 tiles take 225."""
    tiles, dim, dtype = geometry.tiles, geometry.head_dim, geometry.dtype
    tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    swizzled = (tiling, swizzle)
    ring = plgpu.SMEM((tiles.num_stages, tiles.block_kv, dim), dtype, transforms=swizzled)
    loaded = plgpu.Barrier(num_arrivals=geometry.pages, num_barriers=tiles.num_stages)
    freed = plgpu.Barrier(num_arrivals=_WGS, num_barriers=tiles.num_stages)
    scratch = {
        "q_smem": plgpu.SMEM((_NUM_Q, _WGS, _WG_ROWS, dim), dtype, transforms=swizzled),
        "k_smem": ring,
        "v_smem": ring,
        "ragged_smem": plgpu.SMEM((_WGS, _WG_ROWS, dim), dtype),
        "q_loaded": plgpu.Barrier(num_arrivals=_WGS * geometry.heads, num_barriers=_NUM_Q),
        "q_freed": plgpu.Barrier(num_arrivals=_WGS, num_barriers=_NUM_Q),
        "k_loaded": loaded,
        "k_freed": freed,
        "v_loaded": loaded,
        "v_freed": freed,
        "turn": plgpu.Barrier(num_arrivals=_WGS),
    }
    if is_interpreted:
        scratch["p_smem"] = plgpu.SMEM((_WGS, _WG_ROWS, tiles.block_kv), dtype, transforms=swizzled)
    return scratch


@dataclass(frozen=True, kw_only=True)
class _Refs:
    """What the kernel's warpgroups share; shapes as in `_scratch`."""

    scalars: Any  # [2]: number of blocks, page offset
    blocks: Any  # [b, 6], see `plan_aligned_blocks`
    page_table: Any  # [s, w]
    q: Any  # [t, h, d]
    k: Any  # [n * hk, p, d]
    v: Any  # [n * hk, p, d]
    slopes: Any  # [hk, warpgroups, rows] or None
    sinks: Any  # [hk, warpgroups, rows] or None
    out: Any  # [t, h, d]
    q_smem: Any
    k_smem: Any
    v_smem: Any
    ragged_smem: Any
    q_loaded: Any
    q_freed: Any
    k_loaded: Any
    k_freed: Any
    v_loaded: Any
    v_freed: Any
    turn: Any
    p_smem: Any = None  # only interpreted: a compiled kernel keeps P in registers


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One block and KV head, as a program reads it: scalars."""

    kv_head: Any
    seq: Any
    token: Any  # first of the aligned range
    before: Any  # tokens of the range that are not the block's
    valid: Any
    position: Any  # of `token`
    kv_len: Any
    first_slot: Any  # that some row sees
    bounds: TileBounds
    num_tiles: Any


def _prefill_kernel(*args: Any, geometry: _Geometry, num_programs: int, **scratch: Any) -> None:
    names = ("scalars", "blocks", "page_table", "q", "k", "v", "slopes", "sinks", "out")
    refs = _Refs(**dict(zip(names, args, strict=True)), **scratch)
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    num_items = refs.scalars[0] * geometry.num_kv_heads
    num_rounds = lax.div(num_items + (num_programs - 1), jnp.int32(num_programs))

    def item_of(nth: Any) -> _Item:
        # Back and forth over items sorted by weight: each program's shares add up to about the same.
        place = jnp.where(lax.rem(nth, jnp.int32(2)) == 0, program, num_programs - 1 - program)
        return _read_item(refs, geometry, nth * num_programs + place, num_items)

    @pl.when(wg < _WGS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        pl.when(wg == 1)(functools.partial(_take_turns, refs))

        def consume(nth: Any, count: Any) -> Any:
            return _attend_item(refs, geometry, item_of(nth), wg, nth, count)

        lax.fori_loop(0, num_rounds, consume, jnp.int32(0))
        pl.when(wg == 0)(functools.partial(_take_turns, refs))

    @pl.when(wg == _WGS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def produce(nth: Any, counts: tuple[Any, Any]) -> tuple[Any, Any]:
            num_q, num_tiles = counts
            item = item_of(nth)
            _load_item(refs, geometry, item, nth, num_tiles)
            return num_q + jnp.where(item.num_tiles > 0, 1, 0), num_tiles + item.num_tiles

        num_q, count = lax.fori_loop(0, num_rounds, produce, (jnp.int32(0), jnp.int32(0)))
        # No barrier may end with an arrival that its waiter did not see: the interpreter insists.
        _drain(refs.k_freed, count, geometry.tiles.num_stages)
        _drain(refs.v_freed, count, geometry.tiles.num_stages)
        _drain(refs.q_freed, num_q, _NUM_Q)


def _drain(freed: Any, count: Any, size: int) -> None:
    def wait(i: Any, _: None) -> None:
        plgpu.barrier_wait(freed.at[_slot_of(i, size)])

    lax.fori_loop(jnp.maximum(count - size, 0), count, wait, None)


def _read_item(refs: _Refs, geometry: _Geometry, index: Any, num_items: Any) -> _Item:
    """An index past the last item reads as a block without tokens."""
    at = jnp.minimum(index, num_items - 1)
    block = lax.div(at, jnp.int32(geometry.num_kv_heads))
    seq, aligned, before, valid, position, kv_len = (refs.blocks[block, i] for i in range(6))
    valid = jnp.where(index < num_items, valid, 0)
    first = position + before
    end_slot = jnp.where(valid > 0, jnp.maximum(first + valid, 0), 0)
    bounds = tile_bounds(first, end_slot, window=geometry.window, block_kv=geometry.tiles.block_kv)
    return _Item(
        kv_head=lax.rem(at, jnp.int32(geometry.num_kv_heads)),
        seq=seq,
        token=aligned * geometry.tokens,
        before=before,
        valid=valid,
        position=position,
        kv_len=kv_len,
        first_slot=window_start(first, geometry.window),
        bounds=bounds,
        num_tiles=bounds.end - bounds.begin,
    )


def _slot_of(count: Any, size: int) -> Any:
    return lax.rem(count, jnp.int32(size))


def _load_item(refs: _Refs, geometry: _Geometry, item: _Item, nth: Any, count: Any) -> None:
    """Copies a block's Q, then its tiles of K and V; `count` tiles went through the ring before."""
    ring_start = count - item.bounds.begin
    tiles = geometry.tiles
    pl.when(item.num_tiles > 0)(functools.partial(_load_q, refs, geometry, item, nth))
    page_offset = refs.scalars[1]
    last_page = lax.div(jnp.maximum(item.kv_len - 1, 0), jnp.int32(geometry.page_size))

    def read_pages(tile: Any, first_page: Any = None) -> list[Any]:
        # Past the end the last page comes again, and before the window its first one: these slots are
        # masked, and the pages the sequence's own.
        def read_page(place: Any) -> Any:
            place = jnp.minimum(place, last_page)
            place = place if first_page is None else jnp.maximum(place, first_page)
            return refs.page_table[item.seq, place]

        first = tile * geometry.pages
        return [read_page(first + i) for i in range(geometry.pages)]

    def load(tile: Any, pages: list[Any]) -> list[Any]:
        next_pages = read_pages(tile + 1)  # a step ahead: reading them takes as long as a small tile
        slot = _slot_of(ring_start + tile, tiles.num_stages)
        rows = [(page + page_offset) * geometry.num_kv_heads + item.kv_head for page in pages]
        for source, ring, loaded, freed in (
            (refs.k, refs.k_smem, refs.k_loaded, refs.k_freed),
            (refs.v, refs.v_smem, refs.v_loaded, refs.v_freed),
        ):
            pl.when(ring_start + tile >= tiles.num_stages)(
                functools.partial(plgpu.barrier_wait, freed.at[slot])
            )
            for i, row in enumerate(rows):
                to = ring.at[slot, pl.ds(i * geometry.page_size, geometry.page_size)]
                plgpu.copy_gmem_to_smem(source.at[row], to, loaded.at[slot])
        return next_pages

    first_page = None
    if geometry.window is not None:  # no other tile has slots before it
        first_page = lax.div(item.first_slot, jnp.int32(geometry.page_size))
    pages = read_pages(jnp.int32(item.bounds.begin), first_page)
    lax.fori_loop(item.bounds.begin, item.bounds.end, load, pages)


def _load_q(refs: _Refs, geometry: _Geometry, item: _Item, nth: Any) -> None:
    slot = _slot_of(nth, _NUM_Q)
    pl.when(nth >= _NUM_Q)(functools.partial(plgpu.barrier_wait, refs.q_freed.at[slot]))
    for wg in range(_WGS):
        for i in range(geometry.heads):
            # Rows beyond the group's heads compute what no one stores.
            head = item.kv_head * geometry.group + min(geometry.head(wg, i), geometry.group - 1)
            source = refs.q.at[pl.ds(item.token + geometry.offset(wg), geometry.wg_tokens), head]
            to = refs.q_smem.at[slot, wg, pl.ds(i * geometry.wg_tokens, geometry.wg_tokens)]
            plgpu.copy_gmem_to_smem(source, to, refs.q_loaded.at[slot])


def _take_turns(refs: _Refs) -> None:
    plgpu.barrier_arrive(refs.turn)
    plgpu.barrier_wait(refs.turn)


def _attend_item(refs: _Refs, geometry: _Geometry, item: _Item, wg: Any, nth: Any, count: Any) -> Any:
    """Computes and stores a warpgroup's rows of a block; returns `count` past its tiles."""
    q_slot = _slot_of(nth, _NUM_Q)

    # Blocks that see nothing are a program's last. They wait for no one: a warpgroup may not run two Q ahead
    # of the other one, whose last step waits for the next turn of this one.
    @pl.when(item.num_tiles > 0)
    def _() -> None:
        plgpu.barrier_wait(refs.q_loaded.at[q_slot])
        plgpu.barrier_wait(refs.k_loaded.at[_slot_of(count, geometry.tiles.num_stages)])

    row = plgpu.Layout.WGMMA.reduce(1)
    total = plgpu.layout_cast(jnp.zeros((_WG_ROWS,), jnp.float32), row)
    top = plgpu.layout_cast(jnp.full((_WG_ROWS,), LOWEST, jnp.float32), row)
    if refs.sinks is not None:  # as if a slot without a value had been seen
        top, total = _load_rows(refs.sinks, item, wg) * LOG2_E, total + 1.0
    slopes = None if refs.slopes is None else _load_rows(refs.slopes, item, wg) * (LOG2_E / geometry.scale)
    acc = plgpu.layout_cast(jnp.zeros((_WG_ROWS, geometry.head_dim), jnp.float32), plgpu.Layout.WGMMA)
    ring_start = count - item.bounds.begin
    step = functools.partial(_attend_tile, refs, geometry, item, wg, q_slot, ring_start, slopes)
    plain, masked = (functools.partial(step, is_masked=is_masked) for is_masked in (False, True))
    carry = (acc, top, total)
    if geometry.window is not None:
        carry = lax.fori_loop(item.bounds.begin, item.bounds.full, masked, carry)
    carry = lax.fori_loop(item.bounds.full, item.bounds.diagonal, plain, carry)
    acc, _, total = lax.fori_loop(item.bounds.diagonal, item.bounds.end, masked, carry)
    inverse = 1.0 / jnp.where(total > 0, total, 1.0)
    out = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(geometry.dtype)
    _store(refs, geometry, item, wg, q_slot, out)
    pl.when(item.num_tiles > 0)(functools.partial(plgpu.barrier_arrive, refs.q_freed.at[q_slot]))
    return count + item.num_tiles


def _load_rows(ref: Any, item: _Item, wg: Any) -> Any:
    """A warpgroup's numbers of `_by_row`."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(ref.at[item.kv_head, wg], layout=layout, optimized=False)


def _attend_tile(
    refs: _Refs,
    geometry: _Geometry,
    item: _Item,
    wg: Any,
    q_slot: Any,
    ring_start: Any,  # the tile's place in the ring, less its number
    slopes: Any,
    tile: Any,
    carry: tuple[Any, Any, Any],
    *,
    is_masked: bool,
) -> tuple[Any, Any, Any]:
    """One step of the online softmax. Its K has arrived; waits for the next one's while it multiplies.

    The two warpgroups meet at `turn` twice a step, half a step apart: as one leaves the products (P V, then
    the next Q K) for its exponentials, the other leaves its exponentials for the products.
    """
    acc, top, total = carry
    slot = _slot_of(ring_start + tile, geometry.tiles.num_stages)
    if is_masked:
        plgpu.barrier_wait(refs.v_loaded.at[slot])
        # By one warpgroup, before it lets the other one go on to this tile's P V.
        pl.when(wg == 0)(functools.partial(_clear_unwritten, refs, geometry, item, tile, slot))

    def multiply_qk(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, refs.q_smem.at[q_slot, wg], refs.k_smem.at[slot].transpose((1, 0)))
        _take_turns(refs)
        return acc_ref[...]

    shape = (_WG_ROWS, geometry.tiles.block_kv)
    scores = pl.run_scoped(multiply_qk, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    plgpu.barrier_arrive(refs.k_freed.at[slot])
    scores = _bend(geometry, item, wg, slopes, tile, scores, is_masked=is_masked)
    new_top = jnp.maximum(top, scores.max(axis=1) * geometry.scale)
    old = jnp.exp2(top - new_top)
    p = jnp.exp2(scores * geometry.scale - lax.broadcast_in_dim(new_top, shape, [0]))
    acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
    total = total * old + p.sum(axis=1)
    p = p.astype(geometry.dtype)
    acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
    plgpu.barrier_arrive(refs.turn)
    if not is_masked:
        plgpu.barrier_wait(refs.v_loaded.at[slot])
    plgpu.barrier_wait(refs.turn)
    acc = _add_pv(refs, geometry, item, wg, ring_start, tile, acc, p)
    plgpu.barrier_arrive(refs.v_freed.at[slot])
    return acc, new_top, total


def _bend(
    geometry: _Geometry, item: _Item, wg: Any, slopes: Any, tile: Any, scores: Any, *, is_masked: bool
) -> Any:
    """What the layer's variant does to a tile of scores, and -inf where a row does not see a slot."""
    layout = plgpu.Layout.WGMMA
    unit = LOG2_E / geometry.scale
    if not is_masked and slopes is None:
        return bend_tile(scores, None, softcap=geometry.softcap, unit=unit)
    row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout)
    slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
    first = item.position + geometry.offset(wg) - tile * geometry.tiles.block_kv
    position = (row & (geometry.wg_tokens - 1)) + first
    alibi = None
    if slopes is not None:
        slopes = lax.broadcast_in_dim(slopes, scores.shape, [0])
        alibi = slopes * (slot - position).astype(jnp.float32)
    scores = bend_tile(scores, alibi, softcap=geometry.softcap, unit=unit)
    if not is_masked:
        return scores
    if geometry.window is None:
        return jnp.where(slot <= position, scores, -jnp.inf)
    # One comparison: slots after the position are, without a sign, far before it.
    sees = (position - slot).astype(jnp.uint32) < jnp.uint32(geometry.window)
    return jnp.where(sees, scores, -jnp.inf)


def _clear_unwritten(refs: _Refs, geometry: _Geometry, item: _Item, tile: Any, slot: Any) -> None:
    """Zeroes the rows of V past the sequence's end, and those before the window of all the block's rows.

    They are multiplied with 0, and 0 * NaN would be NaN.
    """
    written = item.kv_len - tile * geometry.tiles.block_kv
    begin = item.first_slot - tile * geometry.tiles.block_kv
    columns = geometry.head_dim // 64

    def clear(piece: Any, _: None) -> None:  # one at a time: more of V would not fit the registers
        first = lax.div(piece, jnp.int32(columns)) * _WG_ROWS
        column = lax.rem(piece, jnp.int32(columns)) * 64
        ref = refs.v_smem.at[slot, pl.ds(first, _WG_ROWS), pl.ds(column, 64)]
        v = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
        cleared = jnp.where(row + first < written, v, jnp.zeros_like(v))
        if geometry.window is not None:
            cleared = jnp.where(row + first >= begin, cleared, jnp.zeros_like(v))
        ref[...] = cleared

    first_piece = lax.div(written, jnp.int32(_WG_ROWS)) * columns
    if geometry.window is not None:
        first_piece = jnp.where(begin > 0, 0, first_piece)
    lax.fori_loop(first_piece, geometry.tiles.block_kv // _WG_ROWS * columns, clear, None)
    plgpu.commit_smem()


def _add_pv(
    refs: _Refs, geometry: _Geometry, item: _Item, wg: Any, ring_start: Any, tile: Any, acc: Any, p: Any
) -> Any:
    """Returns acc + P V of a tile."""
    num_stages = geometry.tiles.num_stages
    v_ref = refs.v_smem.at[_slot_of(ring_start + tile, num_stages)]

    def multiply(acc_ref: Any, p: Any) -> None:
        plgpu.wgmma(acc_ref, p, v_ref)

        @pl.when(tile + 1 < item.bounds.end)
        def _() -> None:
            plgpu.barrier_wait(refs.k_loaded.at[_slot_of(ring_start + tile + 1, num_stages)])

    if refs.p_smem is None:
        return pl.run_state(functools.partial(multiply, p=p))(plgpu.WGMMAAccumulatorRef.init(acc))

    # The interpreter knows neither P in registers nor an accumulator that starts with a value.
    def multiply_interpreted(acc_ref: Any) -> Any:
        multiply(acc_ref, refs.p_smem.at[wg])
        return acc_ref[...]

    refs.p_smem[wg] = p
    plgpu.commit_smem()
    return acc + pl.run_scoped(multiply_interpreted, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))


def _store(refs: _Refs, geometry: _Geometry, item: _Item, wg: Any, q_slot: Any, out: Any) -> None:
    """Stores the rows that are the block's own: the others are no one's, or another sequence's."""
    tokens, offset = geometry.wg_tokens, geometry.offset(wg)
    begin = jnp.clip(item.before - offset, 0, tokens)
    valid = jnp.clip(item.before + item.valid - offset, 0, tokens) - begin

    def copy_heads(smem: Any, first: Any, size: int) -> None:
        for i in range(geometry.heads):
            head = geometry.head(wg, i)

            def copy(head: Any = head, i: int = i) -> None:
                rows = pl.ds(item.token + offset + first, size)
                to = refs.out.at[rows, item.kv_head * geometry.group + head]
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(i * tokens + first, size)], to)

            pl.when(head < geometry.group)(copy)

    @pl.when(valid == tokens)
    def _() -> None:
        smem = refs.q_smem.at[q_slot, wg]  # Q is done with
        smem[...] = out
        plgpu.commit_smem()
        copy_heads(smem, 0, tokens)

    @pl.when((valid > 0) & (valid < tokens))
    def _() -> None:
        # Not swizzled, so that it can be cut anywhere: copies of 1, 2, 4, ... tokens add up to `valid`.
        smem = refs.ragged_smem.at[wg]
        smem[...] = out
        plgpu.commit_smem()
        for bit in range(tokens.bit_length() - 1):
            size = 1 << bit
            first = begin + (valid & -(2 * size))
            pl.when((valid & size) != 0)(functools.partial(copy_heads, smem, first, size))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
