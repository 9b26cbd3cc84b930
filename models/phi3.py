"""Phi-3, Phi-3.5 and Phi-4: Llama's form in fused tensors, long and partial rotary positions, a window.

Source: Abdin et al. 2024; parameter names of Hugging Face's `Phi3ForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import SIZE
from pjengine.models.weight_table import WeightTable


class Phi3(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        max_position = reader.size("max_position_embeddings", default=4096)
        rope = reader.rope(head_dim=head_dim, max_position_embeddings=max_position, partial=1.0)
        if rope.kind == "longrope":  # which means nothing without it
            reader.size("original_max_position_embeddings")
        for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
            reader.only(key, False)
        for key in ("full_attn_mod", "interpolate_factor"):
            reader.only(key, 1)
        reader.ignore("embd_pdrop")
        return ModelConfig(
            **reader.base(bos=1, eos=32000, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-5),
            rope=rope,
            layer_windows=(reader.get("sliding_window", wanted=SIZE),),
            activation=reader.activation("hidden_act", default="silu"),
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
                **layouts.fused_qkv(c, f"{layer}.self_attn.qkv_proj", "blocks"),
                **layouts.out_proj(c, f"{layer}.self_attn.o_proj"),
                **layouts.fused_gated_mlp(c, f"{layer}.mlp.gate_up_proj", f"{layer}.mlp.down_proj"),
                **layouts.head(c),
            },
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )
