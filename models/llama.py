"""The Llama family: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al. 2023; parameter names of Hugging Face's `LlamaForCausalLM`.
"""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pjengine.models.attention import Attend, PagedAttend, Rotary, dense_attend
from pjengine.models.config import ModelConfig
from pjengine.models.fused_decode import fused_layers, is_fused
from pjengine.models.layers import linear, rms_norm, rotary_table, swiglu, unembed
from pjengine.models.loader import Leaf, Source, WeightTable
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.gated_linear import gated_linear

type Params = dict[str, Any]

_normal = nn.initializers.normal(stddev=0.02)


class Block(nn.Module):
    """One decoder layer. Holds no state: parameters, cache and attention are all passed in."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*t e"],
        rotary: Rotary,
        cache: KVCache | None,
        attend: Attend,
        layer: int,
        gate_up_stack: Float[Array, "layers e 2 i"] | None = None,
    ) -> tuple[Float[Array, "*t e"], KVCache | None]:
        """Computes one layer. With `gate_up_stack`, every layer's, a kernel that takes no derivative may read
        the layer's weights from there."""
        c = self.config
        group = c.num_heads // c.num_kv_heads
        lead = x.shape[:-1]

        h = rms_norm(x, self.weight("attn_norm", c.hidden_size), eps=c.rms_norm_eps)
        # One product for q, k and v, grouped by KV head: [..., kv_heads, group + 2, head_dim].
        qkv_shape = (c.num_kv_heads, group + 2, c.head_dim)
        qkv = linear(h, self.weight("qkv", c.hidden_size, *qkv_shape), self.bias("qkv_bias", *qkv_shape))
        out, cache = attend(qkv, rotary, cache, layer)
        out = out.reshape(*lead, c.num_kv_heads, group, c.head_dim)
        out_weight = self.weight("out", c.num_kv_heads, group, c.head_dim, c.hidden_size)
        x = x + linear(out, out_weight, self.bias("out_bias", c.hidden_size), contract=3)

        h = rms_norm(x, self.weight("mlp_norm", c.hidden_size), eps=c.rms_norm_eps)
        gate_up_weight = self.weight("gate_up", c.hidden_size, 2, c.intermediate_size)
        gate_up_bias = self.bias("gate_up_bias", 2, c.intermediate_size)
        if gate_up_stack is None:
            h = swiglu(linear(h, gate_up_weight, gate_up_bias))
        else:
            h = gated_linear(h, gate_up_stack, layer)
        down_weight = self.weight("down", c.intermediate_size, c.hidden_size)
        return x + linear(h, down_weight, self.bias("down_bias", c.hidden_size)), cache

    def weight(self, name: str, *shape: int) -> Array:
        init = nn.initializers.ones if name.endswith("norm") else _normal
        return self.param(name, init, shape, self.dtype)

    def bias(self, name: str, *shape: int) -> Array | None:
        is_attention = name in ("qkv_bias", "out_bias")
        if not (self.config.attention_bias if is_attention else self.config.mlp_bias):
            return None
        return self.param(name, nn.initializers.zeros, shape, self.dtype)


@dataclass(frozen=True)
class Llama:
    """Pure functions over a parameter tree whose layers are stacked on a leading axis."""

    config: ModelConfig
    dtype: jnp.dtype

    def init(self, key: Array) -> Params:
        """Random parameters; under `jax.eval_shape`, their shapes."""
        c = self.config
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        x = jnp.zeros((1, c.hidden_size), self.dtype)
        rotary = self.rotary(jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))
        block = Block(c, self.dtype)

        def init_layer(layer_key: Array) -> Params:
            return block.init(layer_key, x, rotary, None, self.dense_attend, 0)["params"]

        params: Params = {
            "embed": _normal(embed_key, (c.vocab_size, c.hidden_size), self.dtype),
            "layers": jax.vmap(init_layer)(jax.random.split(layer_key, c.num_layers)),
            "final_norm": jnp.ones((c.hidden_size,), self.dtype),
        }
        if not c.tie_word_embeddings:
            params["head"] = _normal(head_key, (c.vocab_size, c.hidden_size), self.dtype)
        return params

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        rope_lens: Int[Array, "*t"],
        cache: KVCache | None,
        attend: Attend,
    ) -> tuple[Float[Array, "*t e"], KVCache | None]:
        """Token ids to final hidden states, before the last norm.

        Layers are unrolled and take static slices of the stacked weights: a scan would make XLA
        copy every layer's weights each step.
        """
        x = params["embed"][tokens]
        rotary = self.rotary(positions, rope_lens)
        if isinstance(attend, PagedAttend) and cache is not None and is_fused(self.config, x, attend):
            return fused_layers(params, self.config, x, rotary, cache, attend)
        # A backend that is named for all ops keeps to the reference here; `jax_triton` is of attention only.
        is_free = isinstance(attend, PagedAttend) and attend.backend in (None, "jax_triton")
        is_stacked = is_free and not self.config.mlp_bias
        gate_up_stack = params["layers"]["gate_up"] if is_stacked else None
        block = Block(self.config, self.dtype)
        for layer in range(self.config.num_layers):
            weights = jax.tree.map(lambda stacked, layer=layer: stacked[layer], params["layers"])
            with jax.named_scope(f"layer_{layer}"):
                output: Any = block.apply({"params": weights}, x, rotary, cache, attend, layer, gate_up_stack)
                x, cache = output
        return x, cache

    def logits(self, params: Params, hidden: Float[Array, "*t e"]) -> Float[Array, "*t v"]:
        """Final hidden states to float32 logits."""
        h = rms_norm(hidden, params["final_norm"], eps=self.config.rms_norm_eps)
        return unembed(h, params["embed" if self.config.tie_word_embeddings else "head"])

    def dense_logits(self, params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of whole sequences without a cache: for training and scoring, differentiable."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        rope_lens = jnp.full(tokens.shape, tokens.shape[1], jnp.int32)
        hidden, _ = self.forward(params, tokens, positions, rope_lens, None, self.dense_attend)
        return self.logits(params, hidden)

    def rotary(self, positions: Int[Array, "*t"], rope_lens: Int[Array, "*t"]) -> Rotary:
        return rotary_table(self.config.rope, positions, rope_lens)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.config.head_dim)

    @property
    def dense_attend(self) -> Attend:
        return dense_attend(scale=self.scale)

    def weight_table(self) -> WeightTable:
        """Where each leaf comes from in a Hugging Face checkpoint."""
        c = self.config
        layer = "model.layers.{layer}"
        leaves = {
            "embed": _leaf("model.embed_tokens.weight"),
            "final_norm": _leaf("model.norm.weight"),
            "layers/attn_norm": _leaf(f"{layer}.input_layernorm.weight"),
            "layers/mlp_norm": _leaf(f"{layer}.post_attention_layernorm.weight"),
            **_attention_leaves(c, f"{layer}.self_attn"),
            **_mlp_leaves(c, f"{layer}.mlp"),
        }
        ignored = ["*.rotary_emb.inv_freq"]
        if c.tie_word_embeddings:
            ignored.append("lm_head.weight")  # some checkpoints store the tied copy too
        else:
            leaves["head"] = _leaf("lm_head.weight")
        # Checkpoints of the bare model lack the prefix.
        return WeightTable(leaves=leaves, ignored=tuple(ignored), prefixes=("model.",))


def _leaf(
    name: str, *, reshape: tuple[int, ...] | None = None, transpose: tuple[int, ...] | None = None
) -> Leaf:
    return Leaf(sources=(Source(name=name, reshape=reshape, transpose=transpose),))


def _attention_leaves(c: ModelConfig, prefix: str) -> dict[str, Leaf]:
    group = c.num_heads // c.num_kv_heads

    def qkv(kind: str, tail: tuple[int, ...], transpose: tuple[int, ...] | None, concat_axis: int) -> Leaf:
        sources = tuple(
            Source(
                name=f"{prefix}.{name}_proj.{kind}",
                reshape=(c.num_kv_heads, width, c.head_dim, *tail),
                transpose=transpose,
            )
            for name, width in (("q", group), ("k", 1), ("v", 1))
        )
        return Leaf(sources=sources, concat_axis=concat_axis)

    out_shape = (c.hidden_size, c.num_kv_heads, group, c.head_dim)
    leaves = {
        "layers/qkv": qkv("weight", (c.hidden_size,), (3, 0, 1, 2), concat_axis=2),
        "layers/out": _leaf(f"{prefix}.o_proj.weight", reshape=out_shape, transpose=(1, 2, 3, 0)),
    }
    if c.attention_bias:
        leaves["layers/qkv_bias"] = qkv("bias", (), None, concat_axis=1)
        leaves["layers/out_bias"] = _leaf(f"{prefix}.o_proj.bias")
    return leaves


def _mlp_leaves(c: ModelConfig, prefix: str) -> dict[str, Leaf]:
    def gate_up(
        kind: str, tail: tuple[int, ...], transpose: tuple[int, ...] | None, concat_axis: int
    ) -> Leaf:
        sources = tuple(
            Source(
                name=f"{prefix}.{name}_proj.{kind}",
                reshape=(1, c.intermediate_size, *tail),
                transpose=transpose,
            )
            for name in ("gate", "up")
        )
        return Leaf(sources=sources, concat_axis=concat_axis)

    leaves = {
        "layers/gate_up": gate_up("weight", (c.hidden_size,), (2, 0, 1), concat_axis=1),
        "layers/down": _leaf(f"{prefix}.down_proj.weight", transpose=(1, 0)),
    }
    if c.mlp_bias:
        leaves["layers/gate_up_bias"] = gate_up("bias", (), None, concat_axis=0)
        leaves["layers/down_bias"] = _leaf(f"{prefix}.down_proj.bias")
    return leaves
