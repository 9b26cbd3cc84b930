"""Mistral: Llama's form, where every layer may see a window.

Source: Jiang et al. 2023; parameter names of Hugging Face's `MistralForCausalLM`.
"""

from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import SIZE
from pjengine.models.llama import Llama


class Mistral(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        max_position = reader.size("max_position_embeddings", default=131072)
        return ModelConfig(
            **reader.base(bos=1, eos=2, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=8),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            # Null: none; only where nothing is said, what the first version had.
            layer_windows=(reader.nullable("sliding_window", wanted=SIZE, default=4096),),
            activation=reader.activation("hidden_act", default="silu"),
        )
