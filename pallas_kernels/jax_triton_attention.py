"""The attention kernels once more, in Triton's own language and called through jax-triton.

Pallas's Triton lowering, which `paged_attention` and `ragged_prefill` are written for, is deprecated; on GPUs
before Hopper these kernels are its successors. Algorithms, tiles, refusals and references are the ones of
those two files, but for one thing: the splits of a sequence are merged by a second kernel, which needs no
counters. Pallas's interpreter cannot run them.

Importing this file needs the extra `triton`. The kernels stay clear of the tests' type checker
(`no_type_check`): Triton reads their source, and would find the checker's wrapper instead.
"""

import functools
from dataclasses import replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.attention_variant import LOG2_E, LOWEST
from pjengine.pallas_kernels.dispatch import platform
from pjengine.pallas_kernels.paged_attention import DecodeTiles, check_kernel_can
from pjengine.pallas_kernels.ragged_prefill import PrefillTiles, plan_blocks

_LOWEST = tl.constexpr(LOWEST)
_LOG2_E = tl.constexpr(LOG2_E)

MAX_SPLITS = 16


def check_jax_triton_can(q: Array, k_pages: Array, v_pages: Array) -> None:
    """Refuses what these kernels do not do: what `check_kernel_can` refuses, and platforms but GPUs.

    Raises:
      NotImplementedError: the text says which.
    """
    if platform() != "gpu":
        raise NotImplementedError(f"jax_triton: platform {platform()}: wanted a GPU")
    check_kernel_can(q, k_pages, v_pages)


def _static(
    q: Array, k_pages: Array, page_table: Array, *, scale: float, window: int | None, softcap: float | None
) -> dict[str, Any]:
    """What both kernels are compiled for, beside their tiles; 0 stands for None.

    Raises:
      ValueError: window or softcap is not positive.
    """
    for name, value in (("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    return {
        "width": page_table.shape[1],
        "num_kv_heads": num_kv_heads,
        "page_size": page_size,
        "head_dim": head_dim,
        "group": q.shape[1] // num_kv_heads,
        "block_d": max(16, triton.next_power_of_2(head_dim)),
        "scale": scale * LOG2_E,  # exponentials are powers of 2
        "window": window or 0,
        "softcap": softcap or 0.0,
    }


def choose_decode_tiles(
    q: Float[Array, "b h d"], k_pages: Float[Array, "n hk p d"], max_slots: int
) -> DecodeTiles:
    """`DecodeTiles.choose_for`, but at most MAX_SPLITS splits.

    Measured on an H100 (48/1 heads of 128, 8 x 16k slots, bfloat16): 32 splits take a third longer than 16.
    """
    tiles = DecodeTiles.choose_for(q, k_pages, max_slots)
    return replace(tiles, num_splits=min(tiles.num_splits, MAX_SPLITS))


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "window", "softcap"))
def decode_jax_triton(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "b w"],
    kv_lens: Int[Array, " b"],
    page_offset: Int[Array, ""],
    *,
    scale: float,
    tiles: DecodeTiles | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
) -> Float[Array, "b h d"]:
    """`paged_attention` as one program per (sequence, KV head, split), and a merge of the splits.

    Args:
      alibi_slopes: head i adds alibi_slopes[i] * (slot - position) to its scores, softcap or not.
      window: a token sees its last `window` slots only, its own among them.
      softcap: scores become softcap * tanh(score / softcap).
      sinks: head i has one more slot to attend to, of score sinks[i] and value 0.

    Raises:
      ValueError: window or softcap is not positive.
      NotImplementedError: see `check_jax_triton_can`.
    """
    check_jax_triton_can(q, k_pages, v_pages)
    static = _static(q, k_pages, page_table, scale=scale, window=window, softcap=softcap)
    (batch, num_heads, _), num_kv_heads = q.shape, k_pages.shape[1]
    group, max_slots = num_heads // num_kv_heads, page_table.shape[1] * k_pages.shape[2]
    tiles = tiles or choose_decode_tiles(q, k_pages, min(max_slots, window or max_slots))
    splits, struct = tiles.num_splits, jax.ShapeDtypeStruct
    out_type = [struct(q.shape, q.dtype)]
    if splits > 1:
        out_type = [struct((splits, *q.shape), jnp.float32), struct((splits, batch, num_heads), jnp.float32)]
    outs = jax_triton.triton_call(
        page_offset[None], kv_lens, page_table, q, k_pages, v_pages, alibi_slopes, sinks,
        **({"lse_ptr": None} if splits == 1 else {}),
        kernel=_decode_kernel,
        out_type=out_type,
        # The KV heads of a page lie next to each other: neighbouring programs read neighbouring memory.
        grid=(num_kv_heads, splits, batch),
        name="paged_decode",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        block_m=max(16, triton.next_power_of_2(group)),  # a tensor-core product has at least 16 rows
        block_kv=tiles.block_kv, num_splits=splits,
        **static,
    )  # fmt: skip
    return outs[0] if splits == 1 else _merge_splits(*outs, dtype=q.dtype)


@no_type_check
@triton.jit
def _decode_kernel(
    page_offset_ptr,  # [1]
    kv_lens_ptr,  # [b]
    page_table_ptr,  # [b, width]
    q_ptr,  # [b, h, d]
    k_ptr,  # [n, hk, p, d]
    v_ptr,  # [n, hk, p, d]
    slopes_ptr,  # [h], or None
    sinks_ptr,  # [h], or None
    out_ptr,  # [splits, b, h, d]
    lse_ptr,  # [splits, b, h], log2 of the sum of exponentials; None with one split
    width: tl.constexpr,
    num_kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    block_kv: tl.constexpr,
    num_splits: tl.constexpr,
    scale: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
):
    kv_head, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    page_offset = tl.load(page_offset_ptr)
    kv_len = tl.load(kv_lens_ptr + b)
    first_slot = tl.maximum(kv_len - window, 0) if window > 0 else 0
    first_tile = first_slot // block_kv
    num_tiles = tl.cdiv(kv_len, block_kv)
    tiles_per_split = tl.cdiv(num_tiles - first_tile, num_splits)
    first_tile += split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)

    # Rows are the query heads that share this KV head, padded to block_m.
    row = tl.arange(0, block_m)
    head = kv_head * group + row
    d = tl.arange(0, block_d)[None, :]
    is_d = d < head_dim
    is_row = (row < group)[:, None] & is_d
    at_out = (b * num_kv_heads * group + head)[:, None] * head_dim + d
    q = tl.load(q_ptr + at_out, mask=is_row, other=0.0)
    slopes = None if slopes_ptr is None else tl.load(slopes_ptr + head, mask=row < group, other=0.0)

    acc = tl.zeros([block_m, block_d], tl.float32)
    # A sink is counted once, by the first split.
    top, total = _start(sinks_ptr, head, (row < group) & (split == 0), scale)
    for tile in range(first_tile, end_tile):
        slot = tile * block_kv + tl.arange(0, block_kv)
        is_slot = (slot >= first_slot) & (slot < kv_len)
        page = tl.load(page_table_ptr + b * width + slot // page_size, mask=is_slot, other=0)
        at = _find(page + page_offset, kv_head, slot, num_kv_heads, page_size)[:, None] * head_dim + d
        mask = is_slot[:, None] & is_d
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = _bend(scores, slopes, slot[None, :], kv_len - 1, scale, softcap)
        scores = tl.where(is_slot[None, :], scores, _LOWEST)
        p, old, top, total = _weigh(scores, top, total, scale)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)  # zero where nobody looks: 0 * NaN would be NaN
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")

    safe_total = tl.where(total > 0, total, 1.0)
    out = (acc / safe_total[:, None]).to(out_ptr.dtype.element_ty)
    if num_splits == 1:
        tl.store(out_ptr + at_out, out, mask=is_row)
    else:
        num_rows = tl.num_programs(2) * num_kv_heads * group  # of one split
        lse = tl.where(total > 0, top * scale + tl.log2(safe_total), _LOWEST)
        tl.store(out_ptr + split * num_rows * head_dim + at_out, out, mask=is_row)
        tl.store(lse_ptr + split * num_rows + b * num_kv_heads * group + head, lse, mask=row < group)


def _merge_splits(
    out: Float[Array, "splits b h d"], lse: Float[Array, "splits b h"], *, dtype: Any
) -> Float[Array, "b h d"]:
    """Averages the splits, each weighted with its sum of exponentials. (XLA would take two kernels.)"""
    num_splits, batch, num_heads, head_dim = out.shape
    return jax_triton.triton_call(
        out, lse,
        kernel=_merge_kernel,
        out_type=jax.ShapeDtypeStruct((batch, num_heads, head_dim), dtype),
        grid=(num_heads, batch),
        name="paged_decode_merge",
        num_warps=2, num_stages=1,
        head_dim=head_dim, num_splits=num_splits,
        block_splits=triton.next_power_of_2(num_splits), block_d=max(16, triton.next_power_of_2(head_dim)),
    )  # fmt: skip


@no_type_check
@triton.jit
def _merge_kernel(
    out_ptr,  # [splits, b, h, d]
    lse_ptr,  # [splits, b, h]
    merged_ptr,  # [b, h, d]
    head_dim: tl.constexpr,
    num_splits: tl.constexpr,
    block_splits: tl.constexpr,
    block_d: tl.constexpr,
):
    num_rows = tl.num_programs(0) * tl.num_programs(1)
    at_row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    split, d = tl.arange(0, block_splits), tl.arange(0, block_d)
    lse = tl.load(lse_ptr + split * num_rows + at_row, mask=split < num_splits, other=_LOWEST)
    weight = tl.exp2(lse - tl.max(lse, 0))
    mask = (split < num_splits)[:, None] & (d < head_dim)[None, :]
    at = (split * num_rows + at_row)[:, None] * head_dim + d[None, :]
    out = tl.load(out_ptr + at, mask=mask, other=0.0)
    merged = tl.sum(out * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(merged_ptr + at_row * head_dim + d, merged.to(merged_ptr.dtype.element_ty), mask=d < head_dim)


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "window", "softcap"))
def ragged_jax_triton(
    q: Float[Array, "t h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "s w"],
    kv_lens: Int[Array, " s"],
    cu_q_lens: Int[Array, " s+1"],
    page_offset: Int[Array, ""],
    *,
    scale: float,
    tiles: PrefillTiles | None = None,
    alibi_slopes: Float[Array, " h"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " h"] | None = None,
) -> Float[Array, "t h d"]:
    """`ragged_paged_attention` as one program per (block of tokens, KV head).

    The last four arguments are as in `decode_jax_triton`.

    Raises:
      ValueError: window or softcap is not positive.
      NotImplementedError: see `check_jax_triton_can`.
    """
    check_jax_triton_can(q, k_pages, v_pages)
    static = _static(q, k_pages, page_table, scale=scale, window=window, softcap=softcap)
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k_pages.shape[1]
    group = num_heads // num_kv_heads
    tiles = tiles or PrefillTiles.choose(
        num_tokens=num_tokens, group=group, head_dim=head_dim, itemsize=q.dtype.itemsize
    )
    plan = plan_blocks(kv_lens, cu_q_lens, num_tokens=num_tokens, tokens_per_block=tiles.block_m // group)
    return jax_triton.triton_call(
        page_offset[None], plan, page_table, q, k_pages, v_pages, alibi_slopes, sinks,
        kernel=_ragged_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(plan.shape[1], num_kv_heads),
        name="ragged_paged_attention",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        block_m=tiles.block_m, block_kv=tiles.block_kv,
        **static,
    )  # fmt: skip


@no_type_check
@triton.jit
def _ragged_kernel(
    page_offset_ptr,  # [1]
    plan_ptr,  # [4, n]
    page_table_ptr,  # [s, width]
    q_ptr,  # [t, h, d]
    k_ptr,  # [n, hk, p, d]
    v_ptr,  # [n, hk, p, d]
    slopes_ptr,  # [h], or None
    sinks_ptr,  # [h], or None
    out_ptr,  # [t, h, d]
    width: tl.constexpr,
    num_kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    group: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    block_kv: tl.constexpr,
    scale: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
):
    # Last blocks first: the tokens at the end of a long prompt see most, and would else finish last.
    num_blocks, kv_head = tl.num_programs(0), tl.program_id(1)
    plan_ptr += num_blocks - 1 - tl.program_id(0)
    seq, first_token = tl.load(plan_ptr), tl.load(plan_ptr + num_blocks)
    first_position, valid = tl.load(plan_ptr + 2 * num_blocks), tl.load(plan_ptr + 3 * num_blocks)
    page_offset = tl.load(page_offset_ptr)

    # Row r is query head r % group of token r // group: one load of K serves the whole group.
    row = tl.arange(0, block_m)
    within = row // group
    head = kv_head * group + row % group
    position = (first_position + within)[:, None]
    d = tl.arange(0, block_d)[None, :]
    is_d = d < head_dim
    is_row = (within < valid)[:, None] & is_d
    at_out = ((first_token + within) * (num_kv_heads * group) + head)[:, None] * head_dim + d
    q = tl.load(q_ptr + at_out, mask=is_row, other=0.0)
    slopes = None if slopes_ptr is None else tl.load(slopes_ptr + head)

    #  first_slot ............... first_position ........ end_slot
    #  [ some rows' windows ][ every row sees ][ some rows see ]
    #  0                     1                 2               : the phases; only 1 goes without masks
    end_slot = tl.where(valid > 0, tl.maximum(first_position + valid, 0), 0)
    num_tiles = tl.cdiv(end_slot, block_kv)
    first_slot = tl.maximum(first_position + 1 - window, 0) if window > 0 else 0
    every_row = tl.maximum(end_slot - window, 0) if window > 0 else 0
    first_tile = tl.minimum(first_slot // block_kv, num_tiles)
    first_full = tl.minimum(tl.cdiv(every_row, block_kv), num_tiles)
    end_full = tl.maximum(tl.minimum(first_position + 1, end_slot) // block_kv, first_full)

    acc = tl.zeros([block_m, block_d], tl.float32)
    top, total = _start(sinks_ptr, head, within < valid, scale)
    for phase in tl.static_range(0 if window > 0 else 1, 3):
        start = first_tile if phase == 0 else first_full if phase == 1 else end_full
        end = first_full if phase == 0 else end_full if phase == 1 else num_tiles
        for tile in range(start, end):
            slot = tile * block_kv + tl.arange(0, block_kv)
            is_slot = (slot >= first_slot) & (slot < end_slot)
            page = _load(page_table_ptr + seq * width + slot // page_size, is_slot, 0, phase != 1)
            at = _find(page + page_offset, kv_head, slot, num_kv_heads, page_size)[:, None] * head_dim + d
            mask = is_slot[:, None] & is_d if phase != 1 else is_d
            k = _load(k_ptr + at, mask, 0.0, phase != 1 or head_dim < block_d)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = _bend(scores, slopes, slot[None, :], position, scale, softcap)
            if phase != 1:
                scores = tl.where(slot[None, :] <= position, scores, _LOWEST)
            if phase != 1 and window > 0:
                scores = tl.where(slot[None, :] > position - window, scores, _LOWEST)
            # A row that has seen nothing yet weighs all with 1; its first score makes that nothing.
            p, old, top, total = _weigh(scores, top, total, scale)
            v = _load(v_ptr + at, mask, 0.0, phase != 1 or head_dim < block_d)
            acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=is_row)


@no_type_check
@triton.jit
def _find(page, kv_head, slot, num_kv_heads: tl.constexpr, page_size: tl.constexpr):
    """Where slots of these pages lie in the cache, counted in rows. (A cache may pass 2^31 elements.)"""
    return (page.to(tl.int64) * num_kv_heads + kv_head) * page_size + slot % page_size


@no_type_check
@triton.jit
def _load(pointers, mask, other, is_masked: tl.constexpr):
    if is_masked:
        return tl.load(pointers, mask=mask, other=other)
    else:
        return tl.load(pointers)


@no_type_check
@triton.jit
def _start(sinks_ptr, head, is_counted, scale: tl.constexpr):
    """Each row's running maximum of the scores, and sum of exponentials: of nothing, or of its sink."""
    top = tl.zeros_like(head).to(tl.float32) + _LOWEST
    if sinks_ptr is None:
        return top, tl.zeros_like(top)
    else:
        sinks = tl.load(sinks_ptr + head, mask=is_counted, other=0.0).to(tl.float32)
        return tl.where(is_counted, sinks * (_LOG2_E / scale), top), is_counted.to(tl.float32)


@no_type_check
@triton.jit
def _bend(scores, slopes, slot, position, scale: tl.constexpr, softcap: tl.constexpr):
    """Applies softcap and ALiBi to scores that are yet to be scaled: a score of 1 is log2(e) / scale here."""
    if softcap > 0:  # tanh x = 1 - 2 / (1 + exp 2x), which is off by 1e-7 of the cap
        cap: tl.constexpr = softcap * (_LOG2_E / scale)
        root = tl.rsqrt(1 + tl.exp2(scores * (2 * _LOG2_E / cap)))  # takes fewer registers than a division
        scores = cap - 2 * cap * (root * root)
    if slopes is not None:
        scores += (slopes.to(tl.float32) * (_LOG2_E / scale))[:, None] * (slot - position)
    return scores


@no_type_check
@triton.jit
def _weigh(scores, top, total, scale: tl.constexpr):
    """One step of the online softmax: weights, the factor of what was summed before, and the new state."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores * scale - (new_top * scale)[:, None])
    old = tl.exp2((top - new_top) * scale)
    return p, old, new_top, total * old + tl.sum(p, 1)
