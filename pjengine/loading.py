"""From an EngineConfig to a model on the device: config, weights, tokenizer, sizes."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from pjengine.config import EngineConfig, RunnerConfig, parse_length, reserve_device_memory
from pjengine.memory import MemoryPlan, device_budget, plan_memory
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Decoder, Params
from pjengine.models.hub import resolve_model
from pjengine.models.json_values import read_json_object
from pjengine.models.loader import dummy_params, load_params
from pjengine.models.registry import build_model, parse_config
from pjengine.models.shapes import SHAPES
from pjengine.models.share import widen
from pjengine.pallas_kernels.dispatch import check_backend
from pjengine.progress import progress_bar
from pjengine.sharding.mesh import choose_devices, make_mesh, replicated
from pjengine.sharding.partition import placed
from pjengine.sizing import choose_decode_steps, choose_dtype, choose_sizes
from pjengine.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """All that an engine is made of."""

    model: Decoder
    params: Params
    tokenizer: Tokenizer | None
    runner_config: RunnerConfig
    memory_plan: MemoryPlan
    sharding: NamedSharding  # of what every device has
    generation_config: Mapping[str, Any]  # what generation_config.json holds, if it counts


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
    devices = choose_devices(config.tensor_parallel_size)
    device, mesh = devices[0], make_mesh(devices)
    model = build_model(model_config, dtype, len(devices))
    stats = device.memory_stats() if device.platform == "gpu" else None
    sizes = choose_sizes(config, model_config, stats["bytes_limit"] if stats else None)
    abstract = placed(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    # Logits are gathered: every device has those of the whole vocabulary.
    planned = dataclasses.replace(model.own, vocab_size=model_config.vocab_size)
    # Before the weights are loaded, so that what does not fit costs nothing.
    share = config.gpu_memory_utilization / reserved_fraction
    plan = plan_memory(
        planned,
        dtype,
        weights_bytes=bytes_of_one_device(abstract),
        budget_bytes=device_budget(device, share),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        page_size=config.page_size,
        max_model_len=parse_length(config.max_model_len),
        max_logprobs=config.max_logprobs,
        speculation=config.speculation,
        **sizes,
    )
    logger.info("memory plan\n%s", plan.table())
    params = _load_params(config, folder, model, abstract)
    runner_config = RunnerConfig(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_model_len=plan.max_model_len,
        max_prompt_logprob_tokens=plan.max_prompt_logprob_tokens,
        max_states=plan.max_states,
        decode_steps=choose_decode_steps(
            config.decode_steps, plan.weights_bytes, is_gpu=device.platform == "gpu"
        ),
        kernel_backend=config.kernel_backend,
        window_group=plan.window_group,
        speculation=config.speculation,
        **sizes,
    )
    return LoadedModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        runner_config=runner_config,
        memory_plan=plan,
        sharding=replicated(mesh),
        generation_config=read_generation_config(config, folder),
    )


def bytes_of_one_device(abstract: Mapping[str, Any]) -> int:
    """What the parameters take on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def _load_params(
    config: EngineConfig,
    folder: Path | None,
    model: Decoder,
    abstract: Mapping[str, Any],
) -> Params:
    if config.load_format == "dummy":
        return dummy_params(abstract, config.seed)
    assert folder is not None
    checkpoint = open_checkpoint(folder, config.load_format)
    undivided = dataclasses.replace(model, num_devices=1)
    with progress_bar("Loading weights", unit=" layers", is_shown=config.use_tqdm_on_load) as show:
        return load_params(
            checkpoint,
            model.weight_table(),
            jax.eval_shape(undivided.init, jax.random.key(0)),
            num_layers=model.config.num_layers,
            stored=abstract,
            widen=partial(widen, config=model.config, num_devices=model.num_devices),
            show=show,
        )


def read_generation_config(config: EngineConfig, folder: Path | None) -> Mapping[str, Any]:
    """What the model's generation_config.json holds; nothing without the file, or if it shall not count."""
    path = None if folder is None else folder / "generation_config.json"
    if path is None or config.generation_config == "vllm" or not path.is_file():
        return {}
    return read_json_object(path)


def read_model_config(config: EngineConfig, *, needs_weights: bool = True) -> tuple[Path | None, ModelConfig]:
    """The model's folder, if it has one, and its configuration.

    With `load_format="dummy"` the model may also be the name of a shape, such as "llama-8b".
    """
    if config.load_format == "dummy" and config.model in SHAPES:
        return None, SHAPES[config.model]
    folder = resolve_model(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        hf_token=config.hf_token,
        load_format=config.load_format,
        needs_weights=needs_weights and config.load_format != "dummy",
    )
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} has no config.json: a folder in the Hugging Face format is needed")
    raw = read_json_object(path)
    return folder, parse_config({**raw, **config.hf_overrides})


def _load_tokenizer(config: EngineConfig, folder: Path | None) -> Tokenizer:
    if config.tokenizer is not None:
        folder = resolve_model(
            config.tokenizer,
            revision=config.tokenizer_revision,
            download_dir=config.download_dir,
            hf_token=config.hf_token,
            needs_weights=False,
            needs_config=False,
        )
    if folder is None:
        raise ValueError("a named shape has no tokenizer: pass skip_tokenizer_init=True or tokenizer=...")
    return load_tokenizer(folder, chat_template=config.chat_template)
