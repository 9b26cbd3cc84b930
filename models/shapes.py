"""Named model shapes: benchmarks run them with random weights, plans and compile tests without any."""

from collections.abc import Mapping

from pjengine.models.config import ModelConfig
from pjengine.models.rope import RopeConfig


def _llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    max_position_embeddings: int,
    rope_theta: float = 10000.0,
    dtype: str = "bfloat16",
) -> ModelConfig:
    head_dim = hidden_size // num_heads
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        norm_eps=1e-5,
        rope=RopeConfig(kind="default", theta=rope_theta, rotary_dim=head_dim),
        dtype=dtype,
    )


SHAPES: Mapping[str, ModelConfig] = {
    "llama-8b": _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    "llama2-13b": _llama(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        max_position_embeddings=4096,
    ),
    # As wide, deep and large as OPT-125M, in Llama's form: gated MLP of 3 × 2048 for OPT's 2 × 3072.
    "opt-125m-llama": _llama(
        vocab_size=50272,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        max_position_embeddings=2048,
    ),
    # Small enough for tests of a whole engine on a CPU.
    "tiny": _llama(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=512,
        dtype="float32",
    ),
}
