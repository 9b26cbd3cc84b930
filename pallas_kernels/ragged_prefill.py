"""Attention over the paged KV cache for prefill chunks and decode tokens mixed in one flat batch."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.attention_variant import (
    LOG2_E,
    LOWEST,
    PLAIN,
    AttentionVariant,
    bend_tile,
    tile_bounds,
    window_start,
)
from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.mosaic_prefill import ragged_mosaic
from pjengine.pallas_kernels.paged_attention import (
    attend_blocks,
    check_attention_arguments,
    check_kernel_can,
    full_precision_dot,
)
from pjengine.pallas_kernels.triton_extra import run_jax_triton


def ragged_paged_attention(
    q: Float[Array, "t h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "s w"],
    kv_lens: Int[Array, " s"],
    cu_q_lens: Int[Array, " s+1"],
    *,
    page_offset: int | Int[Array, ""],
    scale: float,
    variant: AttentionVariant = PLAIN,
    backend: str | None = None,
) -> Float[Array, "t h d"]:
    """Attends causally with every token of a flat batch to its own sequence's pages.

    Sequence s owns tokens cu_q_lens[s]:cu_q_lens[s + 1], the last positions of its kv_lens[s] slots; it may
    own none. The token at position p sees slots 0..p. Tokens from cu_q_lens[-1] on (padding) give zeros.
    Heads, pages, page_offset, scale, variant and backend are as in `paged_attention`; so is what slots
    past kv_lens may hold, and those before the window of a sequence's first token. The tokens' own keys and
    values must be in the pages already. Sums in float32. Equivalent to `reference`. No backend has a
    derivative for training. Aliases nothing.

    Args:
      cu_q_lens: first token of each sequence and the end of the last one; starts at 0, never decreases.

    Raises:
      ValueError: h is not a multiple of hk, scale is not positive, a variant without meaning, or no such
        backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: Dao 2023 (FlashAttention-2); on Hopper Shah et al. 2024 (FlashAttention-3).
    """
    check_attention_arguments(q.shape[-2], k_pages.shape[1], scale, variant)
    offset = jnp.asarray(page_offset, jnp.int32)
    plain = (q, k_pages, v_pages, page_table, kv_lens, cu_q_lens, offset)
    args = (*plain, variant)
    return dispatch(
        "ragged_paged_attention",
        {
            "triton": functools.partial(ragged_triton, *args, scale=scale),
            "reference": functools.partial(reference, *args, scale=scale),
            "triton_interpret": functools.partial(ragged_triton, *args, scale=scale, interpret=True),
            "mosaic": functools.partial(ragged_mosaic, *args, scale=scale),
            "mosaic_interpret": functools.partial(
                ragged_mosaic, *args, scale=scale, interpret=plgpu.InterpretGPUParams()
            ),
            "jax_triton": functools.partial(
                run_jax_triton, "ragged_jax_triton", *plain, scale=scale, **vars(variant)
            ),
        },
        backend,
    )


@functools.partial(jax.jit, static_argnames="scale")
def reference(
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
) -> Float[Array, "t h d"]:
    """`attend_blocks` over blocks of 16 tokens of one sequence each."""
    block = 16
    work = plan_blocks(kv_lens, cu_q_lens, num_tokens=q.shape[0], tokens_per_block=block)
    row, first_token, first_position, valid = work
    within = jnp.arange(block)[None, :]
    is_valid = within < valid[:, None]
    token = jnp.where(is_valid, first_token[:, None] + within, q.shape[0])
    visible = jnp.where(is_valid, first_position[:, None] + within + 1, 0)
    out = attend_blocks(
        q.at[token].get(mode="fill", fill_value=0),
        k_pages,
        v_pages,
        page_table[row],
        visible,
        page_offset,
        variant,
        scale=scale,
    )
    return jnp.zeros_like(q).at[token].set(out, mode="drop", unique_indices=True)


def plan_blocks(
    kv_lens: Int[Array, " s"], cu_q_lens: Int[Array, " s+1"], *, num_tokens: int, tokens_per_block: int
) -> Int[Array, "4 n"]:
    """Cuts the tokens into blocks of one sequence each: page-table row, first token, its position, count.

    Sequence s starts at block cu_q_lens[s] // tokens_per_block + s: no two sequences share a block, and the
    bound n = num_tokens // tokens_per_block + s + 1 needs no prefix sum. The padding after the last
    sequence is planned as one more sequence at positions below 0, which therefore see nothing. Blocks that
    hold no token have count 0.
    """
    num_seqs = kv_lens.shape[0]
    starts = jnp.append(cu_q_lens, num_tokens)
    first_block = cu_q_lens // tokens_per_block + jnp.arange(num_seqs + 1)
    block = jnp.arange(num_tokens // tokens_per_block + num_seqs + 1)
    seq = (first_block[None, :] <= block[:, None]).sum(axis=1) - 1
    token = starts[seq] + (block - first_block[seq]) * tokens_per_block
    valid = jnp.clip(starts[seq + 1] - token, 0, tokens_per_block)
    position = token - starts[seq + 1] + jnp.append(kv_lens, 0)[seq]
    return jnp.stack([jnp.minimum(seq, num_seqs - 1), token, position, valid])


@dataclass(frozen=True, kw_only=True)
class PrefillTiles:
    """How the ragged kernel cuts its work: every field is a static choice, one compiled kernel each."""

    block_m: int  # rows of a program: block_m // (h // hk) tokens, each with the heads of one KV head
    block_kv: int  # slots per step of the loop
    num_warps: int
    num_stages: int = 3

    @classmethod
    def choose(cls, *, num_tokens: int, group: int, head_dim: int, itemsize: int) -> "PrefillTiles":
        """Picks the widest tiles that spill no registers (compiled for an H200, every shape of `shapes.py`).

        Measured on an H200 (8192 tokens, 32/8 heads of 128, bfloat16): 128 by 128, 8 warps, 3 stages.
        """
        least = pl.next_power_of_2(group)
        if itemsize == 4:  # not rounded to TF32, hence no tensor cores: products take many registers
            block_m = max(16 if head_dim > 128 else 32, least)
            num_warps = 16 if block_m > 32 and head_dim > 64 else 8
            return cls(block_m=block_m, block_kv=16, num_warps=num_warps, num_stages=2)
        block_m = max(least, 128 if num_tokens * group >= 1024 else 64)
        block_kv = block_m * 128 // max(128, pl.next_power_of_2(head_dim))
        if block_m > 64 and head_dim % 8:  # rows of no multiple of 16 bytes: their addresses take registers
            block_kv //= 2
        return cls(block_m=block_m, block_kv=block_kv, num_warps=block_m // 16)


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def ragged_triton(
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
    tiles: PrefillTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "t h d"]:
    """`ragged_paged_attention` as one program per (block of tokens, KV head).

    The jit is there for the same reason as in `decode_triton`. The plan of blocks is the same in every
    layer: XLA computes it once a step.

    Raises:
      NotImplementedError: see `check_kernel_can`.
    """
    check_kernel_can(q, k_pages, v_pages)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    tiles = tiles or PrefillTiles.choose(
        num_tokens=num_tokens, group=group, head_dim=head_dim, itemsize=q.dtype.itemsize
    )
    plan = plan_blocks(kv_lens, cu_q_lens, num_tokens=num_tokens, tokens_per_block=tiles.block_m // group)
    kernel = functools.partial(
        _ragged_kernel,
        group=group,
        block_m=tiles.block_m,
        block_d=max(16, pl.next_power_of_2(head_dim)),
        block_kv=tiles.block_kv,
        scale=scale * LOG2_E,
        **variant.static,
    )
    return pl.pallas_call(
        kernel,
        grid=(plan.shape[1], num_kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="ragged_paged_attention",
    )(page_offset[None], plan, page_table, q, k_pages, v_pages, variant.alibi_slopes, variant.sinks)


def _ragged_kernel(
    page_offset_ref: Any,  # [1]
    plan_ref: Any,  # [4, n]
    page_table_ref: Any,  # [s, w]
    q_ref: Any,  # [t, h, d]
    k_ref: Any,  # [n, hk, p, d]
    v_ref: Any,  # [n, hk, p, d]
    slopes_ref: Any,  # [h] or None
    sinks_ref: Any,  # [h] or None
    out_ref: Any,  # [t, h, d]
    *,
    group: int,
    block_m: int,
    block_d: int,
    block_kv: int,
    scale: float,  # times log2(e): exponentials are powers of 2
    softcap: float | None,
    window: int | None,
) -> None:
    # Last blocks first: the tokens at the end of a long prompt see most, and would else finish last.
    block, kv_head = plan_ref.shape[1] - 1 - pl.program_id(0), pl.program_id(1)
    seq, first_token, first_position, valid = (plan_ref[i, block] for i in range(4))
    page_size, head_dim = k_ref.shape[2:]
    page_offset = page_offset_ref[0]

    # Row r is query head r % group of token r // group: one load of K serves the whole group.
    row = jnp.arange(block_m)
    within = lax.div(row, group)
    token = (first_token + within)[:, None]
    head = kv_head * group + lax.rem(row, group)
    position = first_position + within
    d = jnp.arange(block_d)[None, :]
    is_d = d < head_dim
    is_row = (within < valid)[:, None] & is_d
    q = plt.load(q_ref.at[token, head[:, None], d], mask=is_row, other=0.0)
    unit = LOG2_E / scale  # a score of 1, before it is multiplied with `scale`
    slopes = None if slopes_ref is None else plt.load(slopes_ref.at[head])[:, None].astype(jnp.float32) * unit

    def body(tile: Any, carry: tuple[Any, Any, Any], *, is_masked: bool) -> tuple[Any, Any, Any]:
        acc, top, total = carry
        slot = tile * block_kv + jnp.arange(block_kv)
        is_slot = slot < end_slot
        if window is not None:
            is_slot &= slot >= first_slot
        page = plt.load(
            page_table_ref.at[seq, lax.div(slot, page_size)],
            mask=is_slot if is_masked else None,
            other=0 if is_masked else None,
        )
        at = ((page + page_offset)[:, None], kv_head, lax.rem(slot, page_size)[:, None], d)
        mask = is_slot[:, None] & is_d if is_masked else None if block_d == head_dim else is_d
        other = None if mask is None else 0.0
        scores = full_precision_dot(q, plt.load(k_ref.at[at], mask=mask, other=other).T)
        alibi = None
        if slopes_ref is not None:  # both numbers are exact in float32, and so is their difference
            distance = slot.astype(jnp.float32)[None, :] - position.astype(jnp.float32)[:, None]
            alibi = slopes * distance
        scores = bend_tile(scores, alibi, softcap=softcap, unit=unit)
        if is_masked:
            sees = slot[None, :] <= position[:, None]
            if window is not None:
                sees &= slot[None, :] > position[:, None] - window
            scores = jnp.where(sees, scores, LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        p = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        old = jnp.exp2((top - new_top) * scale)
        v = plt.load(v_ref.at[at], mask=mask, other=other)  # zero where no row sees: 0 * NaN would be NaN
        acc = acc * old[:, None] + full_precision_dot(p.astype(v.dtype), v)
        return acc, new_top, total * old + p.sum(axis=1)

    end_slot = jnp.where(valid > 0, jnp.maximum(first_position + valid, 0), 0)
    first_slot = window_start(first_position, window)
    bounds = tile_bounds(first_position, end_slot, window=window, block_kv=block_kv)
    plain, masked = (functools.partial(body, is_masked=is_masked) for is_masked in (False, True))
    zeros = jnp.zeros((block_m,), jnp.float32)
    top, total = zeros + LOWEST, zeros
    if sinks_ref is not None:  # as if a slot without a value had been seen
        top, total = plt.load(sinks_ref.at[head]).astype(jnp.float32) * unit, total + 1.0
    carry = (jnp.zeros((block_m, block_d), jnp.float32), top, total)
    if window is not None:
        # A row that sees nothing of the first tile adds up weights there, which its first slot makes 0.
        carry = lax.fori_loop(bounds.begin, bounds.full, masked, carry)
    carry = lax.fori_loop(bounds.full, bounds.diagonal, plain, carry)
    acc, _, total = lax.fori_loop(bounds.diagonal, bounds.end, masked, carry)
    out = acc / jnp.where(total > 0, total, 1.0)[:, None]
    plt.store(out_ref.at[token, head[:, None], d], out.astype(out_ref.dtype), mask=is_row)
