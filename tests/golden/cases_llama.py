"""Llama: every way of sharing heads, of biases and of scaling RoPE."""

from typing import Any

from families import Family, rope, v4

BASE: dict[str, Any] = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters=rope(),
    bos_token_id=1,
    eos_token_id=2,
)

LLAMA3: dict[str, Any] = {"theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = Family(
    architecture="LlamaForCausalLM",
    base=BASE,
    cases={
        "mha": {"num_key_value_heads": 4},
        "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "vocab_size": 128},
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True, "vocab_size": 193},
        "head_dim": {"head_dim": 32},
        "linear": {"max_position_embeddings": 80, "rope_parameters": rope("linear", factor=2.5)},
        "dynamic": {"max_position_embeddings": 80, "rope_parameters": rope("dynamic", factor=2.0)},
        "dynamic_growing": {"max_position_embeddings": 80, "rope_parameters": rope("dynamic", factor=2.0)},
        "llama3": {
            "rope_parameters": rope("llama3", factor=8.0, original_max_position_embeddings=32, **LLAMA3)
        },
        "yarn": {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    },
    old=v4,
    prompt_lengths={"dynamic": 90, "dynamic_growing": 60},
    new_tokens=64,
)

# Frequencies alone, at real sizes: (head_dim, max_position_embeddings, parameters).
YARN = rope("yarn", factor=32.0, original_max_position_embeddings=4096)
ROPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "llama2": (128, 4096, rope("default")),
    "llama3": (128, 8192, rope("default", theta=500000.0)),
    "llama3_1": (128, 131072, rope("llama3", factor=8.0, original_max_position_embeddings=8192, **LLAMA3)),
    "llama3_2": (64, 131072, rope("llama3", factor=32.0, original_max_position_embeddings=8192, **LLAMA3)),
    "vicuna_16k": (128, 4096, rope("linear", factor=4.0)),
    "deepseek_coder": (128, 16384, rope("linear", theta=100000.0, factor=4.0)),
    "dynamic": (128, 4096, rope("dynamic", factor=2.0)),
    "yarn": (128, 131072, YARN),
    "yarn_mscale": (
        64,
        163840,
        YARN | {"factor": 40.0, "beta_fast": 24.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "yarn_untruncated": (64, 131072, YARN | {"rope_theta": 150000.0, "truncate": False}),
    "yarn_attention_factor": (80, 131072, YARN | {"rope_theta": 1000000.0, "attention_factor": 0.75}),
}
DYNAMIC_LENGTHS = (1, 4096, 4097, 6000, 8192, 20000)
