"""GPT-NeoX and Pythia: attention beside the MLP, partial rotary positions, LayerNorm with biases.

Source: Black et al. 2022; parameter names of Hugging Face's `GPTNeoXForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.weight_table import WeightTable


class GPTNeoX(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        max_position = reader.size("max_position_embeddings", default=2048)
        rope = reader.rope(
            head_dim=head_dim,
            max_position_embeddings=max_position,
            theta=reader.number("rotary_emb_base", default=10000.0),
            partial=reader.number("rotary_pct", default=0.25),
        )
        has_attention_bias = reader.flag("attention_bias", default=True)
        # Of training alone; and whose code a hub page runs.
        reader.ignore(
            "classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "custom_pipelines"
        )
        return ModelConfig(
            **reader.base(bos=0, eos=2, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=rope,
            norm="layer",
            norm_eps=reader.number("layer_norm_eps", default=1e-5),
            has_norm_bias=True,
            is_parallel=reader.flag("use_parallel_residual", default=True),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            activation=reader.activation("hidden_act", default="gelu"),
            is_gated=False,
            mlp_bias=True,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "gpt_neox.layers.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.input_layernorm",
            "layers/mlp_norm": f"{layer}.post_attention_layernorm",
            "final_norm": "gpt_neox.final_layer_norm",
        }
        return WeightTable(
            leaves={
                "embed": layouts.plain("gpt_neox.embed_in.weight"),
                **layouts.norms(c, norms),
                **layouts.fused_qkv(c, f"{layer}.attention.query_key_value", "groups"),
                **layouts.out_proj(c, f"{layer}.attention.dense"),
                **layouts.plain_mlp(c, f"{layer}.mlp.dense_h_to_4h", f"{layer}.mlp.dense_4h_to_h"),
                **layouts.head(c, "embed_out"),
            },
            ignored=(
                "*.rotary_emb.*",
                "*.attention.bias",  # causal masks, which old versions stored as buffers
                "*.attention.masked_bias",
                *layouts.tied_copies(c, "embed_out"),
            ),
            prefixes=("gpt_neox.",),
        )
