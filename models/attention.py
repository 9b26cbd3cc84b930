"""The ways to attend: over KV pages (serving) and over the tokens at hand (training, scoring).

A Block is given one of these as its `attend`; it neither knows nor cares which.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pjengine.models.state import Batch, KVCache
from pjengine.pallas_kernels.attention_variant import PLAIN, AttentionVariant, by_head
from pjengine.pallas_kernels.last_split import Counters
from pjengine.pallas_kernels.paged_attention import check_attention_arguments, paged_attention
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write, rotate

# What a Block knows of rotary positions: cosines and sines of each token.
type Rotary = tuple[Float[Array, "*t r"], Float[Array, "*t r"]]
# (qkv [*t, kv_heads, group + 2, d], rotary, cache, layer) -> (out [*t, heads, d], cache)
type Attend = Callable[[Array, Rotary, KVCache | None, int], tuple[Array, KVCache | None]]


@dataclass(frozen=True)
class PagedAttend:
    """Writes this step's K and V into their pages, then attends over the pages.

    The cache passed in is consumed: under donation it is updated in place.
    """

    batch: Batch
    num_pages: int  # of one layer
    scale: float
    backend: str | None = None
    variant: AttentionVariant = PLAIN

    def __call__(
        self, qkv: Array, rotary: Rotary, cache: KVCache | None, layer: int
    ) -> tuple[Array, KVCache | None]:
        assert cache is not None
        batch, offset = self.batch, jnp.int32(layer * self.num_pages)
        q, k_pages, v_pages = rope_kv_write(
            qkv, *rotary, cache.k, cache.v, batch.slots, page_offset=offset, backend=self.backend
        )
        cache = cache._replace(k=k_pages, v=v_pages)
        return self.read(q, cache, layer), cache

    def read(self, q: Array, cache: KVCache, layer: int, counters: Counters | None = None) -> Array:
        """Attends over the pages, which have this step's K and V; `counters` as in `paged_attention`."""
        batch, offset = self.batch, jnp.int32(layer * self.num_pages)
        if batch.cu_q_lens is None:
            return paged_attention(
                q, cache.k, cache.v, batch.page_table, batch.kv_lens,
                page_offset=offset, scale=self.scale, variant=self.variant, counters=counters,
                backend=self.backend,
            )  # fmt: skip
        return ragged_paged_attention(
            q, cache.k, cache.v, batch.page_table, batch.kv_lens, batch.cu_q_lens,
            page_offset=offset, scale=self.scale, variant=self.variant, backend=self.backend,
        )  # fmt: skip


def dense_attend(*, scale: float, variant: AttentionVariant = PLAIN) -> Attend:
    """Causal attention over the tokens at hand, without a cache; differentiable."""

    def attend(
        qkv: Float[Array, "*b t hk g d"], rotary: Rotary, cache: KVCache | None, layer: int
    ) -> tuple[Float[Array, "*b t h d"], KVCache | None]:
        *batch, length, kv_heads, rows, dim = qkv.shape
        heads = kv_heads * (rows - 2)
        check_attention_arguments(heads, kv_heads, scale, variant)
        q = rotate(qkv[..., :-2, :].reshape(*batch, length, heads, dim), *rotary)
        k, v = rotate(qkv[..., -2, :], *rotary), qkv[..., -1, :]
        grouped = q.reshape(*batch, length, kv_heads, rows - 2, dim)
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "...qhgd,...khd->...hgqk", grouped, k, precision=precision, preferred_element_type=jnp.float32
        )
        position = jnp.arange(length)
        distance = (position[None, :] - position[:, None]).reshape(*(1,) * (scores.ndim - 2), length, length)
        scores = variant.bend(scores * scale, distance)
        if variant.sinks is not None:
            sinks = jnp.broadcast_to(by_head(variant.sinks, scores), (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, sinks], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :length].astype(v.dtype)
        out = jnp.einsum("...hgqk,...khd->...qhgd", weights, v, precision=precision)
        return out.reshape(*batch, length, heads, dim), cache

    return attend
