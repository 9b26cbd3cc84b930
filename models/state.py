"""The arrays a forward pass takes beside the weights: KV pages and the batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pjengine.models.config import ModelConfig
from pjengine.models.window_group import WindowGroup


class KVCache(NamedTuple):
    """The KV pages of all layers, donated through every step.

    Each layer owns as many pages as its group has, one layer after the other: first those of the group that
    sees a window, where there is one, then the others, `num_pages` each. Page 0 of each layer is the null
    page: padding reads it, nothing that is read back lands in it, and it stays finite.
    """

    k: Float[Array, "all_pages kv_heads page_size head_dim"]
    v: Float[Array, "all_pages kv_heads page_size head_dim"]
    token_ids: Int[Array, "pages page_size"]  # what K and V were computed from; of all tokens, windows or not
    # The draft model's, where there is one, `num_pages` of each layer: a page's id is the same in all.
    draft_k: Float[Array, "draft_pages draft_heads page_size draft_dim"] | None = None
    draft_v: Float[Array, "draft_pages draft_heads page_size draft_dim"] | None = None
    # Of GPUs that sum through each other's memory: each one's table, as `peer_sum` takes it.
    inboxes: UInt32[Array, "gpus words 2"] | None = None

    @property
    def own_inboxes(self) -> UInt32[Array, "words 2"] | None:
        """The table of the device that computes, within a `shard_map`."""
        return None if self.inboxes is None else self.inboxes.reshape(self.inboxes.shape[1:])


class Batch(NamedTuple):
    """The tokens of one step, laid flat, sequence after sequence; padding at the end."""

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    rope_lens: Int[Array, " tokens"]  # sequence length seen by dynamic RoPE scaling
    slots: Int[Array, " tokens"]  # where K and V go: page * page_size + offset; negative: nowhere
    page_table: Int[Array, "seqs pages_per_seq"]
    kv_lens: Int[Array, " seqs"]  # tokens in the cache once this step's are written; 0: padding
    cu_q_lens: Int[Array, " seqs+1"] | None  # None: one token a sequence (decode)
    # As `slots` and `page_table`, of the layers that see a window; None: no such group.
    window_slots: Int[Array, " tokens"] | None = None
    window_page_table: Int[Array, "seqs pages_per_seq"] | None = None


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page across all layers, K and V together."""
    return config.num_layers * layer_page_bytes(config, page_size, dtype)


def layer_page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page of one layer, K and V together."""
    return 2 * config.num_kv_heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def kv_shape(
    config: ModelConfig, num_pages: int, page_size: int, window_group: WindowGroup | None = None
) -> tuple[int, int, int, int]:
    """The shape of `KVCache.k` and `KVCache.v`."""
    all_pages = config.num_layers * num_pages
    if window_group is not None:
        all_pages += len(window_group.layers) * (window_group.num_pages - num_pages)
    return (all_pages, config.num_kv_heads, page_size, config.head_dim)
