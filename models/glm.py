"""GLM-4: half of each head rotates, in pairs; queries, keys and values have biases, the output has none.

The checkpoints of 2025 (`Glm4ForCausalLM`) have norms of what attention and MLP give, too.

Source: GLM Team 2024; parameter names of Hugging Face's `GlmForCausalLM` and `Glm4ForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.weight_table import WeightTable


class Glm(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.size("head_dim", default=128)
        max_position = reader.size("max_position_embeddings", default=131072)
        return ModelConfig(
            **reader.base(bos=None, eos=(151329, 151336, 151338), tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=2),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1.5625e-07),
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position, partial=0.5),
            qkv_bias=reader.flag("attention_bias", default=True),
            activation=reader.activation("hidden_act", default="silu"),
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.input_layernorm",
            "layers/mlp_norm": f"{layer}.post_attention_layernorm",
            "final_norm": "model.norm",
        }
        if c.has_post_norms:
            norms["layers/attn_out_norm"] = f"{layer}.post_self_attn_layernorm"
            norms["layers/mlp_out_norm"] = f"{layer}.post_mlp_layernorm"
        num_paired = 0 if c.rope is None else c.rope.rotary_dim
        return WeightTable(
            leaves={
                "embed": layouts.plain("model.embed_tokens.weight"),
                **layouts.norms(c, norms),
                **layouts.separate_qkv(c, f"{layer}.self_attn", num_paired=num_paired),
                **layouts.out_proj(c, f"{layer}.self_attn.o_proj"),
                **layouts.fused_gated_mlp(c, f"{layer}.mlp.gate_up_proj", f"{layer}.mlp.down_proj"),
                **layouts.head(c),
            },
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )


class Glm4(Glm):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        return dataclasses.replace(Glm.read_config(reader), has_post_norms=True)
