"""Gemma: Llama's form with scaled embeddings, norms that hold their weight less 1, and GELU's tanh form.

Source: Gemma Team 2024; parameter names of Hugging Face's `GemmaForCausalLM`.
"""

import math

from pjengine.models.config import Activation, ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.llama import Llama


class Gemma(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, head_dim = reader.size("hidden_size"), reader.size("head_dim", default=256)
        max_position = reader.size("max_position_embeddings", default=8192)
        has_attention_bias = reader.flag("attention_bias", default=False)
        reader.only("use_bidirectional_attention", False)
        return ModelConfig(
            **reader.base(bos=2, eos=1, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=reader.size("num_hidden_layers"),
            num_heads=reader.size("num_attention_heads"),
            num_kv_heads=reader.size("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            norm_offset=1.0,
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            activation=_read_activation(reader),
            embedding_scale=math.sqrt(hidden_size),
        )


def _read_activation(reader: ConfigReader) -> Activation:
    """`hidden_activation` where given; else `hidden_act`, whose "gelu" has meant the tanh form all along."""
    if reader.config.get("hidden_activation") is not None:
        reader.ignore("hidden_act")
        return reader.activation("hidden_activation", default="gelu_pytorch_tanh")
    reader.ignore("hidden_activation")
    found = reader.activation("hidden_act", default="gelu_pytorch_tanh")
    return "gelu_tanh" if found == "gelu" else found
