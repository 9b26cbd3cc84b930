"""SmolLM3: Llama's form, but some layers, by default each fourth, do not rotate queries and keys.

Source: Bakouch et al. 2025; parameter names of Hugging Face's `SmolLM3ForCausalLM`.
"""

from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import NUMBERS, SIZE
from pjengine.models.llama import Llama


class SmolLM3(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        num_layers = reader.size("num_hidden_layers")
        head_dim = reader.head_dim(hidden_size, num_heads, "head_dim")
        max_position = reader.size("max_position_embeddings", default=32768)
        rope = reader.rope(head_dim=head_dim, max_position_embeddings=max_position, theta=2000000.0)
        interval = reader.size("no_rope_layer_interval", default=4)
        default = [(number + 1) % interval for number in range(num_layers)]
        # What is not zero stands for a layer that rotates.
        is_rotated = [bool(i) for i in reader.get("no_rope_layers", wanted=NUMBERS, default=default)]
        if len(is_rotated) != num_layers:
            raise ValueError(f"no_rope_layers must name {num_layers} layers, got {len(is_rotated)}")
        has_windows = reader.flag("use_sliding_window", default=False)
        window = reader.get("sliding_window", wanted=SIZE) if has_windows else None
        has_attention_bias = reader.flag("attention_bias", default=False)
        types = reader.layer_types(
            num_layers,
            [
                "full_attention" if window is None or rotated else "sliding_attention"
                for rotated in is_rotated
            ],
        )
        # The window's size says nothing without use_sliding_window; the others were never read.
        reader.ignore("sliding_window", "max_window_layers", "pretraining_tp")
        return ModelConfig(
            **reader.base(bos=128000, eos=128001, tie=True),
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=4),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=reader.number("rms_norm_eps", default=1e-6),
            rope=rope,
            layer_ropes=tuple(rope if rotated else None for rotated in is_rotated),
            layer_windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            activation=reader.activation("hidden_act", default="silu"),
            qkv_bias=has_attention_bias,
            out_bias=has_attention_bias,
            mlp_bias=reader.flag("mlp_bias", default=False),
        )
