"""Command R: attention beside the MLP behind one norm without bias, rotary positions in pairs, scaled logits.

Command R7B and A have windows in most layers, and rotate queries and keys only there.

Source: parameter names of Hugging Face's `CohereForCausalLM` and `Cohere2ForCausalLM`.
"""

import dataclasses

from pjengine.models import layouts
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import SIZE
from pjengine.models.weight_table import WeightTable


class Cohere(Decoder):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        return dataclasses.replace(
            _read(reader, theta=500000.0),
            qk_norm="own" if reader.flag("use_qk_norm", default=False) else None,
        )

    def weight_table(self) -> WeightTable:
        c, layer = self.config, "model.layers.{layer}"
        attention = f"{layer}.self_attn"
        leaves = {
            "embed": layouts.plain("model.embed_tokens.weight"),
            **layouts.norms(c, {"layers/attn_norm": f"{layer}.input_layernorm", "final_norm": "model.norm"}),
            **layouts.separate_qkv(c, attention, num_paired=c.head_dim),
            **layouts.out_proj(c, f"{attention}.o_proj"),
            **layouts.gated_mlp(c, f"{layer}.mlp"),
            **layouts.head(c),
        }
        if c.qk_norm is not None:
            names = (f"{attention}.q_norm", f"{attention}.k_norm")
            leaves |= layouts.qk_norms(c, *names, num_paired=c.head_dim, has_head_axis=True)
        return WeightTable(
            leaves=leaves,
            ignored=("*.rotary_emb.inv_freq", *layouts.tied_copies(c)),
            prefixes=("model.",),
        )


class Cohere2(Cohere):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        config = _read(reader, theta=10000.0)
        window = reader.nullable("sliding_window", wanted=SIZE, default=4096)
        pattern = reader.size("sliding_window_pattern", "layer_switch", default=4)
        default = ("sliding_attention",) * (pattern - 1) + ("full_attention",)
        types = reader.layer_types(config.num_layers, default)
        windows = tuple(window if kind == "sliding_attention" else None for kind in types)
        # What the first checkpoints write down beside, and transformers takes for granted.
        reader.only("order_of_interleaved_layers", "local_attn_first")
        reader.only("position_embedding_type", "rope_gptj")
        reader.only("rotary_pct", 1.0)
        for key in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
            reader.only(key, True)
        reader.only("use_parallel_embedding", False)
        reader.only("use_qk_norm", False)
        reader.ignore("_sliding_window_pattern", "cache_implementation")  # `layer_types` counts
        return dataclasses.replace(
            config,
            layer_windows=windows,
            layer_ropes=tuple(None if size is None else config.rope for size in windows),
        )


def _read(reader: ConfigReader, theta: float) -> ModelConfig:
    """What both have."""
    hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
    max_position = reader.size("max_position_embeddings", default=8192)
    has_attention_bias = reader.flag("attention_bias", default=False)
    rope = reader.rope(head_dim=head_dim, max_position_embeddings=max_position, theta=theta)
    return ModelConfig(
        **reader.base(bos=5, eos=255001, tie=True),
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        # Command R's `max_position_embeddings` is the length of most of its training.
        max_position_embeddings=reader.size("model_max_length", default=max_position),
        norm="layer",
        norm_eps=reader.number("layer_norm_eps", default=1e-5),
        is_parallel=True,
        has_mlp_norm=False,
        rope=rope,
        qkv_bias=has_attention_bias,
        out_bias=has_attention_bias,
        activation=reader.activation("hidden_act", default="silu"),
        logit_scale=reader.number("logit_scale", default=0.0625),
    )
