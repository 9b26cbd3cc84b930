"""The arrays a forward pass takes beside the weights: KV pages and the batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pjengine.models.config import ModelConfig


class KVCache(NamedTuple):
    """The KV pages of all layers, donated through every step.

    Layer l owns pages l * num_pages to (l + 1) * num_pages. Page 0 of each layer is the null page:
    padding reads it, nothing that is read back lands in it, and it stays finite.
    """

    k: Float[Array, "all_pages kv_heads page_size head_dim"]
    v: Float[Array, "all_pages kv_heads page_size head_dim"]
    token_ids: Int[Array, "pages page_size"]  # what K and V were computed from, once for all layers


class Batch(NamedTuple):
    """The tokens of one step, laid flat, sequence after sequence; padding at the end."""

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    rope_lens: Int[Array, " tokens"]  # sequence length seen by dynamic RoPE scaling
    slots: Int[Array, " tokens"]  # where K and V go: page * page_size + offset; negative: nowhere
    page_table: Int[Array, "seqs pages_per_seq"]
    kv_lens: Int[Array, " seqs"]  # tokens in the cache once this step's are written; 0: padding
    cu_q_lens: Int[Array, " seqs+1"] | None  # None: one token a sequence (decode)


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page across all layers, K and V together."""
    itemsize = jnp.dtype(dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * page_size * config.head_dim * itemsize


def kv_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    return (config.num_layers * num_pages, config.num_kv_heads, page_size, config.head_dim)
