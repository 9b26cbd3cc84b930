"""Qwen3: Qwen2 with norms of each head's queries and keys, and by default no biases.

Source: Qwen Team 2025; parameter names of Hugging Face's `Qwen3ForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.llama import Llama
from pjengine.models.qwen2 import read_shape
from pjengine.models.weight_table import WeightTable


class Qwen3(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        has_bias = reader.flag("attention_bias", default=False)
        head_dim = reader.size("head_dim", default=128)
        return read_shape(reader, head_dim, qk_norm="head", qkv_bias=has_bias, out_bias=has_bias)

    def weight_table(self) -> WeightTable:
        table, prefix = super().weight_table(), "model.layers.{layer}.self_attn"
        norms = layouts.qk_norms(self.config, f"{prefix}.q_norm", f"{prefix}.k_norm")
        return dataclasses.replace(table, leaves={**table.leaves, **norms})
