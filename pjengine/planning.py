"""The memory plan of an engine on a card that is not there."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from pjengine.config import EngineConfig, parse_length
from pjengine.loading import bytes_of_one_device, read_model_config
from pjengine.memory import MemoryPlan, plan_memory
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from pjengine.sharding.mesh import AXES
from pjengine.sharding.partition import placed
from pjengine.sizing import choose_sizes

# What CUDA reports as the card's whole memory; a little less than the name says.
GPU_BYTES = {
    "h200": 150_100_000_000,
    "h100": 84_900_000_000,
    "a100-80gb": 84_900_000_000,
    "a100-40gb": 42_300_000_000,
    "l40s": 47_600_000_000,
    "l4": 23_800_000_000,
}


def plan_without_device(config: EngineConfig, gpu: str) -> MemoryPlan:
    """The plan of an engine on a card of GPU_BYTES, made without one and without reading weights.

    Raises:
      ValueError: no such card, or as `load_model`.
    """
    if gpu not in GPU_BYTES:
        raise ValueError(f"gpu must be one of {', '.join(GPU_BYTES)}, got {gpu!r}")
    if config.model in SHAPES:
        config = dataclasses.replace(config, load_format="dummy")
    _, model_config = read_model_config(config, needs_weights=False)
    dtype = jnp.dtype(model_config.dtype if config.dtype == "auto" else config.dtype)
    if config.dtype == "auto" and dtype == jnp.float32:
        dtype = jnp.dtype("bfloat16")  # as on a GPU
    model = build_model(model_config, dtype, config.tensor_parallel_size)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    parts = placed(abstract, AbstractMesh((1, model.num_devices), AXES))
    return plan_memory(
        dataclasses.replace(model.own, vocab_size=model_config.vocab_size),
        dtype,
        weights_bytes=bytes_of_one_device(parts),
        budget_bytes=int(GPU_BYTES[gpu] * config.gpu_memory_utilization),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        page_size=config.page_size,
        max_model_len=parse_length(config.max_model_len),
        max_logprobs=config.max_logprobs,
        speculation=config.speculation,
        **choose_sizes(config, model_config, GPU_BYTES[gpu]),
    )
