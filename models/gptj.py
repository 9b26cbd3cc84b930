"""GPT-J: attention beside the MLP on one norm, rotary positions in pairs of neighbours, a head with a bias.

Source: Wang and Komatsuzaki 2021; parameter names of Hugging Face's `GPTJForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.rope import RopeConfig
from pjengine.models.weight_table import WeightTable


class GPTJ(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size = reader.size("n_embd", "hidden_size")
        num_heads = reader.size("n_head", "num_attention_heads")
        rotary_dim = reader.size("rotary_dim", default=64)
        reader.only("rotary", True)
        reader.only("scale_attn_weights", True)
        reader.ignore("embd_pdrop", "attn_pdrop", "summary_activation", "summary_first_dropout")
        reader.ignore("summary_proj_to_labels", "summary_type", "summary_use_proj")
        return ModelConfig(
            **reader.base(bos=50256, eos=50256, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("n_inner", default=4 * hidden_size),
            num_layers=reader.size("n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=reader.head_dim(hidden_size, num_heads),
            max_position_embeddings=reader.size("n_positions", "max_position_embeddings", default=2048),
            norm="layer",
            norm_eps=reader.number("layer_norm_epsilon", default=1e-5),
            has_norm_bias=True,
            is_parallel=True,
            has_mlp_norm=False,
            rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=rotary_dim),
            activation=reader.activation("activation_function", default="gelu_new"),
            is_gated=False,
            mlp_bias=True,
            head_bias=True,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "transformer.h.{layer}"
        assert c.rope is not None
        norms = {"layers/attn_norm": f"{layer}.ln_1", "final_norm": "transformer.ln_f"}
        return WeightTable(
            leaves={
                "embed": layouts.plain("transformer.wte.weight"),
                **layouts.norms(c, norms),
                **layouts.separate_qkv(c, f"{layer}.attn", num_paired=c.rope.rotary_dim),
                **layouts.out_proj(c, f"{layer}.attn.out_proj"),
                **layouts.plain_mlp(c, f"{layer}.mlp.fc_in", f"{layer}.mlp.fc_out"),
                **layouts.head(c),
            },
            # Causal masks, which old versions stored as buffers.
            ignored=("*.attn.bias", "*.attn.masked_bias", *layouts.tied_copies(c)),
            prefixes=("transformer.",),
        )
