"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side under one norm, partial rotary positions, biases.

Source: Gunasekar et al. 2023; parameter names of Hugging Face's `PhiForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.weight_table import WeightTable


class Phi(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads)
        max_position = reader.size("max_position_embeddings", default=2048)
        reader.ignore("embd_pdrop")
        return ModelConfig(
            **reader.base(bos=1, eos=2, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position, partial=0.5),
            norm="layer",
            norm_eps=reader.number("layer_norm_eps", default=1e-5),
            has_norm_bias=True,
            is_parallel=True,
            has_mlp_norm=False,
            qkv_bias=True,
            out_bias=True,
            qk_norm="head" if reader.flag("qk_layernorm", default=False) else None,
            has_qk_norm_bias=True,
            activation=reader.activation("hidden_act", default="gelu_new"),
            is_gated=False,
            mlp_bias=True,
            head_bias=True,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        attention = f"{layer}.self_attn"
        norms = {"layers/attn_norm": f"{layer}.input_layernorm", "final_norm": "model.final_layernorm"}
        leaves = {
            "embed": layouts.plain("model.embed_tokens.weight"),
            **layouts.norms(c, norms),
            **layouts.separate_qkv(c, attention),
            **layouts.out_proj(c, f"{attention}.dense"),
            **layouts.plain_mlp(c, f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
            **layouts.head(c),
        }
        if c.qk_norm is not None:
            leaves |= layouts.qk_norms(c, f"{attention}.q_layernorm", f"{attention}.k_layernorm")
        return WeightTable(
            leaves=leaves,
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )
