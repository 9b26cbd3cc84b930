"""The decoder layer that architectures share, in pieces that each may put together in its own way."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjengine.models.attention import Attend, PagedAttend, Rotary, variant_of
from pjengine.models.config import ExpertConfig, ModelConfig
from pjengine.models.experts import experts_mlp
from pjengine.models.layers import ACTIVATIONS, gate, linear, normalize, with_bias
from pjengine.models.share import first_expert, normalize_all_heads, of_one_device, total
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.gated_linear import gated_linear
from pjengine.pallas_kernels.grouped_linear import ExpertWeights
from pjengine.pallas_kernels.stacked_linear import stacked_linear

normal = nn.initializers.normal(stddev=0.02)


class Layer(NamedTuple):
    """What a Block is given beside the hidden states."""

    number: int
    attend: Attend
    rotary: Rotary | None = None
    cache: KVCache | None = None
    # The weights of all layers of its shape, and its place among them: a kernel that takes no derivative may
    # read the layer's from there.
    stack: Mapping[str, Array] | None = None
    place: int = 0
    is_batch_invariant: bool = False  # see `Decoder`


class Block(nn.Module):
    """One decoder layer. Holds no state: parameters, cache and attention are all passed in.

    An architecture whose layer differs overrides `compute`, or one of the pieces. Parameters are made where
    they are used, by `weight` and `bias`; the loader finds them by their names, in "layers/<name>".
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*t e"], layer: Layer) -> tuple[Float[Array, "*t e"], KVCache | None]:
        return self.compute(x, layer)

    def compute(self, x: Float[Array, "*t e"], layer: Layer) -> tuple[Float[Array, "*t e"], KVCache | None]:
        """The layer: attention and MLP, one after the other or side by side, their norms and residuals."""
        c = self.config
        h = self.norm("attn_norm", x) if c.has_pre_norms else x
        out, cache = self.attention(h, layer)
        if c.is_parallel:
            h = self.norm("mlp_norm", x) if c.has_mlp_norm else h
            return self.add(self.add(x, out), self.mlp(h, layer)), cache
        x = self.add(x, self.norm("attn_out_norm", out) if c.has_post_norms else out)
        out = self.mlp(self.norm("mlp_norm", x) if c.has_pre_norms else x, layer)
        return self.add(x, self.norm("mlp_out_norm", out) if c.has_post_norms else out), cache

    def attention(self, h: Float[Array, "*t e"], layer: Layer) -> tuple[Float[Array, "*t e"], KVCache | None]:
        c = self.config
        # One product for q, k and v, grouped by KV head.
        shape = (c.num_kv_heads, c.group + 2, c.head_dim)
        weight, bias = self.weight("qkv", c.hidden_size, *shape), self.bias("qkv_bias", c.qkv_bias, *shape)
        qkv = self.product("qkv", h, weight, bias, layer)
        if c.clip_qkv is not None:
            qkv = jnp.clip(qkv, -c.clip_qkv, c.clip_qkv)
        if c.qk_norm is not None:
            q, k = self.qk_norm("q_norm", qkv[..., :-2, :]), self.qk_norm("k_norm", qkv[..., -2:-1, :])
            qkv = jnp.concatenate([q, k, qkv[..., -1:, :]], axis=-2)
        sinks = self.weight("sinks", c.num_heads) if c.has_sinks else None
        out, cache = layer.attend(
            qkv,
            layer.cache,
            layer=layer.number,
            rotary=layer.rotary,
            scale=c.scale,
            variant=variant_of(c, layer.number, sinks),
        )
        out = out.reshape(*h.shape[:-1], c.num_kv_heads, c.group, c.head_dim)
        weight = self.weight("out", c.num_kv_heads, c.group, c.head_dim, c.hidden_size)
        bias = self.bias("out_bias", c.out_bias, c.hidden_size)
        return self.joined("out", out, weight, bias, layer, contract=3), cache

    def mlp(self, h: Float[Array, "*t e"], layer: Layer) -> Float[Array, "*t e"]:
        c = self.config
        experts = c.experts_of(layer.number)
        if experts is not None:
            return self.experts(experts, h, layer)
        if c.is_gated:
            weight = self.weight("gate_up", c.hidden_size, 2, c.intermediate_size)
            bias = self.bias("gate_up_bias", c.mlp_bias, 2, c.intermediate_size)
            if layer.stack is None or c.activation != "silu" or bias is not None:
                h = gate(c.activation, linear(h, weight, bias))
            else:
                h = gated_linear(h, layer.stack["gate_up"], layer.place)
        else:
            weight = self.weight("up", c.hidden_size, c.intermediate_size)
            h = ACTIVATIONS[c.activation](
                linear(h, weight, self.bias("up_bias", c.mlp_bias, c.intermediate_size))
            )
        down = self.weight("down", c.intermediate_size, c.hidden_size)
        return self.joined("down", h, down, self.bias("down_bias", c.mlp_bias, c.hidden_size), layer)

    def joined(
        self, name: str, x: Float[Array, "..."], weight: Array, bias: Array | None, layer: Layer,
        *, contract: int = 1,
    ) -> Float[Array, "*t e"]:  # fmt: skip
        """A product that adds to the residual stream: the sum of what each device has a part of."""
        if self.config.share is None:
            return self.product(name, x, weight, bias, layer, contract=contract)
        out = self.total(self.product(name, x, weight, None, layer, contract=contract), layer)
        return out if bias is None else out + jnp.broadcast_to(bias, out.shape)

    def product(
        self, name: str, x: Float[Array, "..."], weight: Array, bias: Array | None, layer: Layer,
        *, contract: int = 1,
    ) -> Float[Array, "..."]:  # fmt: skip
        """`linear` by the layer's `weight`, which is the parameter called `name`."""
        if layer.stack is None:
            return linear(x, weight, bias, contract=contract)
        k = math.prod(x.shape[-contract:])
        out = stacked_linear(
            x.reshape(-1, k),
            layer.stack[name].reshape(-1, k, weight.size // k),
            layer.place,
            is_batch_invariant=layer.is_batch_invariant,
        ).reshape(*x.shape[:-contract], *weight.shape[contract:])
        return out if bias is None else with_bias(out, bias)

    def experts(self, experts: ExpertConfig, h: Float[Array, "*t e"], layer: Layer) -> Float[Array, "*t e"]:
        """The MLPs that each token is routed to."""
        e, num, inner = self.config.hidden_size, experts.num_experts, experts.inner_size
        router_bias = self.bias("router_bias", experts.has_router_bias, num)
        logits = linear(h, self.weight("router", e, num), router_bias)
        num, first = experts.num_held or num, first_expert(self.config, experts)
        weights = ExpertWeights(
            self.weight("expert_gate_up", num, e, 2, inner),
            self.weight("expert_down", num, inner, e),
            self.bias("expert_gate_up_bias", experts.has_bias, num, 2, inner),
            self._once(experts, self.bias("expert_down_bias", experts.has_bias, num, e)),
        )
        # Padding goes to no expert.
        is_token = layer.attend.batch.slots >= 0 if isinstance(layer.attend, PagedAttend) else None
        if layer.stack is None:
            out = experts_mlp(experts, h, logits, weights, first=first, is_token=is_token)
            return self.total(out, layer)
        stack = ExpertWeights(
            layer.stack["expert_gate_up"],
            layer.stack["expert_down"],
            layer.stack.get("expert_gate_up_bias"),
            self._once(experts, layer.stack.get("expert_down_bias")),
        )
        out = experts_mlp(experts, h, logits, stack, layer.place, first=first, is_token=is_token)
        return self.total(out, layer)

    def total(self, x: Float[Array, "*t e"], layer: Layer) -> Float[Array, "*t e"]:
        """The sum of what the devices have. Side by side, attention and MLP do not wait for each other."""
        return total(self.config, x, None if self.config.is_parallel else layer.cache)

    def _once(self, experts: ExpertConfig, down_bias: Array | None) -> Array | None:
        """What is added behind an expert: on one device only where others have parts of the same expert."""
        return down_bias if experts.is_whole else of_one_device(self.config, down_bias)

    def norm(self, name: str, x: Float[Array, "*t e"]) -> Float[Array, "*t e"]:
        """The model's norm of rows; its parameters are `name` and, with biases, `name`_bias."""
        c = self.config
        weight = self.weight(name, c.hidden_size) if c.has_norm_weight else None
        return normalize(c, x, weight, self.bias(f"{name}_bias", c.has_norm_bias, c.hidden_size))

    def qk_norm(self, name: str, heads: Float[Array, "*t hk g d"]) -> Float[Array, "*t hk g d"]:
        """The norm of queries or of keys, as `ModelConfig.qk_norm` says."""
        c = self.config
        shape = heads.shape[-1:] if c.qk_norm == "head" else heads.shape[-3:]
        bias = self.bias(f"{name}_bias", c.has_qk_norm_bias, *shape)
        weight = self.weight(name, *shape)
        if c.qk_norm == "full" and c.share is not None:
            num_heads = c.share.num_heads if name == "q_norm" else c.share.num_kv_heads
            return normalize_all_heads(c, heads, weight, bias, num_heads)
        return normalize(c, heads, weight, bias, num_axes=3 if c.qk_norm == "full" else 1)

    def add(self, x: Float[Array, "*t e"], out: Float[Array, "*t e"]) -> Float[Array, "*t e"]:
        """The residual connection."""
        scale = self.config.residual_scale
        return x + out if scale == 1 else x + out * jnp.asarray(scale, out.dtype)

    def weight(self, name: str, *shape: int) -> Array:
        """A parameter: at first random, or where its name ends in "norm" what multiplies with one."""
        one = nn.initializers.constant(1 - self.config.norm_offset)
        return self.param(name, one if name.endswith("norm") else normal, shape, self.dtype)

    def bias(self, name: str, is_there: bool, *shape: int) -> Array | None:
        return self.param(name, nn.initializers.zeros, shape, self.dtype) if is_there else None
