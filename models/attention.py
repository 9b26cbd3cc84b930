"""The ways to attend: over KV pages (serving) and over the tokens at hand (training, scoring).

A Block is given one of these as its `attend`; it neither knows nor cares which.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pjengine.models.state import Batch, KVCache
from pjengine.pallas_kernels.kv_update import write_kv
from pjengine.pallas_kernels.paged_attention import paged_attention
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention

# (q [*t, heads, d], k [*t, kv_heads, d], v, cache, layer) -> (out [*t, heads, d], cache)
type Attend = Callable[[Array, Array, Array, KVCache | None, int], tuple[Array, KVCache | None]]


def paged_attend(batch: Batch, *, num_pages: int, scale: float, backend: str | None = None) -> Attend:
    """Writes this step's K and V into their pages, then attends over the pages.

    `num_pages` is the number of pages of one layer. The cache passed in is consumed: under
    donation it is updated in place.
    """

    def attend(
        q: Array, k: Array, v: Array, cache: KVCache | None, layer: int
    ) -> tuple[Array, KVCache | None]:
        assert cache is not None
        offset = jnp.int32(layer * num_pages)
        k_pages, v_pages = write_kv(cache.k, cache.v, k, v, batch.slots, page_offset=offset)
        if batch.cu_q_lens is None:
            out = paged_attention(
                q, k_pages, v_pages, batch.page_table, batch.kv_lens,
                page_offset=offset, scale=scale, backend=backend,
            )  # fmt: skip
        else:
            out = ragged_paged_attention(
                q, k_pages, v_pages, batch.page_table, batch.kv_lens, batch.cu_q_lens,
                page_offset=offset, scale=scale, backend=backend,
            )  # fmt: skip
        return out, cache._replace(k=k_pages, v=v_pages)

    return attend


def dense_attend(*, scale: float) -> Attend:
    """Causal attention over the tokens at hand, without a cache; differentiable."""

    def attend(
        q: Float[Array, "*b t h d"],
        k: Float[Array, "*b t hk d"],
        v: Float[Array, "*b t hk d"],
        cache: KVCache | None,
        layer: int,
    ) -> tuple[Float[Array, "*b t h d"], KVCache | None]:
        *batch, length, heads, dim = q.shape
        kv_heads = k.shape[-2]
        grouped = q.reshape(*batch, length, kv_heads, heads // kv_heads, dim)
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "...qhgd,...khd->...hgqk", grouped, k, precision=precision, preferred_element_type=jnp.float32
        )
        is_visible = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(
            is_visible.reshape((1,) * (scores.ndim - 2) + is_visible.shape), scores * scale, -jnp.inf
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("...hgqk,...khd->...qhgd", weights, v, precision=precision)
        return out.reshape(*batch, length, heads, dim), cache

    return attend
