"""OLMo 2: norms of what attention and MLP give, not of what they take; whole queries and keys are normalized.

Source: OLMo Team 2024; parameter names of Hugging Face's `Olmo2ForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.weight_table import WeightTable


class Olmo2(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        max_position = reader.size("max_position_embeddings", default=2048)
        has_attention_bias = reader.flag("attention_bias", default=False)
        return ModelConfig(
            **reader.base(bos=None, eos=50279, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-5),
            has_pre_norms=False,
            has_post_norms=True,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            qk_norm="full",
            activation=reader.activation("hidden_act", default="silu"),
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        norms = {
            "layers/attn_out_norm": f"{layer}.post_attention_layernorm",
            "layers/mlp_out_norm": f"{layer}.post_feedforward_layernorm",
            "final_norm": "model.norm",
        }
        return WeightTable(
            leaves={
                "embed": layouts.plain("model.embed_tokens.weight"),
                **layouts.norms(c, norms),
                **layouts.separate_qkv(c, f"{layer}.self_attn"),
                **layouts.qk_norms(c, f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm"),
                **layouts.out_proj(c, f"{layer}.self_attn.o_proj"),
                **layouts.gated_mlp(c, f"{layer}.mlp"),
                **layouts.head(c),
            },
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )
