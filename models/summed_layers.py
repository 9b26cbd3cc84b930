"""Layers built like Llama's on several GPUs, in steps that `fused_decode` does not take.

Each half of a layer ends in a sum over the GPUs that goes on to the residual stream and the next norm in one
kernel. Computes what `block.Block` does, from the same parameters, and is no other model: `tests/models`
holds the two together. Products are the library's: ours were measured to be no faster for a part of the
heads.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from pjengine.models.attention import PagedAttend, Rotary, variant_of
from pjengine.models.config import ModelConfig
from pjengine.models.kept_states import KeptStates
from pjengine.models.layers import linear, rms_norm
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.dispatch import platform
from pjengine.pallas_kernels.gated_linear import gated_linear
from pjengine.pallas_kernels.peer_sum import check_peer_sum_can, peer_sum_norm
from pjengine.pallas_kernels.skinny_linear import Residual
from pjengine.sharding.mesh import TENSOR


def is_summed(
    params: dict[str, Any], config: ModelConfig, x: Array, cache: KVCache, attend: PagedAttend
) -> bool:
    """Whether the layers are built so, and the kernel can end their sums."""
    if not config.is_like_llama or config.out_bias or config.mlp_bias:
        return False
    if platform() != "gpu" or attend.backend not in (None, "jax_triton"):
        return False
    residual = Residual(x, params["layers"]["mlp_norm"], 0)
    try:
        check_peer_sum_can(x, cache.own_inboxes, residual, config.norm_eps)
    except NotImplementedError:
        return False
    return True


def summed_layers(
    params: dict[str, Any],
    config: ModelConfig,
    x: Float[Array, "t e"],
    rotary: Sequence[Rotary | None],
    cache: KVCache,
    attend: PagedAttend,
    kept: KeptStates | None,
) -> tuple[Float[Array, "t e"], KVCache, KeptStates | None]:
    """Embedded tokens to final hidden states, before the last norm; what goes into each layer is `kept`."""
    c, layers = config, params["layers"]

    def add(part: Array, x: Array, norm: str, layer: int) -> tuple[Array, Array]:
        """The sum of a product's parts added to the residual stream, and the norm of that."""
        residual = Residual(x, layers[norm], layer)
        return peer_sum_norm(part, cache.own_inboxes, residual, eps=c.norm_eps, axis=TENSOR)

    h = rms_norm(x, layers["attn_norm"][0], eps=c.norm_eps)
    for layer in range(c.num_layers):
        kept = None if kept is None else kept.put(layer, x)
        with jax.named_scope(f"layer_{layer}"):
            own: dict[str, Any] = {name: stack[layer] for name, stack in layers.items()}
            qkv = linear(h, own["qkv"], own.get("qkv_bias"))
            out, after = attend(
                qkv, cache, layer=layer, rotary=rotary[layer], scale=c.scale,
                variant=variant_of(c, layer, own.get("sinks")),
            )  # fmt: skip
            assert after is not None
            cache = after
            out = out.reshape(len(x), *own["out"].shape[:-1])
            x, h = add(linear(out, own["out"], contract=3), x, "mlp_norm", layer)
            h = gated_linear(h, layers["gate_up"], layer)
            # The last layer takes a norm that nobody needs.
            x, h = add(linear(h, own["down"]), x, "attn_norm", (layer + 1) % c.num_layers)
    return x, cache, kept
