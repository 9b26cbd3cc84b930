"""Writes the keys and values of new tokens into the paged cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def write_kv(
    k_pages: Float[Array, "n hk p d"],
    v_pages: Float[Array, "n hk p d"],
    k: Float[Array, "t hk d"],
    v: Float[Array, "t hk d"],
    slots: Int[Array, " t"],
    *,
    page_offset: int | Int[Array, ""],
) -> tuple[Float[Array, "n hk p d"], Float[Array, "n hk p d"]]:
    """Writes token t's key and value into slot `slots[t]` of one layer; returns the two caches.

    A slot is page * page_size + offset, its page counted from `page_offset`, the layer's first page. Tokens
    with slot < 0 (padding) are dropped. No two tokens may share a slot, and none may lie past the last page:
    neither is checked. Casts to the dtype of the cache. If the caches are donated they are updated in place,
    else copied. There is no kernel, and so no backend to choose: XLA makes one scatter of each write, the
    index arithmetic inside it.
    """
    num_pages, _, page_size, _ = k_pages.shape
    page = slots // page_size + jnp.asarray(page_offset, slots.dtype)
    page = jnp.where(slots >= 0, page, num_pages)  # past the end: what `drop` drops
    offset = slots % page_size

    def scatter(pages: Float[Array, "n hk p d"], x: Float[Array, "t hk d"]) -> Float[Array, "n hk p d"]:
        return pages.at[page, :, offset].set(x.astype(pages.dtype), mode="drop", unique_indices=True)

    return scatter(k_pages, k), scatter(v_pages, v)
