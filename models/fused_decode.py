"""Layers built like Llama's in a decode step of few tokens, as few kernels: five a layer with most shapes.

There is one more where a kernel that follows merges the splits of attention, and where heads are no blocks
of the columns of their product (`skinny_qkv`). Computes what `block.Block` does, from the same parameters,
and is no other model: `tests/models` holds the two together. The Block is the one to read, to train and to
change first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjengine.models.attention import PagedAttend, Rotary, variant_of
from pjengine.models.config import ModelConfig
from pjengine.models.share import total
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.dispatch import platform
from pjengine.pallas_kernels.last_split import Counters
from pjengine.pallas_kernels.peer_sum import peer_sum_residual
from pjengine.pallas_kernels.skinny_linear import (
    MAX_ROWS,
    Normed,
    Residual,
    SkinnyTiles,
    skinny_linear,
    skinny_residual,
    start_norm,
)
from pjengine.pallas_kernels.skinny_qkv import Destination, skinny_qkv
from pjengine.sharding.mesh import TENSOR


def has_fused_form(config: ModelConfig) -> bool:
    """Whether the layers are built like Llama's, with one rotation of whole heads."""
    rope = config.rope
    has_rope = rope is not None and rope.rotary_dim == config.head_dim and not config.layer_ropes
    return config.is_like_llama and has_rope


def is_fused(config: ModelConfig, x: Array, attend: PagedAttend) -> bool:
    """Whether the kernels can run these layers, and on this platform would."""
    if not has_fused_form(config):
        return False
    backend = attend.backend or ("triton" if platform() == "gpu" else "reference")
    if backend == "reference" or attend.batch.cu_q_lens is not None:
        return False
    if x.dtype != jnp.bfloat16 or len(x) > MAX_ROWS:
        return False
    e, i, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    products = ((e, q + 2 * config.num_kv_heads * config.head_dim), (q, e), (e, i), (i, e))
    try:
        for (k, n), is_gated in zip(products, (False, False, True, False), strict=True):
            SkinnyTiles.choose(num_rows=len(x), k=k, n=n, is_gated=is_gated)
    except NotImplementedError:
        return False
    return True


def fused_layers(
    params: dict[str, Any],
    config: ModelConfig,
    x: Float[Array, "t e"],
    rotary: Rotary,
    cache: KVCache,
    attend: PagedAttend,
) -> tuple[Float[Array, "t e"], KVCache]:
    """Embedded tokens to final hidden states, before the last norm."""
    c, layers, backend = config, params["layers"], attend.backend
    qkv_size = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    counters = Counters(max(qkv_size, c.hidden_size, len(x) * c.num_kv_heads))

    def stack(name: str, k: int) -> Array:
        return layers[name].reshape(c.num_layers, k, -1)

    def biases(name: str) -> Array | None:
        return layers[name].reshape(c.num_layers, -1) if name in layers else None

    def add(h: Array, name: str, layer: int, residual: Residual) -> tuple[Array, Normed]:
        """A product's rows added to the residual stream, and the norm that follows begun."""
        weights, own_biases = stack(name, h.shape[1]), biases(f"{name}_bias")
        if c.share is None:
            return skinny_residual(
                h, weights, layer, residual, biases=own_biases, counters=counters, backend=backend
            )
        part = skinny_linear(h, weights, layer, counters=counters, backend=backend)
        if own_biases is None:
            return peer_sum_residual(part, cache.own_inboxes, residual, axis=TENSOR)
        x = residual.rows + total(c, part, cache) + own_biases[layer][None]
        return x, start_norm(x, residual.norm_weights[residual.norm])

    normed = start_norm(x, layers["attn_norm"][0])
    for layer in range(c.num_layers):
        with jax.named_scope(f"layer_{layer}"):
            place = attend.place(layer)
            q, k_pages, v_pages = skinny_qkv(
                normed, stack("qkv", c.hidden_size), layer,
                Destination(*rotary, cache.k, cache.v, place.slots, place.page_offset),
                biases=biases("qkv_bias"), eps=c.norm_eps, counters=counters, backend=backend,
            )  # fmt: skip
            cache = cache._replace(k=k_pages, v=v_pages)
            variant = variant_of(c, layer, layers["sinks"][layer] if c.has_sinks else None)
            out = attend.read(q, cache, layer=layer, scale=c.scale, variant=variant, counters=counters)
            x, normed = add(out.reshape(len(x), -1), "out", layer, Residual(x, layers["mlp_norm"], layer))
            h = skinny_linear(
                normed, stack("gate_up", c.hidden_size), layer,
                biases=biases("gate_up_bias"), eps=c.norm_eps, is_gated=True,
                counters=counters, backend=backend,
            )  # fmt: skip
            # The last layer starts a norm that nobody finishes.
            x, normed = add(h, "down", layer, Residual(x, layers["attn_norm"], (layer + 1) % c.num_layers))
    return x, cache
