"""Qwen3-MoE: Qwen3 with experts in place of the MLP, in all layers or in some.

Source: Qwen Team 2025; parameter names of Hugging Face's `Qwen3MoeForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ExpertConfig, ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import INDEXES, SIZE
from pjengine.models.qwen3 import Qwen3
from pjengine.models.weight_table import WeightTable


class Qwen3Moe(Qwen3):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        config = Qwen3.read_config(reader)
        reader.only("hidden_act", "silu", "swish")
        reader.only("layer_types")
        reader.ignore("output_router_logits", "router_aux_loss_coef")
        # Unlike Qwen3, where there is a window all layers have it: `max_window_layers` says nothing.
        window = reader.nullable("sliding_window", wanted=SIZE, default=4096)
        has_window = reader.flag("use_sliding_window", default=False)
        dense = _read_dense_layers(reader, config.num_layers)
        experts = ExpertConfig(
            num_experts=reader.size("num_local_experts", "num_experts", default=128),
            num_choices=reader.size("num_experts_per_tok", default=8),
            inner_size=reader.size("moe_intermediate_size", default=768),
            is_normalized=reader.flag("norm_topk_prob", default=False),
        )
        is_dense = len(dense) == config.num_layers
        return dataclasses.replace(
            config,
            layer_windows=(window if has_window else None,),
            experts=None if is_dense else experts,
            dense_layers=() if is_dense else dense,
        )

    def weight_table(self) -> WeightTable:
        c, prefix, table = self.config, "model.layers.{layer}.mlp", super().weight_table()
        if c.experts is None:
            return table
        names = ("gate_proj", "up_proj", "down_proj")
        experts = layouts.experts(c, f"{prefix}.gate", f"{prefix}.experts", names)
        leaves = layouts.with_experts(c, dict(table.leaves), experts)
        return dataclasses.replace(table, leaves=leaves, stacks=self.stacks)


def _read_dense_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Those of `mlp_only_layers`, and of each `decoder_sparse_step` layers all but the last."""
    named = reader.get("mlp_only_layers", wanted=INDEXES, default=())
    step = reader.size("decoder_sparse_step", default=1)
    return tuple(n for n in range(num_layers) if n in named or (n + 1) % step)
