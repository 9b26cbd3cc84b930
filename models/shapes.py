"""Named model shapes: benchmarks run them with random weights, plans and compile tests without any."""

from collections.abc import Iterator, Mapping
from typing import Any

from pjengine.models.config import ModelConfig
from pjengine.models.registry import parse_config

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
}
# As a config.json has them.
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-1b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-70b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama2-13b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
    },
    "gemma2-9b": {
        "architectures": ["Gemma2ForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt2-xl": {
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": "bfloat16",
        "vocab_size": 50257,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "bloom-7b": {
        "architectures": ["BloomForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 250880,
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "torch_dtype": "bfloat16",
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    # As wide, deep and large as OPT-125M, in Llama's form: gated MLP of 3 × 2048 for OPT's 2 × 3072.
    "opt-125m-llama": {
        **_LLAMA,
        "vocab_size": 50272,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
    },
    # Small enough for tests of a whole engine on a CPU.
    "tiny": {
        **_LLAMA,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    },
}


class _Shapes(Mapping[str, ModelConfig]):
    """Reads a shape, and imports its architecture, when it is asked for."""

    def __getitem__(self, name: str) -> ModelConfig:
        return parse_config(_CONFIGS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(_CONFIGS)

    def __len__(self) -> int:
        return len(_CONFIGS)


SHAPES: Mapping[str, ModelConfig] = _Shapes()
