"""StarCoder2: LayerNorm with biases, biases throughout, an MLP without a gate; some sizes have a window.

Source: Lozhkov et al. 2024; parameter names of Hugging Face's `Starcoder2ForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import SIZE
from pjengine.models.weight_table import WeightTable


class Starcoder2(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        max_position = reader.size("max_position_embeddings", default=4096)
        has_bias = reader.flag("use_bias", default=True)
        # Of the first conversions, which transformers never read.
        reader.only("mlp_type", "default")
        reader.only("norm_type", "layer_norm")
        reader.only("scale_attn_weights", True)
        # `hidden_act` and `norm_epsilon` are what counts.
        reader.ignore("activation_function", "layer_norm_epsilon")
        reader.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
        reader.ignore("embedding_dropout", "residual_dropout")
        return ModelConfig(
            **reader.base(bos=50256, eos=50256, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=2),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm="layer",
            norm_eps=reader.number("norm_epsilon", default=1e-5),
            has_norm_bias=True,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            layer_windows=(reader.get("sliding_window", wanted=SIZE),),
            qkv_bias=has_bias,
            out_bias=has_bias,
            activation=reader.activation("hidden_act", default="gelu_pytorch_tanh"),
            is_gated=False,
            mlp_bias=has_bias,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.input_layernorm",
            "layers/mlp_norm": f"{layer}.post_attention_layernorm",
            "final_norm": "model.norm",
        }
        return WeightTable(
            leaves={
                "embed": layouts.plain("model.embed_tokens.weight"),
                **layouts.norms(c, norms),
                **layouts.separate_qkv(c, f"{layer}.self_attn"),
                **layouts.out_proj(c, f"{layer}.self_attn.o_proj"),
                **layouts.plain_mlp(c, f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"),
                **layouts.head(c),
            },
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )
