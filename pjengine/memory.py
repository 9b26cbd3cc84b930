"""How the device's memory is divided: weights, activations, and the rest for KV pages."""

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pjengine.models.config import ModelConfig
from pjengine.models.state import page_bytes

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 512 * 2**20  # a CPU shares its memory with everything else


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device, and the number of pages they leave room for."""

    weights_bytes: int
    activations_bytes: int
    page_bytes: int  # one page, all layers
    num_pages: int  # the null page among them

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.num_pages


def activation_bytes(config: ModelConfig, dtype: jnp.dtype, num_tokens: int, num_seqs: int) -> int:
    """An upper estimate of what the largest program needs beside weights and KV pages."""
    itemsize = jnp.dtype(dtype).itemsize
    widest = max(
        3 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * 2
    )
    per_token = itemsize * (4 * config.hidden_size + widest)
    per_seq = 4 * config.vocab_size * 6  # float32 logits, scaled, filtered, their keys and weights
    return num_tokens * per_token + num_seqs * per_seq


def plan_memory(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    device: jax.Device,
    weights_bytes: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_memory_bytes: int | None,
    gpu_memory_utilization: float,
    reserved_fraction: float,
) -> MemoryPlan:
    """Sizes the page pool; called once the weights are loaded.

    `reserved_fraction` is the share of the device's memory that JAX has taken for itself.

    Raises:
      ValueError: the pages that fit cannot hold one request of `max_model_len` tokens.
    """
    one_page = page_bytes(config, page_size, dtype)
    num_seqs = min(max_num_seqs, max_num_batched_tokens)
    activations = activation_bytes(config, dtype, max_num_batched_tokens, num_seqs)
    if kv_cache_memory_bytes is None:
        kv_cache_memory_bytes = _free_bytes(device, gpu_memory_utilization / reserved_fraction, activations)
    wanted = max_num_seqs * -(-max_model_len // page_size) + 1  # more could never be used
    num_pages = min(wanted, kv_cache_memory_bytes // one_page)
    needed = -(-max_model_len // page_size) + 1
    if num_pages < needed:
        raise ValueError(
            f"the KV cache gets {kv_cache_memory_bytes:,} bytes, which hold "
            f"{max(num_pages - 1, 0) * page_size} tokens; one request of max_model_len={max_model_len} "
            f"needs {needed * one_page:,} bytes. Lower max_model_len, "
            f"raise gpu_memory_utilization ({gpu_memory_utilization}) or set kv_cache_memory_bytes"
        )
    plan = MemoryPlan(
        weights_bytes=weights_bytes, activations_bytes=activations, page_bytes=one_page, num_pages=num_pages
    )
    logger.info(
        "memory weights_bytes=%d activations_bytes=%d kv_bytes=%d kv_tokens=%d",
        plan.weights_bytes,
        plan.activations_bytes,
        plan.kv_bytes,
        (num_pages - 1) * page_size,
    )
    return plan


def _free_bytes(device: jax.Device, share: float, activations: int) -> int:
    """What is left for KV pages of a `share` of the memory that JAX holds."""
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats:
        return CPU_KV_BYTES
    limit = int(stats["bytes_limit"] * min(share, 1.0))
    return max(limit - stats["bytes_in_use"] - activations, 0)
