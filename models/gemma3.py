"""Gemma 3, text alone: Gemma 2 with norms of queries and keys instead of soft caps, and two rotary bases.

Source: Gemma Team 2025; parameter names of Hugging Face's `Gemma3ForCausalLM`.
"""

import dataclasses
import math

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.gemma2 import Gemma2
from pjengine.models.json_values import NUMBER, OBJECT, POSITIVE, SIZE, check_values
from pjengine.models.rope import RopeConfig
from pjengine.models.weight_table import WeightTable


class Gemma3(Gemma2):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_layers = reader.size("hidden_size"), reader.size("num_hidden_layers")
        head_dim = reader.size("head_dim", default=256)
        max_position = reader.size("max_position_embeddings", default=131072)
        ropes = _read_ropes(reader, head_dim, max_position)
        windows = {
            "sliding_attention": reader.nullable("sliding_window", wanted=SIZE, default=4096),
            "full_attention": None,
        }
        pattern = reader.size("sliding_window_pattern", default=6)
        default_types = (*("sliding_attention",) * (pattern - 1), "full_attention")
        types = reader.layer_types(num_layers, default_types)
        has_attention_bias = reader.flag("attention_bias", default=False)
        reader.only("attn_logit_softcapping")
        reader.only("use_bidirectional_attention", False)
        reader.ignore("_sliding_window_pattern", "cache_implementation")  # transformers 5 goes by layer_types
        return ModelConfig(
            **reader.base(bos=2, eos=1, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=reader.size("num_attention_heads"),
            num_kv_heads=reader.size("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=max_position,  # stretched already: no rope's factor comes on top
            layer_ropes=tuple(ropes[kind] for kind in types),
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            norm_offset=1.0,
            has_post_norms=True,
            attention_scale=1
            / math.sqrt(reader.number("query_pre_attn_scalar", default=256, wanted=POSITIVE)),
            layer_windows=tuple(windows[kind] for kind in types),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            qk_norm="head",
            activation=reader.activation("hidden_activation", default="gelu_pytorch_tanh"),
            embedding_scale=math.sqrt(hidden_size),
            logit_softcap=reader.nullable("final_logit_softcapping", wanted=NUMBER, default=None),
        )

    def weight_table(self) -> WeightTable:
        table, prefix = super().weight_table(), "model.layers.{layer}.self_attn"
        norms = layouts.qk_norms(self.config, f"{prefix}.q_norm", f"{prefix}.k_norm")
        return dataclasses.replace(table, leaves={**table.leaves, **norms})


def _read_ropes(reader: ConfigReader, head_dim: int, max_position: int) -> dict[str, RopeConfig]:
    """The rotary positions of layers with and without a window.

    transformers 4 kept their bases apart, and `rope_scaling` was of the layers without one.
    """
    thetas = {
        "sliding_attention": reader.number("rope_local_base_freq", default=10000.0),
        "full_attention": reader.number("rope_theta", default=1000000.0),
    }
    old = {"full_attention": reader.get("rope_scaling", wanted=OBJECT)}
    parameters = reader.get("rope_parameters", wanted=OBJECT, default=old)
    check_values(parameters, dict.fromkeys(thetas, OBJECT), "rope_parameters of config.json")
    if unknown := sorted(parameters.keys() - thetas.keys()):
        raise ValueError(f"rope_parameters must be of {' and '.join(thetas)}, got {', '.join(unknown)}")
    return {
        kind: reader.rope(
            head_dim=head_dim,
            max_position_embeddings=max_position,
            theta=theta,
            parameters=parameters.get(kind) or {},
        )
        for kind, theta in thetas.items()
    }
