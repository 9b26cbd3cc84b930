"""Decode attention over the paged KV cache: one query token per sequence."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.attention_variant import (
    LOG2_E,
    LOWEST,
    PLAIN,
    AttentionVariant,
    bend_tile,
    by_head,
    window_start,
)
from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.last_split import Counters, counters_for, finish_last
from pjengine.pallas_kernels.triton_extra import run_jax_triton

# Up to so many query heads per KV head, the last program of a sequence merges its splits. For more, it takes
# longer than a kernel that follows, with a program for each head.
MERGED_GROUP = 8
AT_ONCE = 3 * 132  # programs on the processors of an H200, or an H100


def paged_attention(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "b w"],
    kv_lens: Int[Array, " b"],
    *,
    page_offset: int | Int[Array, ""],
    scale: float,
    variant: AttentionVariant = PLAIN,
    counters: Counters | None = None,
    backend: str | None = None,
) -> Float[Array, "b h d"]:
    """Attends with one query token per sequence to the first `kv_lens[b]` slots of its page-table row.

    Query head i reads KV head i // (h // hk). A row with kv_lens 0 (padding) gives zeros. Slots past
    kv_lens may hold anything, NaN too, and so may the null page and slots before the window. Sums in
    float32. Equivalent to `reference`. No backend has a derivative for training. Aliases nothing.

    Args:
      q: the token's queries, rotated already.
      k_pages, v_pages: n pages of p slots each, of all layers.
      page_table: pages of each sequence in order, counted from `page_offset`; any value past kv_lens, and
        for pages that end before the window.
      kv_lens: in tokens, the one that attends included; at most w * p.
      page_offset: the layer's first page.
      scale: factor of the scores, greater than 0.
      variant: how the layer departs from plain attention.
      counters: at least b * hk, those of the step; None for zeros of its own, which take a kernel.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: h is not a multiple of hk, scale is not positive, a variant without meaning, or no such
        backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: pages, Kwon et al. 2023; splits of one sequence, Dao et al. 2023 (Flash-Decoding).
    """
    check_attention_arguments(q.shape[-2], k_pages.shape[1], scale, variant)
    args = (q, k_pages, v_pages, page_table, kv_lens, jnp.asarray(page_offset, jnp.int32))
    lent = counters or Counters(len(q) * k_pages.shape[1])

    def triton(*, interpret: bool) -> Float[Array, "b h d"]:
        out, lent.array = decode_triton(*args, lent.array, variant, scale=scale, interpret=interpret)
        return out

    return dispatch(
        "paged_attention",
        {
            "triton": functools.partial(triton, interpret=False),
            "reference": functools.partial(reference, *args, variant, scale=scale),
            "triton_interpret": functools.partial(triton, interpret=True),
            "jax_triton": functools.partial(
                run_jax_triton, "decode_jax_triton", *args, scale=scale, **vars(variant)
            ),
        },
        backend,
    )


def check_attention_arguments(
    num_heads: int, num_kv_heads: int, scale: float, variant: AttentionVariant
) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    variant.check(num_heads)


@functools.partial(jax.jit, static_argnames="scale")
def reference(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "b w"],
    kv_lens: Int[Array, " b"],
    page_offset: Int[Array, ""],
    variant: AttentionVariant = PLAIN,
    *,
    scale: float,
) -> Float[Array, "b h d"]:
    """Each token's softmax(scale * q K^T) V over its visible slots, in float32."""
    visible = kv_lens[:, None]
    out = attend_blocks(q[:, None], k_pages, v_pages, page_table, visible, page_offset, variant, scale=scale)
    return out[:, 0]


def attend_blocks(
    q: Float[Array, "b r h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "b w"],
    visible: Int[Array, "b r"],
    page_offset: Int[Array, ""],
    variant: AttentionVariant,
    *,
    scale: float,
) -> Float[Array, "b r h d"]:
    """The spec of both attention ops: query r of block b attends to slots 0..visible[b, r]-1 of row b.

    It is the token at position visible[b, r] - 1; `variant` says how it attends, and which of these slots it
    does not see. Goes through the cache some pages at a time with a running maximum and sum (online
    softmax), up to the longest row only, so that time follows the lengths in use and memory is bounded. Rows
    that see nothing give zeros.
    """
    num_blocks, num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    pages_per_chunk = min(max(1, 64 // page_size), page_table.shape[1])
    chunk = pages_per_chunk * page_size
    pages = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_chunk))) + page_offset
    q32 = q.astype(jnp.float32).reshape(num_blocks, num_rows, num_kv_heads, -1, head_dim) * scale

    def gather(cache: Float[Array, "n hk p d"], i: Int[Array, ""]) -> Float[Array, "b c p hk d"]:
        ids = lax.dynamic_slice_in_dim(pages, i * pages_per_chunk, pages_per_chunk, axis=1)
        return cache[ids].astype(jnp.float32).swapaxes(2, 3)

    def body(i: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, top, total = carry
        slot = i * chunk + jnp.arange(chunk)
        distance = slot[None, None, :] - (visible[:, :, None] - 1)
        sees = variant.sees(distance)
        k = gather(k_pages, i).reshape(num_blocks, chunk, num_kv_heads, head_dim)
        v = gather(v_pages, i).reshape(num_blocks, chunk, num_kv_heads, head_dim)
        v = jnp.where(sees.any(axis=1)[:, :, None, None], v, 0)  # unwritten: 0 * NaN would be NaN
        scores = jnp.einsum("brkgd,bskd->bkgrs", q32, k, precision="highest")
        scores = variant.bend(scores, distance[:, None, None])
        new_top = jnp.maximum(top, scores.max(axis=-1))
        p = jnp.exp(scores - new_top[..., None])
        old = jnp.exp(top - new_top)
        acc = acc * old[..., None] + jnp.einsum("bkgrs,bskd->bkgrd", p, v, precision="highest")
        return acc, new_top, total * old + p.sum(axis=-1)

    shape = (num_blocks, num_kv_heads, num_heads // num_kv_heads, num_rows)
    # The lowest float, not -inf: a row that sees nothing must not compute inf - inf.
    top, total = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape)
    if variant.sinks is not None:  # as if a slot without a value had been seen
        top, total = jnp.maximum(top, by_head(variant.sinks, top[..., None])[..., 0]), total + 1
    carry = (jnp.zeros((*shape, head_dim)), top, total)
    num_chunks = lax.div(visible.max() + chunk - 1, chunk)
    first_slot = window_start(jnp.where(visible > 0, visible - 1, num_chunks * chunk), variant.window)
    acc, _, total = lax.fori_loop(jnp.min(first_slot) // chunk, num_chunks, body, carry)
    out = acc / jnp.where(total > 0, total, 1)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)


@dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """How the decode kernel cuts its work: every field is a static choice, one compiled kernel each."""

    block_kv: int  # slots per step of the loop
    num_splits: int  # programs that share one sequence's slots
    num_warps: int = 4
    # Triton counts levels of indirection: the page-table load takes two, so K and V are double-buffered
    # from 5 on, and not at 3.
    num_stages: int = 5
    num_at_once: int = AT_ONCE  # programs; of more, the longest sequences' begin first

    @classmethod
    def choose(
        cls, *, batch: int, num_kv_heads: int, group: int, head_dim: int, max_slots: int, itemsize: int
    ) -> "DecodeTiles":
        """Picks tiles of at most 16 KiB, and splits that fill 132 processors, each with 3 programs at a time.

        Measured on an H200 (B 8 to 256, 1k to 16k tokens, 32/8 heads of 128, bfloat16): 64 slots, 4 warps,
        5 stages. On an H100 (B 4 to 32, 576 to 8k tokens): 4 programs a processor take up to 10 % longer.
        Of more than 32 query heads per KV head, the registers of a processor hold 2 programs.
        """
        block_kv, num_warps = max(16, min(64, 16384 // (pl.next_power_of_2(head_dim) * itemsize))), 4
        if itemsize == 4 and (group > 16 or head_dim > 128):  # no tensor cores: 4 warps would spill registers
            block_kv, num_warps = 16, 8
        at_once = AT_ONCE if group <= 32 else 2 * 132
        wanted = at_once // (batch * num_kv_heads)  # more than run at once would wait for the first ones
        most = 16 if group <= MERGED_GROUP else 32
        num_splits = max(1, min(wanted, most, pl.cdiv(max_slots, block_kv)))
        return cls(block_kv=block_kv, num_splits=num_splits, num_warps=num_warps, num_at_once=at_once)

    @classmethod
    def choose_for(
        cls, q: Float[Array, "b h d"], k_pages: Float[Array, "n hk p d"], max_slots: int
    ) -> "DecodeTiles":
        """The same for these arrays, of which a token sees at most `max_slots` slots."""
        return cls.choose(
            batch=q.shape[0],
            num_kv_heads=k_pages.shape[1],
            group=q.shape[1] // k_pages.shape[1],
            head_dim=q.shape[2],
            max_slots=max_slots,
            itemsize=q.dtype.itemsize,
        )


def check_kernel_can(
    q: Array | jax.ShapeDtypeStruct,
    k_pages: Array | jax.ShapeDtypeStruct,
    v_pages: Array | jax.ShapeDtypeStruct,
) -> None:
    """Refuses what neither attention kernel does.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16, float16 and float32, page sizes that
        are no multiple of 16, more than 128 query heads per KV head, head_dim above 256.
    """
    dtypes = {x.dtype for x in (q, k_pages, v_pages)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(f"dtypes {names}: wanted one of bfloat16, float16, float32 for all")
    if k_pages.shape[2] % 16:
        raise NotImplementedError(f"page_size {k_pages.shape[2]}: wanted a multiple of 16")
    if q.shape[1] // k_pages.shape[1] > 128:
        raise NotImplementedError(f"{q.shape[1] // k_pages.shape[1]} query heads per KV head: at most 128")
    if q.shape[2] > 256:
        raise NotImplementedError(f"head_dim {q.shape[2]}: at most 256")


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "interpret"))
def decode_triton(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    page_table: Int[Array, "b w"],
    kv_lens: Int[Array, " b"],
    page_offset: Int[Array, ""],
    counters: Int[Array, " c"] | None = None,
    variant: AttentionVariant = PLAIN,
    *,
    scale: float,
    tiles: DecodeTiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b h d"], Int[Array, " c"]]:
    """`paged_attention` as one program per (sequence, KV head, split), and a merge of the splits.

    The last program of a sequence and KV head merges them, or, above MERGED_GROUP, a second kernel.

    Returns the counters too: zeros, as they came, or of its own. The jit is there so that the layers of a
    model share one trace: page_offset is an operand, so the compiled kernel is one too.

    Raises:
      NotImplementedError: see `check_kernel_can`.
      ValueError: fewer counters than KV heads of all sequences.
    """
    check_kernel_can(q, k_pages, v_pages)
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    counters = counters_for(batch * num_kv_heads, counters)
    group, max_slots = num_heads // num_kv_heads, page_table.shape[1] * page_size
    tiles = tiles or DecodeTiles.choose_for(q, k_pages, min(max_slots, variant.window or max_slots))
    kernel = functools.partial(
        _decode_kernel,
        group=group,
        block_m=max(16, pl.next_power_of_2(group)),  # a tensor-core product has at least 16 rows
        block_d=max(16, pl.next_power_of_2(head_dim)),
        tiles=tiles,
        scale=scale * LOG2_E,
        **variant.static,
        interpret=interpret,
    )
    kv_lens, page_table, order = _ordered(kv_lens, page_table, num_kv_heads, tiles)
    is_followed = tiles.num_splits > 1 and group > MERGED_GROUP
    is_counted = tiles.num_splits > 1 and not is_followed
    sums = [jax.ShapeDtypeStruct((tiles.num_splits, *of), jnp.float32) for of in (q.shape, q.shape[:-1])]
    extras = (counters if is_counted else None, variant.alibi_slopes, variant.sinks, order)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    outs = pl.pallas_call(
        functools.partial(_give_splits, kernel) if is_followed else kernel,
        # The KV heads of a page lie next to each other: neighbouring programs read neighbouring memory.
        grid=(num_kv_heads, tiles.num_splits, batch),
        out_shape=sums if is_followed else [out, *(is_counted * [*sums, counters])],
        input_output_aliases={6: 3} if is_counted else {},
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(page_offset[None], kv_lens, page_table, q, k_pages, v_pages, *extras)
    if is_followed:
        return _merge_after(*outs, dtype=q.dtype, interpret=interpret), counters
    return outs[0], outs[3] if is_counted else counters


def _ordered(
    kv_lens: Int[Array, " b"], page_table: Int[Array, "b w"], num_kv_heads: int, tiles: DecodeTiles
) -> tuple[Int[Array, " b"], Int[Array, "b w"], Int[Array, " b"] | None]:
    """Sequences as programs begin with them, and which these are; None: as they came, all at once.

    Of more programs than run at once, the longest sequences' begin first: begun last, they would end alone.
    """
    if len(kv_lens) * num_kv_heads * tiles.num_splits <= tiles.num_at_once:
        return kv_lens, page_table, None
    order = jnp.argsort(kv_lens, descending=True).astype(jnp.int32)
    return kv_lens[order], page_table[order], order


def _give_splits(kernel: Any, *refs: Any) -> None:
    """`_decode_kernel` without an output of its own."""
    *inputs, partial_ref, lse_ref = refs
    kernel(*inputs, None, partial_ref, lse_ref)


def _merge_after(
    partial: Float[Array, "s b h d"], lse: Float[Array, "s b h"], *, dtype: Any, interpret: bool
) -> Float[Array, "b h d"]:
    """Averages splits, each weighted with 2 ** lse: a program for each head."""
    _, batch, num_heads, head_dim = partial.shape
    return pl.pallas_call(
        functools.partial(_merge_kernel, block_d=max(16, pl.next_power_of_2(head_dim))),
        grid=(num_heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, head_dim), dtype),
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="paged_decode_merge",
    )(partial, lse)


def _merge_kernel(partial_ref: Any, lse_ref: Any, out_ref: Any, *, block_d: int) -> None:  # as in `_merge`
    head = pl.program_id(0) + jnp.arange(1)
    _merge(partial_ref, lse_ref, out_ref, pl.program_id(1), head, head >= 0, partial_ref.shape[0], block_d)


def _decode_kernel(
    page_offset_ref: Any,  # [1]
    kv_lens_ref: Any,  # [b]
    page_table_ref: Any,  # [b, w]
    q_ref: Any,  # [b, h, d]
    k_ref: Any,  # [n, hk, p, d]
    v_ref: Any,  # [n, hk, p, d]
    _: Any,  # the counters as they come in; None of one split
    slopes_ref: Any,  # [h] or None
    sinks_ref: Any,  # [h] or None
    order_ref: Any,  # [b]: which sequence of q is the i-th of kv_lens and page_table; None: the i-th
    out_ref: Any,  # [b, h, d], or None if a kernel that follows merges
    # Of several splits: what merging reads, and the counters [b * hk or more] of those who merge here.
    partial_ref: Any = None,
    lse_ref: Any = None,
    counters_ref: Any = None,
    *,
    group: int,
    block_m: int,
    block_d: int,
    tiles: DecodeTiles,
    scale: float,  # times log2(e): exponentials are powers of 2
    softcap: float | None,
    window: int | None,
    interpret: bool,
) -> None:
    kv_head, split, place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    b = place if order_ref is None else order_ref[place]
    block_kv, num_splits = tiles.block_kv, tiles.num_splits
    page_size, head_dim = k_ref.shape[2:]
    page_offset = page_offset_ref[0]
    kv_len = kv_lens_ref[place]
    first_slot = window_start(kv_len - 1, window)
    begin = 0 if window is None else lax.div(first_slot, block_kv)
    end = lax.div(kv_len + (block_kv - 1), block_kv)
    num_tiles = end - begin
    tiles_per_split = lax.div(num_tiles + (num_splits - 1), num_splits)
    first_tile = begin + split * tiles_per_split
    end_tile = jnp.minimum(first_tile + tiles_per_split, end)

    # Rows are the query heads that share this KV head, padded to block_m.
    row = jnp.arange(block_m)
    head = kv_head * group + row
    d = jnp.arange(block_d)[None, :]
    is_d = d < head_dim
    is_row = (row < group)[:, None] & is_d
    q = plt.load(q_ref.at[b, head[:, None], d], mask=is_row, other=0.0)
    unit = LOG2_E / scale  # a score of 1, before it is multiplied with `scale`

    def load_by_head(ref: Any) -> Any:
        return plt.load(ref.at[head], mask=row < group, other=0.0).astype(jnp.float32) * unit

    slopes = None if slopes_ref is None else load_by_head(slopes_ref)[:, None]

    def body(tile: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        acc, top, total = carry
        slot = tile * block_kv + jnp.arange(block_kv)
        is_slot = slot < kv_len
        if window is not None:
            is_slot &= slot >= first_slot
        number_at = page_table_ref.at[place, lax.div(slot, page_size)]
        page = plt.load(number_at, mask=is_slot, other=0) + page_offset
        # Every index an array: the interpreter cannot mix index arrays with slices in a masked load.
        at = (page[:, None], kv_head, lax.rem(slot, page_size)[:, None], d)
        mask = is_slot[:, None] & is_d
        k = plt.load(k_ref.at[at], mask=mask, other=0.0)
        alibi = None
        if slopes_ref is not None:
            alibi = slopes * (slot - (kv_len - 1)).astype(jnp.float32)[None, :]
        scores = bend_tile(full_precision_dot(q, k.T), alibi, softcap=softcap, unit=unit)
        scores = jnp.where(is_slot[None, :], scores, LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        p = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        old = jnp.exp2((top - new_top) * scale)
        # Zero where the token does not see: 0 * NaN would be NaN.
        v = plt.load(v_ref.at[at], mask=mask, other=0.0)
        acc = acc * old[:, None] + full_precision_dot(p.astype(v.dtype), v)
        return acc, new_top, total * old + p.sum(axis=1)

    zeros = jnp.zeros((block_m,), jnp.float32)
    top, total = zeros + LOWEST, zeros
    if sinks_ref is not None:  # as if a slot without a value had been seen, by one of the splits
        top = jnp.where(split == 0, load_by_head(sinks_ref), top)
        total = jnp.where(split == 0, total + 1.0, total)
    carry = (jnp.zeros((block_m, block_d), jnp.float32), top, total)
    acc, top, total = lax.fori_loop(first_tile, end_tile, body, carry)
    safe_total = jnp.where(total > 0, total, 1.0)
    out = acc / safe_total[:, None]
    if num_splits == 1:
        plt.store(out_ref.at[b, head[:, None], d], out.astype(out_ref.dtype), mask=is_row)
        return
    lse = jnp.where(total > 0, top * scale + jnp.log2(safe_total), LOWEST)

    def give() -> None:
        plt.store(partial_ref.at[split, b, head[:, None], d], out, mask=is_row)
        plt.store(lse_ref.at[split, b, head], lse, mask=row < group)

    if counters_ref is None:
        give()
        return
    # Splits past the sequence's end have nothing to give; the first one has, be it zeros.
    num_active = jnp.maximum(lax.div(num_tiles + (tiles_per_split - 1), jnp.maximum(tiles_per_split, 1)), 1)

    @pl.when(split < num_active)
    def give_and_merge() -> None:
        give()
        merge = functools.partial(
            _merge_splits, partial_ref, lse_ref, out_ref, b, kv_head * group, num_active, group, block_d
        )
        finish_last(counters_ref, b * k_ref.shape[1] + kv_head, num_active, merge, interpret=interpret)


def full_precision_dot(a: Any, b: Any) -> Any:
    """Product of two 2-D tiles, summed in float32; float32 operands are not rounded to TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _merge_splits(
    partial_ref: Any,  # these three as in `_merge`
    lse_ref: Any,
    out_ref: Any,
    b: Any,
    first_head: Any,
    num_active: Any,
    group: int,
    block_d: int,
) -> None:
    """Merges the splits of a KV head's queries, some heads at a time."""
    heads_at_once = min(4, pl.next_power_of_2(group))

    def merge(i: Any, carry: None) -> None:
        head = first_head + i * heads_at_once + jnp.arange(heads_at_once)
        is_head = head < first_head + group
        _merge(partial_ref, lse_ref, out_ref, b, head, is_head, num_active, block_d)

    lax.fori_loop(0, pl.cdiv(group, heads_at_once), merge, None)


def _merge(
    partial_ref: Any,  # [splits, b, h, d]
    lse_ref: Any,  # [splits, b, h], log2 of the sums of exponentials
    out_ref: Any,  # [b, h, d]
    b: Any,
    head: Any,  # an array, as is the next
    is_head: Any,
    num_active: Any,
    block_d: int,
) -> None:
    """Averages the first splits of some heads, each weighted with its sum of exponentials."""
    num_splits, _, _, head_dim = partial_ref.shape
    split, d = jnp.arange(pl.next_power_of_2(num_splits)), jnp.arange(block_d)
    mask = (split < num_active)[:, None] & is_head[None, :]
    lse = plt.load(lse_ref.at[split[:, None], b, head[None, :]], mask=mask, other=LOWEST)
    weight = jnp.exp2(lse - lse.max(axis=0)[None, :])
    at = (split[:, None, None], b, head[None, :, None], d[None, None, :])
    is_d = (d < head_dim)[None, None, :]
    out = plt.load(partial_ref.at[at], mask=mask[:, :, None] & is_d, other=0.0)
    merged = (out * weight[:, :, None]).sum(axis=0) / weight.sum(axis=0)[:, None]
    to = (b, head[:, None], d[None, :])
    plt.store(out_ref.at[to], merged.astype(out_ref.dtype), mask=is_head[:, None] & (d < head_dim)[None, :])
