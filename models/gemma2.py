"""Gemma 2: every other layer sees a window, scores and logits are capped, norms before and after each part.

Source: Gemma Team 2024; parameter names of Hugging Face's `Gemma2ForCausalLM`.
"""

import math

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import NUMBER, POSITIVE, SIZE
from pjengine.models.weight_table import WeightTable


class Gemma2(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_layers = reader.size("hidden_size"), reader.size("num_hidden_layers")
        head_dim = reader.size("head_dim", default=256)
        max_position = reader.size("max_position_embeddings", default=8192)
        window = reader.nullable("sliding_window", wanted=SIZE, default=4096)
        types = reader.layer_types(num_layers, ("sliding_attention", "full_attention"))
        has_attention_bias = reader.flag("attention_bias", default=False)
        reader.only("use_bidirectional_attention", False)
        # `hidden_activation` is what counts, and `sliding_window`; the others are old spellings beside them.
        reader.ignore("hidden_act", "sliding_window_size", "cache_implementation")
        return ModelConfig(
            **reader.base(bos=2, eos=1, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=reader.size("num_attention_heads"),
            num_kv_heads=reader.size("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            norm_offset=1.0,
            has_post_norms=True,
            attention_scale=1
            / math.sqrt(reader.number("query_pre_attn_scalar", default=256, wanted=POSITIVE)),
            attention_softcap=reader.nullable("attn_logit_softcapping", wanted=NUMBER, default=50.0),
            layer_windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            activation=reader.activation("hidden_activation", default="gelu_pytorch_tanh"),
            embedding_scale=math.sqrt(hidden_size),
            logit_softcap=reader.nullable("final_logit_softcapping", wanted=NUMBER, default=30.0),
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        norms = {
            "layers/attn_norm": f"{layer}.input_layernorm",
            "layers/attn_out_norm": f"{layer}.post_attention_layernorm",
            "layers/mlp_norm": f"{layer}.pre_feedforward_layernorm",
            "layers/mlp_out_norm": f"{layer}.post_feedforward_layernorm",
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
            prefixes=("model.",),
        )
