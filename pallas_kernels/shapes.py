"""Head shapes of real models: tests, benchmarks and tuning all go through this list."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What the attention kernels see of a model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16


SHAPES: Mapping[str, HeadShape] = {
    "llama-8b": HeadShape(num_heads=32, num_kv_heads=8, head_dim=128),
    "llama2-13b": HeadShape(num_heads=40, num_kv_heads=40, head_dim=128),
    "falcon-7b": HeadShape(num_heads=71, num_kv_heads=1, head_dim=64),
    "starcoder": HeadShape(num_heads=48, num_kv_heads=1, head_dim=128),
    "opt-125m": HeadShape(num_heads=12, num_kv_heads=12, head_dim=64),
    "gptj-6b": HeadShape(num_heads=16, num_kv_heads=16, head_dim=256),
    "gpt-neox-20b": HeadShape(num_heads=64, num_kv_heads=64, head_dim=96),
    "open-llama-3b": HeadShape(num_heads=32, num_kv_heads=32, head_dim=100),
    "bloom-3b": HeadShape(num_heads=32, num_kv_heads=32, head_dim=80),
    "demo": HeadShape(num_heads=8, num_kv_heads=4, head_dim=32),
    "llama-8b-page64": HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=64),
}


# Inputs and outputs of the products of a layer; gate_up has both halves of its outputs.
PRODUCTS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "llama-8b": {"qkv": (4096, 6144), "out": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "llama2-13b": {
        "qkv": (5120, 15360),
        "out": (5120, 5120),
        "gate_up": (5120, 27648),
        "down": (13824, 5120),
    },
    "demo": {"qkv": (256, 512), "gate_up": (256, 1024)},
}

# Inputs of the head, and the tokens of the vocabulary.
HEADS: Mapping[str, tuple[int, int]] = {
    "llama-8b": (4096, 128256),
    "llama2-13b": (5120, 32000),
    "demo": (256, 512),
}


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """What the kernels of experts see of a model."""

    hidden: int
    inner: int  # of one expert
    num_experts: int
    num_choices: int  # experts of a token


EXPERTS: Mapping[str, ExpertShape] = {
    "qwen3-30b-a3b": ExpertShape(hidden=2048, inner=768, num_experts=128, num_choices=8),
    "mixtral-8x7b": ExpertShape(hidden=4096, inner=14336, num_experts=8, num_choices=2),
    "gpt-oss-20b": ExpertShape(hidden=2880, inner=2880, num_experts=32, num_choices=4),
    "demo": ExpertShape(hidden=256, inner=128, num_experts=8, num_choices=2),
}
