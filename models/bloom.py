"""BLOOM: ALiBi, LayerNorm with biases everywhere and behind the embeddings too, an MLP without a gate.

Source: BigScience Workshop 2022; parameter names of Hugging Face's `BloomForCausalLM`.
"""

from dataclasses import dataclass

from jaxtyping import Array, Float

from pjengine.models import layouts
from pjengine.models.alibi import alibi_slopes
from pjengine.models.block import Block, Layer
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.state import KVCache
from pjengine.models.weight_table import WeightTable


@dataclass(frozen=True, kw_only=True)
class BloomConfig(ModelConfig):
    has_normed_residual: bool  # what attention and MLP add to is what they read, and not what came before


class BloomBlock(Block):
    config: BloomConfig

    def compute(self, x: Float[Array, "*t e"], layer: Layer) -> tuple[Float[Array, "*t e"], KVCache | None]:
        if not self.config.has_normed_residual:
            return super().compute(x, layer)
        h = self.norm("attn_norm", x)
        out, cache = self.attention(h, layer)
        h = self.norm("mlp_norm", self.add(h, out))
        return self.add(h, self.mlp(h, layer)), cache


class Bloom(Decoder):
    block = BloomBlock

    @staticmethod
    def read_config(reader: ConfigReader) -> BloomConfig:
        hidden_size = reader.size("hidden_size", "n_embed")
        num_heads = reader.size("n_head", "num_attention_heads")
        reader.only("n_inner", 4 * hidden_size)
        # Sums a product in as many parts as its training did: the same, but for rounding.
        reader.ignore("pretraining_tp", "slow_but_exact")
        reader.ignore("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")
        reader.ignore("offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id")
        return BloomConfig(
            **reader.base(bos=1, eos=2, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_layers=reader.size("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=reader.head_dim(hidden_size, num_heads),
            max_position_embeddings=reader.size("seq_length", default=2048),
            norm="layer",
            norm_eps=reader.number("layer_norm_epsilon", default=1e-5),
            has_norm_bias=True,
            has_embedding_norm=True,
            has_normed_residual=reader.flag("apply_residual_connection_post_layernorm", default=False),
            alibi_slopes=alibi_slopes(num_heads),
            qkv_bias=True,
            out_bias=True,
            activation="gelu_tanh",
            is_gated=False,
            mlp_bias=True,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "transformer.h.{layer}"
        norms = {
            "embed_norm": "transformer.word_embeddings_layernorm",
            "layers/attn_norm": f"{layer}.input_layernorm",
            "layers/mlp_norm": f"{layer}.post_attention_layernorm",
            "final_norm": "transformer.ln_f",
        }
        return WeightTable(
            leaves={
                "embed": layouts.plain("transformer.word_embeddings.weight"),
                **layouts.norms(c, norms),
                **layouts.fused_qkv(c, f"{layer}.self_attention.query_key_value", "groups"),
                **layouts.out_proj(c, f"{layer}.self_attention.dense"),
                **layouts.plain_mlp(c, f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"),
                **layouts.head(c),
            },
            ignored=layouts.tied_copies(c),
            prefixes=("transformer.",),
        )
