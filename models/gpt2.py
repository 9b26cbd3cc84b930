"""GPT-2: learned positions, LayerNorm with biases, an MLP without a gate.

Source: Radford et al. 2019; parameter names of Hugging Face's `GPT2LMHeadModel`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import SIZE
from pjengine.models.weight_table import WeightTable


class GPT2(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size = reader.size("n_embd", "hidden_size")
        num_heads = reader.size("n_head", "num_attention_heads")
        max_position = reader.size("n_positions", "max_position_embeddings", "n_ctx", default=1024)
        reader.only("scale_attn_by_inverse_layer_idx", False)
        reader.only("reorder_and_upcast_attn", False)
        reader.ignore("embd_pdrop", "attn_pdrop", "summary_activation", "summary_first_dropout")
        reader.ignore("summary_proj_to_labels", "summary_type", "summary_use_proj")
        return ModelConfig(
            **reader.base(bos=50256, eos=50256, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.get("n_inner", wanted=SIZE, default=4 * hidden_size),
            num_layers=reader.size("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=reader.head_dim(hidden_size, num_heads),
            max_position_embeddings=max_position,
            has_learned_positions=True,
            norm="layer",
            norm_eps=reader.number("layer_norm_epsilon", default=1e-5),
            has_norm_bias=True,
            attention_scale=None if reader.flag("scale_attn_weights", default=True) else 1.0,
            qkv_bias=True,
            out_bias=True,
            activation=reader.activation("activation_function", default="gelu_new"),
            is_gated=False,
            mlp_bias=True,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "transformer.h.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.ln_1",
            "layers/mlp_norm": f"{layer}.ln_2",
            "final_norm": "transformer.ln_f",
        }
        return WeightTable(
            leaves={
                "embed": layouts.plain("transformer.wte.weight"),
                "positions": layouts.plain("transformer.wpe.weight"),
                **layouts.norms(c, norms),
                **layouts.fused_qkv(c, f"{layer}.attn.c_attn", "blocks", is_conv=True),
                **layouts.out_proj(c, f"{layer}.attn.c_proj", is_conv=True),
                **layouts.plain_mlp(c, f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj", is_conv=True),
                **layouts.head(c),
            },
            # Causal masks, which old versions stored as buffers.
            ignored=("*.attn.bias", "*.attn.masked_bias", *layouts.tied_copies(c)),
            prefixes=("transformer.",),
        )
