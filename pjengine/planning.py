"""The memory plan of an engine on a card that is not there."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from pjengine.config import EngineConfig
from pjengine.loading import make_plan, read_model_config, sized, with_draft
from pjengine.memory import MemoryPlan
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES

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
    model, _ = with_draft(config, model, needs_weights=False)
    device = AbstractDevice(device_kind=f"NVIDIA {gpu.upper()}", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("gpu",), abstract_device=device)):
        model, sizes = sized(config, model, GPU_BYTES[gpu])
    return make_plan(config, model, sizes, int(GPU_BYTES[gpu] * config.gpu_memory_utilization))
