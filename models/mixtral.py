"""Mixtral: Mistral with experts in place of the MLP.

Source: Jiang et al. 2024; parameter names of Hugging Face's `MixtralForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ExpertConfig, ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import SIZE
from pjengine.models.llama import Llama
from pjengine.models.weight_table import WeightTable


class Mixtral(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        max_position = reader.size("max_position_embeddings", default=131072)
        inner_size = reader.size("intermediate_size")
        reader.only("hidden_act", "silu", "swish")
        # Of training alone.
        reader.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
        return ModelConfig(
            **reader.base(bos=1, eos=2, tie=False),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=inner_size,
            num_layers=reader.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=8),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-5),
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position, theta=1000000.0),
            layer_windows=(reader.get("sliding_window", wanted=SIZE),),
            experts=ExpertConfig(
                num_experts=reader.size("num_local_experts", "num_experts", default=8),
                num_choices=reader.size("num_experts_per_tok", default=2),
                inner_size=inner_size,
            ),
        )

    def weight_table(self) -> WeightTable:
        c, prefix, table = self.config, "model.layers.{layer}.block_sparse_moe", super().weight_table()
        experts = layouts.experts(c, f"{prefix}.gate", f"{prefix}.experts", ("w1", "w3", "w2"))
        return dataclasses.replace(table, leaves=layouts.with_experts(c, dict(table.leaves), experts))
