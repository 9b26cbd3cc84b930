"""The ways to attend: over KV pages (serving) and over the tokens at hand (training, scoring).

A Block is given one of these as its `attend`; it neither knows nor cares which.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.models.config import ModelConfig
from pjengine.models.share import own_part
from pjengine.models.state import Batch, KVCache
from pjengine.models.window_group import WindowGroup
from pjengine.pallas_kernels.attention_variant import PLAIN, AttentionVariant, by_head
from pjengine.pallas_kernels.kv_update import write_kv
from pjengine.pallas_kernels.last_split import Counters
from pjengine.pallas_kernels.paged_attention import check_attention_arguments, paged_attention
from pjengine.pallas_kernels.precision import wide_dtype
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write, rotate

# What attention knows of rotary positions: cosines and sines of each token.
type Rotary = tuple[Float[Array, "*t r"], Float[Array, "*t r"]]


@runtime_checkable
class Attend(Protocol):
    """A way to attend. Of each KV head's rows of `qkv` the last is the value, the one before it the key."""

    def __call__(
        self,
        qkv: Float[Array, "*t hk g d"],
        cache: KVCache | None,
        *,
        layer: int,
        rotary: Rotary | None,  # None: nothing is rotated
        scale: float,
        variant: AttentionVariant,
    ) -> tuple[Float[Array, "*t h d"], KVCache | None]: ...


def variant_of(config: ModelConfig, layer: int, sinks: Float[Array, " h"] | None = None) -> AttentionVariant:
    """How a layer departs from plain causal attention."""
    slopes = config.alibi_slopes
    return AttentionVariant(
        softcap=config.attention_softcap,
        window=config.window_of(layer),
        alibi_slopes=None if slopes is None else own_part(config, jnp.asarray(slopes, jnp.float32)),
        sinks=sinks,
    )


class Place(NamedTuple):
    """Where a layer's K and V are."""

    page_offset: Int[Array, ""]  # the layer's first page
    slots: Int[Array, " tokens"]
    page_table: Int[Array, "seqs pages_per_seq"]


@dataclass(frozen=True)
class PagedAttend:
    """Writes this step's K and V into their pages, then attends over the pages.

    The cache passed in is consumed: under donation it is updated in place.
    """

    batch: Batch
    num_pages: int  # of one layer
    backend: str | None = None
    window_group: WindowGroup | None = None

    def place(self, layer: int) -> Place:
        batch, group = self.batch, self.window_group
        if group is None:
            return Place(jnp.int32(layer * self.num_pages), batch.slots, batch.page_table)
        assert batch.window_slots is not None and batch.window_page_table is not None
        if layer in group.layers:
            offset = group.layers.index(layer) * group.num_pages
            return Place(jnp.int32(offset), batch.window_slots, batch.window_page_table)
        before = sum(other < layer for other in group.layers)
        offset = len(group.layers) * group.num_pages + (layer - before) * self.num_pages
        return Place(jnp.int32(offset), batch.slots, batch.page_table)

    def __call__(
        self,
        qkv: Float[Array, "t hk g d"],
        cache: KVCache | None,
        *,
        layer: int,
        rotary: Rotary | None,
        scale: float,
        variant: AttentionVariant = PLAIN,
    ) -> tuple[Float[Array, "t h d"], KVCache | None]:
        assert cache is not None
        place = self.place(layer)
        if rotary is None:
            q = qkv[:, :, :-2].reshape(len(qkv), -1, qkv.shape[-1])
            k_pages, v_pages = write_kv(
                cache.k, cache.v, qkv[:, :, -2], qkv[:, :, -1], place.slots, page_offset=place.page_offset
            )
        else:
            q, k_pages, v_pages = rope_kv_write(
                qkv,
                *rotary,
                cache.k,
                cache.v,
                place.slots,
                page_offset=place.page_offset,
                backend=self.backend,
            )
        cache = cache._replace(k=k_pages, v=v_pages)
        return self.read(q, cache, layer=layer, scale=scale, variant=variant), cache

    def read(
        self,
        q: Float[Array, "t h d"],
        cache: KVCache,
        *,
        layer: int,
        scale: float,
        variant: AttentionVariant = PLAIN,
        counters: Counters | None = None,
    ) -> Float[Array, "t h d"]:
        """Attends over the pages, which have this step's K and V; `counters` as in `paged_attention`."""
        batch, place = self.batch, self.place(layer)
        if batch.cu_q_lens is None:
            return paged_attention(
                q, cache.k, cache.v, place.page_table, batch.kv_lens,
                page_offset=place.page_offset, scale=scale, variant=variant, counters=counters,
                backend=self.backend,
            )  # fmt: skip
        return ragged_paged_attention(
            q, cache.k, cache.v, place.page_table, batch.kv_lens, batch.cu_q_lens,
            page_offset=place.page_offset, scale=scale, variant=variant, backend=self.backend,
        )  # fmt: skip


def dense_attend(
    qkv: Float[Array, "*b t hk g d"],
    cache: KVCache | None,
    *,
    layer: int,
    rotary: Rotary | None,
    scale: float,
    variant: AttentionVariant = PLAIN,
) -> tuple[Float[Array, "*b t h d"], KVCache | None]:
    """Causal attention over the tokens at hand, without a cache; differentiable."""
    out, _ = dense_attend_weighing(qkv, rotary=rotary, scale=scale, variant=variant)
    return out, cache


def dense_attend_weighing(
    qkv: Float[Array, "*b t hk g d"],
    *,
    rotary: Rotary | None,
    scale: float,
    variant: AttentionVariant = PLAIN,
) -> tuple[Float[Array, "*b t h d"], Float[Array, "*b hk q t t"]]:
    """The same, with the weights: float32, what each token takes of the value of each, head by head.

    They sum to 1, but where the layer has sinks: what these take is missing.
    """
    *batch, length, kv_heads, rows, dim = qkv.shape
    heads = kv_heads * (rows - 2)
    check_attention_arguments(heads, kv_heads, scale, variant)
    q, k, v = qkv[..., :-2, :].reshape(*batch, length, heads, dim), qkv[..., -2, :], qkv[..., -1, :]
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    grouped = q.reshape(*batch, length, kv_heads, rows - 2, dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dtype = wide_dtype(q.dtype)
    scores = jnp.einsum(
        "...qhgd,...khd->...hgqk", grouped, k, precision=precision, preferred_element_type=dtype
    )
    position = jnp.arange(length)
    distance = (position[None, :] - position[:, None]).reshape(*(1,) * (scores.ndim - 2), length, length)
    scores = variant.bend(scores * scale, distance)
    if variant.sinks is not None:
        sinks = jnp.broadcast_to(by_head(variant.sinks, scores), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length]
    out = jnp.einsum("...hgqk,...khd->...qhgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(*batch, length, heads, dim), weights
