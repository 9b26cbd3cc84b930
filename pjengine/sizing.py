"""What a caller left open: the dtype and the limits of an engine."""

import jax
import jax.numpy as jnp

from pjengine.config import EngineConfig
from pjengine.models.config import ModelConfig

# Requests that run at once, and tokens of a step. There every step costs what a full one does; in the last
# case decodes do not.
DETERMINISTIC_CPU, DETERMINISTIC_GPU, INVARIANT_GPU = (16, 128), (256, 512), (512, 512)


def choose_dtype(wanted: str, model_config: ModelConfig) -> jnp.dtype:
    """`auto` is the checkpoint's own; float32 checkpoints run in float32 on a CPU, else in bfloat16."""
    if wanted != "auto":
        return jnp.dtype(wanted)
    if model_config.dtype == "float32" and jax.default_backend() != "cpu":
        return jnp.dtype("bfloat16")
    return jnp.dtype(model_config.dtype)


def choose_decode_steps(wanted: int | None, weights_bytes: int, *, is_gpu: bool) -> int:
    """Tokens of one launch: several where the device would wait for the host's millisecond after each.

    Measured on one NVIDIA H200: 12 layers of 768 take 0.52 ms a token instead of 0.99 at batch 1, and 4
    steps are as good as 8 or 16; 16 GB of weights gain nothing.
    """
    return wanted or (4 if is_gpu and weights_bytes < 3e9 else 1)


def choose_sizes(
    config: EngineConfig,
    model_config: ModelConfig,
    memory_bytes: int | None,
    *,
    is_batch_invariant: bool = False,
) -> dict[str, int]:
    """Fills in the limits that the caller left open, by the device's memory; None: a CPU.

    Raises:
      ValueError: max_model_len is beyond what the model's positions reach, or the limits contradict.
    """
    supported = model_config.max_model_len
    if config.max_model_len is not None and int(config.max_model_len) > supported:
        raise ValueError(
            f"max_model_len={config.max_model_len} is beyond the {supported} positions that the model "
            "supports; lower it, or change the model's rope settings with hf_overrides"
        )
    is_large = memory_bytes is not None and memory_bytes > 60 * 2**30  # vLLM draws it at 70 GiB cards
    seqs, tokens = (16, 512) if memory_bytes is None else (1024, 16384) if is_large else (256, 8192)
    if config.deterministic:
        on_gpu = INVARIANT_GPU if is_batch_invariant else DETERMINISTIC_GPU
        seqs, tokens = DETERMINISTIC_CPU if memory_bytes is None else on_gpu
    max_num_seqs = config.max_num_seqs or seqs
    if config.max_num_seqs is None and config.max_num_batched_tokens is not None:
        max_num_seqs = min(seqs, config.max_num_batched_tokens)
    max_num_batched_tokens = config.max_num_batched_tokens or max(tokens, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens={max_num_batched_tokens} must be at least max_num_seqs={max_num_seqs}, "
            "so that every running request gets its token in each step"
        )
    return {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
