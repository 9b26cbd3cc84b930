"""Qwen2 and Qwen2.5: Llama's form with biases of queries, keys and values; late layers may see a window.

Source: Qwen Team 2024; parameter names of Hugging Face's `Qwen2ForCausalLM`.
"""

from typing import Any

from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import NON_NEGATIVE, SIZE
from pjengine.models.llama import Llama


class Qwen2(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        return read_shape(reader, reader.head_dim(hidden_size, num_heads, "head_dim"), qkv_bias=True)


def read_shape(reader: ConfigReader, head_dim: int, **fields: Any) -> ModelConfig:
    """What all that are built like Qwen2 have in common; `fields` are their own."""
    num_layers, num_heads = reader.size("num_hidden_layers"), reader.size("num_attention_heads")
    max_position = reader.size("max_position_embeddings", default=32768)
    reader.only("use_mrope", False)  # rotary positions of images
    reader.only("dual_chunk_attention_config")
    return ModelConfig(
        **reader.base(bos=None, eos=None, tie=False),
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        intermediate_size=reader.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position,
        norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope=reader.rope(head_dim=head_dim, max_position_embeddings=max_position),
        layer_windows=_read_windows(reader, num_layers),
        activation=reader.activation("hidden_act", default="silu"),
        **fields,
    )


def _read_windows(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """The layers' windows, which only `use_sliding_window` switches on: their size is given anyway."""
    is_on = reader.flag("use_sliding_window", default=False)
    size = reader.nullable("sliding_window", wanted=SIZE, default=4096)
    first = reader.number("max_window_layers", default=28, wanted=NON_NEGATIVE)
    window = size if is_on else None
    late = "full_attention" if window is None else "sliding_attention"
    types = reader.layer_types(
        num_layers, ["full_attention" if i < first else late for i in range(num_layers)]
    )
    if window is None and "sliding_attention" in types:
        raise ValueError(
            "layer_types names sliding_attention: that needs use_sliding_window=true and sliding_window > 0, "
            f"got use_sliding_window={is_on} and sliding_window={size}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
