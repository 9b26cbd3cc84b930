"""From an EngineConfig to a model on the device: config, weights, tokenizer, sizes."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pjengine.config import EngineConfig, RunnerConfig, reserve_device_memory
from pjengine.memory import GPU_BYTES, MemoryPlan, device_budget, plan_memory
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.config import ModelConfig
from pjengine.models.hub import resolve_model
from pjengine.models.llama import Llama, Params
from pjengine.models.loader import dummy_params, load_params
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from pjengine.pallas_kernels.dispatch import check_backend
from pjengine.sharding.mesh import make_mesh, replicated
from pjengine.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """All that an engine is made of."""

    model: Llama
    params: Params
    tokenizer: Tokenizer | None
    runner_config: RunnerConfig
    memory_plan: MemoryPlan
    sharding: NamedSharding


def load_model(config: EngineConfig) -> LoadedModel:
    """Loads what `config` names.

    Raises:
      ValueError: the model or a setting is not possible; the text says which and what to change.
      OSError: files are missing, damaged or out of reach.
    """
    reserved_fraction = reserve_device_memory(config.gpu_memory_utilization)
    check_backend(config.kernel_backend)
    folder, model_config = read_model_config(config)
    dtype = choose_dtype(config.dtype, model_config)
    tokenizer = None if config.skip_tokenizer_init else _load_tokenizer(config, folder)
    device = jax.devices()[0]
    sharding = replicated(make_mesh([device]))
    model = build_model(model_config, dtype)
    stats = device.memory_stats() if device.platform == "gpu" else None
    sizes = choose_sizes(config, model_config, stats["bytes_limit"] if stats else None)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    if config.load_format == "dummy":
        params = dummy_params(abstract, config.seed, sharding)
    else:
        assert folder is not None
        checkpoint = open_checkpoint(folder, config.load_format)
        params = load_params(
            checkpoint, model.weight_table(), abstract, num_layers=model_config.num_layers, sharding=sharding
        )
    weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    share = config.gpu_memory_utilization / reserved_fraction
    plan = plan_memory(
        model_config,
        dtype,
        weights_bytes=weights_bytes,
        budget_bytes=device_budget(device, share, weights_bytes),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        page_size=config.page_size,
        max_model_len=config.max_model_len,
        **sizes,
    )
    logger.info("memory plan\n%s", plan.table())
    runner_config = RunnerConfig(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_model_len=plan.max_model_len,
        kernel_backend=config.kernel_backend,
        **sizes,
    )
    return LoadedModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        runner_config=runner_config,
        memory_plan=plan,
        sharding=sharding,
    )


def read_model_config(config: EngineConfig) -> tuple[Path | None, ModelConfig]:
    """The model's folder, if it has one, and its configuration.

    With `load_format="dummy"` the model may also be the name of a shape, such as "llama-8b".
    """
    if config.load_format == "dummy" and config.model in SHAPES:
        return None, SHAPES[config.model]
    folder = resolve_model(
        config.model, revision=config.revision, download_dir=config.download_dir, hf_token=config.hf_token
    )
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} has no config.json: a folder in the Hugging Face format is needed")
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return folder, ModelConfig.from_hf({**raw, **config.hf_overrides})


def choose_dtype(wanted: str, model_config: ModelConfig) -> jnp.dtype:
    """`auto` is the checkpoint's own; float32 checkpoints run in float32 on a CPU, else in bfloat16."""
    if wanted != "auto":
        return jnp.dtype(wanted)
    if model_config.dtype == "float32" and jax.default_backend() != "cpu":
        return jnp.dtype("bfloat16")
    return jnp.dtype(model_config.dtype)


def choose_sizes(config: EngineConfig, model_config: ModelConfig, memory_bytes: int | None) -> dict[str, int]:
    """Fills in the limits that the caller left open, by the device's memory; None: a CPU.

    Raises:
      ValueError: max_model_len is beyond what the model's positions reach, or the limits contradict.
    """
    supported = model_config.max_model_len
    if (config.max_model_len or 0) > supported:
        raise ValueError(
            f"max_model_len={config.max_model_len} is beyond the {supported} positions that the model "
            "supports; lower it, or change the model's rope settings with hf_overrides"
        )
    is_large = memory_bytes is not None and memory_bytes > 60 * 2**30  # vLLM draws it at 70 GiB cards
    seqs, tokens = (16, 512) if memory_bytes is None else (1024, 16384) if is_large else (256, 8192)
    max_num_seqs = config.max_num_seqs or seqs
    max_num_batched_tokens = config.max_num_batched_tokens or max(tokens, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens={max_num_batched_tokens} must be at least max_num_seqs={max_num_seqs}, "
            "so that every running request gets its token in each step"
        )
    return {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}


def plan_without_device(config: EngineConfig, gpu: str) -> MemoryPlan:
    """The plan of an engine on a card of GPU_BYTES, made without one and without reading weights.

    Raises:
      ValueError: no such card, or as `load_model`.
    """
    if gpu not in GPU_BYTES:
        raise ValueError(f"gpu must be one of {', '.join(GPU_BYTES)}, got {gpu!r}")
    _, model_config = read_model_config(config)
    dtype = jnp.dtype(model_config.dtype if config.dtype == "auto" else config.dtype)
    if config.dtype == "auto" and dtype == jnp.float32:
        dtype = jnp.dtype("bfloat16")  # as on a GPU
    abstract = jax.eval_shape(build_model(model_config, dtype).init, jax.random.key(0))
    return plan_memory(
        model_config,
        dtype,
        weights_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)),
        budget_bytes=int(GPU_BYTES[gpu] * config.gpu_memory_utilization),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        page_size=config.page_size,
        max_model_len=config.max_model_len,
        **choose_sizes(config, model_config, GPU_BYTES[gpu]),
    )


def _load_tokenizer(config: EngineConfig, folder: Path | None) -> Tokenizer:
    if config.tokenizer is not None:
        folder = resolve_model(
            config.tokenizer,
            revision=config.tokenizer_revision,
            download_dir=config.download_dir,
            hf_token=config.hf_token,
        )
    if folder is None:
        raise ValueError("a named shape has no tokenizer: pass skip_tokenizer_init=True or tokenizer=...")
    return load_tokenizer(folder, chat_template=config.chat_template)
