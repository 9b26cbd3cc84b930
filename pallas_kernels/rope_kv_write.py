"""Rotates the queries and keys of new tokens and writes keys and values into the paged cache: one kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pjengine.pallas_kernels.dispatch import dispatch
from pjengine.pallas_kernels.kv_update import write_kv
from pjengine.pallas_kernels.precision import widened


def rope_kv_write(
    qkv: Float[Array, "t hk g d"],
    cos: Float[Array, "t r"],
    sin: Float[Array, "t r"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    slots: Int[Array, " t"],
    *,
    page_offset: int | Int[Array, ""],
    backend: str | None = None,
) -> tuple[Float[Array, "t h d"], Float[Array, "n hk p d"], Float[Array, "n hk p d"]]:
    """Returns the rotated queries, and the two caches with token t's key and value in slot `slots[t]`.

    Of each KV head's g rows of `qkv` the last is the value, the one before it the key, the others its
    queries. Dimension i is rotated together with i + r, and 2r to d - 1 stay as they are. Slots as in
    `write_kv`: negative ones are dropped, no two tokens share one, donated caches are updated in place.
    Rotates in float32. Equivalent to `reference`, which has a derivative; the kernel has none.

    Args:
      cos, sin: of each token's position times each pair's frequency.
      page_offset: the layer's first page.
      backend: None to let `dispatch` choose.

    Raises:
      ValueError: no such backend.
      NotImplementedError: `backend` is named and cannot do these shapes or dtypes.
    Source: Su et al. 2021 (RoPE), in the order of GPT-NeoX.
    """
    args = (qkv, cos, sin, k_pages, v_pages, slots, jnp.asarray(page_offset, jnp.int32))
    return dispatch(
        "rope_kv_write",
        {
            "triton": functools.partial(rope_kv_write_triton, *args),
            "reference": functools.partial(reference, *args),
            "triton_interpret": functools.partial(rope_kv_write_triton, *args, interpret=True),
        },
        backend,
    )


def reference(
    qkv: Float[Array, "t hk g d"],
    cos: Float[Array, "t r"],
    sin: Float[Array, "t r"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    slots: Int[Array, " t"],
    page_offset: Int[Array, ""],
) -> tuple[Float[Array, "t h d"], Float[Array, "n hk p d"], Float[Array, "n hk p d"]]:
    """The spec: rotated in float32, written by `write_kv`."""
    num_tokens, num_kv_heads, rows, head_dim = qkv.shape
    turned = rotate(qkv[:, :, :-1].reshape(num_tokens, -1, head_dim), cos, sin).reshape(qkv[:, :, :-1].shape)
    q = turned[:, :, :-1].reshape(num_tokens, num_kv_heads * (rows - 2), head_dim)
    return q, *write_kv(k_pages, v_pages, turned[:, :, -1], qkv[:, :, -1], slots, page_offset=page_offset)


def rotate(
    x: Float[Array, "*t h d"], cos: Float[Array, "*t r"], sin: Float[Array, "*t r"]
) -> Float[Array, "*t h d"]:
    """Rotates the first 2r of d dimensions, dimension i paired with i + r (GPT-NeoX order)."""
    half = cos.shape[-1]
    wide = widened(x[..., : 2 * half])
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = (table[..., None, :].astype(wide.dtype) for table in (cos, sin))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def check_kernel_can(qkv: Array, cos: Array, k_pages: Array, v_pages: Array) -> None:
    """Refuses what the kernel does not do.

    Raises:
      NotImplementedError: mixed dtypes, dtypes other than bfloat16, float16 and float32, dimensions that are
        not rotated, more than 128 query heads per KV head, head_dim above 256.
    """
    dtypes = {x.dtype for x in (qkv, k_pages, v_pages)}
    if len(dtypes) > 1 or qkv.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(f"dtypes {names}: wanted one of bfloat16, float16, float32 for all")
    if 2 * cos.shape[1] != qkv.shape[3]:
        raise NotImplementedError(f"{2 * cos.shape[1]} of {qkv.shape[3]} dimensions rotated: wanted all")
    if qkv.shape[2] > 130:
        raise NotImplementedError(f"{qkv.shape[2] - 2} query heads per KV head: at most 128")
    if qkv.shape[3] > 256:
        raise NotImplementedError(f"head_dim {qkv.shape[3]}: at most 256")


@functools.partial(jax.jit, static_argnames="interpret")
def rope_kv_write_triton(
    qkv: Float[Array, "t hk g d"],
    cos: Float[Array, "t r"],
    sin: Float[Array, "t r"],
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    slots: Int[Array, " t"],
    page_offset: Int[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "t h d"], Float[Array, "n hk p d"], Float[Array, "n hk p d"]]:
    """`rope_kv_write` as one program per token and KV head. (XLA takes a fusion and two scatters.)

    Raises:
      NotImplementedError: see `check_kernel_can`.
    """
    check_kernel_can(qkv, cos, k_pages, v_pages)
    num_tokens, num_kv_heads, rows, head_dim = qkv.shape
    outs = pl.pallas_call(
        functools.partial(
            _kernel, block_g=pl.next_power_of_2(rows - 2), block_r=pl.next_power_of_2(head_dim // 2)
        ),
        grid=(num_kv_heads, num_tokens),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_kv_heads, rows - 2, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="rope_kv_write",
    )(page_offset[None], slots, qkv, cos, sin, k_pages, v_pages)
    return outs[0].reshape(num_tokens, -1, head_dim), outs[1], outs[2]


def _kernel(
    page_offset_ref: Any,  # [1]
    slots_ref: Any,  # [t]
    qkv_ref: Any,  # [t, hk, g, d]
    cos_ref: Any,  # [t, d / 2]
    sin_ref: Any,  # [t, d / 2]
    _k_ref: Any,  # the caches as they come in: k_ref and v_ref are the same memory
    _v_ref: Any,
    q_ref: Any,  # [t, hk, g - 2, d]
    k_ref: Any,  # [n, hk, p, d]
    v_ref: Any,  # [n, hk, p, d]
    *,
    block_g: int,
    block_r: int,
) -> None:
    kv_head, token = pl.program_id(0), pl.program_id(1)
    group, head_dim = q_ref.shape[2:]
    half, page_size = head_dim // 2, k_ref.shape[2]
    i = jnp.arange(block_r)
    is_half, row = i < half, jnp.arange(block_g)[:, None]
    is_query = (row < group) & is_half[None, :]
    cos = plt.load(cos_ref.at[token, i], mask=is_half, other=0.0)
    sin = plt.load(sin_ref.at[token, i], mask=is_half, other=0.0)
    slot = slots_ref[token]
    page, offset = lax.div(slot, page_size) + page_offset_ref[0], lax.rem(slot, page_size)
    is_kept = is_half & (slot >= 0)

    def load(row: Any, d: Any, mask: Any) -> Any:
        return plt.load(qkv_ref.at[token, kv_head, row, d], mask=mask, other=0.0)

    def turn(row: Any, i: Any, cos: Any, sin: Any, mask: Any) -> tuple[Any, Any]:
        first = load(row, i, mask).astype(jnp.float32)
        second = load(row, half + i, mask).astype(jnp.float32)
        return first * cos - second * sin, second * cos + first * sin

    query = turn(row, i[None, :], cos[None, :], sin[None, :], is_query)
    key, value = turn(group, i, cos, sin, is_half), [load(group + 1, d, is_half) for d in (i, half + i)]
    for part, d in enumerate((i, half + i)):
        at = (page, kv_head, offset, d)
        plt.store(q_ref.at[token, kv_head, row, d[None, :]], query[part].astype(q_ref.dtype), mask=is_query)
        plt.store(k_ref.at[at], key[part].astype(k_ref.dtype), mask=is_kept)
        plt.store(v_ref.at[at], value[part], mask=is_kept)
