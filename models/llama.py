"""The Llama family: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al. 2023; parameter names of Hugging Face's `LlamaForCausalLM`.
"""

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import NON_NEGATIVE, SIZE
from pjengine.models.weight_table import WeightTable

# Other names under which old conversions recorded max_position_embeddings.
_LENGTH_KEYS = ("max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "seq_length")


class Llama(Decoder):
    """The form that `ModelConfig` and `Block` have by default."""

    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        lengths = [length for key in _LENGTH_KEYS if (length := reader.get(key, wanted=SIZE)) is not None]
        max_position = reader.size("max_position_embeddings", default=min(lengths, default=2048))
        has_attention_bias = reader.flag("attention_bias", default=False)
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
            norm_eps=reader.number("rms_norm_eps", default=1e-6, wanted=NON_NEGATIVE),
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            activation=reader.activation("hidden_act", default="silu"),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            mlp_bias=reader.flag("mlp_bias", default=False),
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
                **layouts.gated_mlp(c, f"{layer}.mlp"),
                **layouts.head(c),
            },
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),  # checkpoints of the bare model lack it
        )
