"""OPT and Galactica: learned positions, LayerNorm before attention and MLP or, of 350m, behind them.

Source: Zhang et al. 2022, Taylor et al. 2022; parameter names of Hugging Face's `OPTForCausalLM`.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

from pjengine.models import layouts
from pjengine.models.block import Block, Layer, normal
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder, Params
from pjengine.models.layers import linear, unembed
from pjengine.models.share import embedded, padded
from pjengine.models.state import KVCache
from pjengine.models.weight_table import WeightTable


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    embedding_size: int  # of a token; where it is not hidden_size, a matrix leads in and another one out

    @property
    def has_projections(self) -> bool:
        return self.embedding_size != self.hidden_size


class OPTBlock(Block):
    def compute(self, x: Float[Array, "*t e"], layer: Layer) -> tuple[Float[Array, "*t e"], KVCache | None]:
        if self.config.has_pre_norms:
            return super().compute(x, layer)
        out, cache = self.attention(x, layer)
        x = self.norm("attn_norm", self.add(x, out))
        return self.norm("mlp_norm", self.add(x, self.mlp(x, layer))), cache


class OPT(Decoder):
    config: OPTConfig
    block = OPTBlock

    @staticmethod
    def read_config(reader: ConfigReader) -> OPTConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        has_bias = reader.flag("enable_bias", default=True)
        has_norm_weights = reader.flag("layer_norm_elementwise_affine", default=True)
        has_pre_norms = reader.flag("do_layer_norm_before", default=True)
        is_last_norm_removed = reader.flag("_remove_final_layer_norm", default=False)
        reader.only("learned_embeddings", True)
        reader.only("scale_embeddings", False)
        reader.ignore("dropout", "activation_dropout", "layerdrop", "init_std")
        return OPTConfig(
            **reader.base(bos=2, eos=2, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            embedding_size=reader.size("word_embed_proj_dim", default=hidden_size),
            intermediate_size=reader.size("ffn_dim"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=reader.head_dim(hidden_size, num_heads),
            max_position_embeddings=reader.size("max_position_embeddings", default=2048),
            has_learned_positions=True,
            position_offset=2,
            norm="layer",
            has_norm_weight=has_norm_weights,
            has_norm_bias=has_norm_weights,
            has_pre_norms=has_pre_norms,
            has_final_norm=has_pre_norms and not is_last_norm_removed,
            qkv_bias=has_bias,
            out_bias=has_bias,
            activation=reader.activation("activation_function", default="relu"),
            is_gated=False,
            mlp_bias=has_bias,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.decoder.layers.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.self_attn_layer_norm",
            "layers/mlp_norm": f"{layer}.final_layer_norm",
        }
        if c.has_final_norm:
            norms["final_norm"] = "model.decoder.final_layer_norm"
        leaves = {
            "embed": layouts.plain("model.decoder.embed_tokens.weight"),
            "positions": layouts.plain("model.decoder.embed_positions.weight"),
            **layouts.norms(c, norms),
            **layouts.separate_qkv(c, f"{layer}.self_attn"),
            **layouts.out_proj(c, f"{layer}.self_attn.out_proj"),
            **layouts.plain_mlp(c, f"{layer}.fc1", f"{layer}.fc2"),
            **layouts.head(c),
        }
        if c.has_projections:
            leaves |= {
                name: layouts.plain(f"model.decoder.{name}.weight", transpose=(1, 0))
                for name in ("project_in", "project_out")
            }
        return WeightTable(
            leaves=leaves,
            ignored=(
                "*decoder.version",
                *layouts.tied_copies(c),
            ),  # the first checkpoints numbered their format
            prefixes=("model.",),
        )

    def init(self, key: Array) -> Params:
        c, params = self.config, super().init(key)
        if c.has_projections:
            keys = iter(jax.random.split(jax.random.fold_in(key, 1), 4))
            for name in ("embed", "head"):
                if name in params:
                    shape = (padded(c, self.num_devices).vocab_size, c.embedding_size)
                    params[name] = normal(next(keys), shape, self.dtype)
            params["project_in"] = normal(next(keys), (c.embedding_size, c.hidden_size), self.dtype)
            params["project_out"] = normal(next(keys), (c.hidden_size, c.embedding_size), self.dtype)
        return params

    def embed(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        cache: KVCache | None = None,
    ) -> Float[Array, "*t e"]:
        c = self.config
        if not c.has_projections:
            return super().embed(params, tokens, positions, cache)
        x = linear(embedded(self.own, params["embed"], tokens, cache), params["project_in"])
        return x + params["positions"][positions + c.position_offset]

    def own_logits(self, params: Params, hidden: Float[Array, "*t e"]) -> Float[Array, "*t own"]:
        c = self.config
        if not c.has_projections:
            return super().own_logits(params, hidden)
        h = self.normalize(params, "final_norm", hidden) if c.has_final_norm else hidden
        table = params["embed" if c.tie_word_embeddings else "head"]
        return unembed(linear(h, params["project_out"]), table)
