"""From an EngineConfig to a model on the device: config, weights, tokenizer, sizes."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pjengine.compile_cache import fingerprint
from pjengine.config import EngineConfig, RunnerConfig, invariant_buckets, parse_length, reserve_device_memory
from pjengine.hosts import Hosts
from pjengine.memory import MemoryPlan, device_budget, plan_memory
from pjengine.models.batch_invariance import is_batch_invariant
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Decoder, Params
from pjengine.models.hf_names import read_params
from pjengine.models.hub import resolve_model
from pjengine.models.json_values import read_json_object
from pjengine.models.loader import dummy_params
from pjengine.models.pair import Pair
from pjengine.models.parameters import placed_shapes
from pjengine.models.registry import build_model, parse_config
from pjengine.models.shapes import SHAPES
from pjengine.pallas_kernels.dispatch import check_backend
from pjengine.progress import progress_bar
from pjengine.sharding.mesh import (
    AXES,
    choose_device_groups,
    choose_devices,
    make_mesh,
    own_device,
    replicated,
)
from pjengine.sharding.partition import copied
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
    weights: str = (
        ""  # tells them apart from others of the same shapes; of several hosts, and of recordings, only
    )

    @property
    def facts(self) -> dict[str, str]:
        """What must be the same on all hosts, by name."""
        sizes = {own.name: repr(getattr(self.runner_config, own.name)) for own in fields(self.runner_config)}
        return {"model": fingerprint(self.model), "weights": self.weights, **sizes}


def load_replicas(config: EngineConfig) -> list[LoadedModel]:
    """Loads what `config` names once, and copies it from device to device for each further replica.

    Raises as `load_model` does.
    """
    first = load_model(config)
    groups = choose_device_groups(config.data_parallel_size, config.tensor_parallel_size)
    for index, devices in enumerate(groups):
        logger.info("engine %d: %s", index, ", ".join(str(device) for device in devices))
    meshes = [make_mesh(devices) for devices in groups[1:]]
    return [
        first,
        *(replace(first, params=copied(first.params, own), sharding=replicated(own)) for own in meshes),
    ]


def load_model(config: EngineConfig, hosts: Hosts | None = None) -> LoadedModel:
    """Loads what `config` names, on the devices of the first replica, with a plan that all of them can hold.

    Of several hosts this loads its own part.

    Raises:
      ValueError: the model or a setting is not possible; the text says which and what to change.
      OSError: files are missing, damaged or out of reach.
    """
    reserved_fraction = reserve_device_memory(config.gpu_memory_utilization)
    check_backend(config.kernel_backend)
    folder, model_config = read_model_config(config)
    dtype = choose_dtype(config.dtype, model_config)
    tokenizer = None if config.skip_tokenizer_init else _load_tokenizer(config, folder)
    groups = choose_device_groups(config.data_parallel_size, config.tensor_parallel_size, config.nnodes)
    devices = groups[0]
    device, mesh = own_device(devices), make_mesh(devices)
    model, draft_folder = with_draft(config, build_model(model_config, dtype, len(devices)))
    stats = device.memory_stats() if device.platform == "gpu" else None
    limit = stats["bytes_limit"] if stats else None
    # Before the weights are loaded, so that what does not fit costs nothing.
    share = config.gpu_memory_utilization / reserved_fraction
    budgets = [device_budget(own_device(own), share) for own in groups]
    budget = min((own for own in budgets if own is not None), default=None)
    if hosts is not None:
        limit, budget = hosts.least(limit, budget)
    model, sizes = sized(config, model, limit)
    plan = make_plan(config, model, sizes, budget)
    logger.info("memory plan\n%s", plan.table())
    if isinstance(model, Pair) and config.draft is not None:
        params: Params = {
            "target": _load_params(config, folder, model.target, mesh),
            "draft": _load_params(config.draft, draft_folder, model.draft, mesh),
        }
    else:
        params = _load_params(config, folder, model, mesh)
    return LoadedModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        runner_config=_runner_config(
            config,
            plan,
            sizes,
            is_gpu=device.platform == "gpu",
            is_batch_invariant=model.is_batch_invariant,
        ),
        memory_plan=plan,
        sharding=replicated(mesh),
        generation_config=read_generation_config(config, folder),
        weights=weights_digest(config, folder, draft_folder) if hosts or config.record else "",
    )


def sized(config: EngineConfig, model: Decoder, memory_bytes: int | None) -> tuple[Decoder, dict[str, int]]:
    """The model, and the limits of `choose_sizes`: batch-invariant where decodes of these sizes can be.

    Raises as `choose_sizes` does.
    """
    if config.deterministic:
        sizes = choose_sizes(config, model.config, memory_bytes, is_batch_invariant=True)
        counts = invariant_buckets(sizes["max_num_seqs"])
        num_pages = -(-int(config.max_model_len or model.config.max_model_len) // config.page_size)
        slots = num_pages * config.page_size
        if is_batch_invariant(model, counts, max_slots=slots, backend=config.kernel_backend):
            logger.info("deterministic: decodes in steps of %s rows", ", ".join(map(str, counts)))
            return replace(model, is_batch_invariant=True), sizes
        logger.info("deterministic: all decodes in steps of one size")
    return model, choose_sizes(config, model.config, memory_bytes)


def _runner_config(
    config: EngineConfig, plan: MemoryPlan, sizes: dict[str, int], *, is_gpu: bool, is_batch_invariant: bool
) -> RunnerConfig:
    decode_steps = 1 if config.deterministic else config.decode_steps
    return RunnerConfig(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_model_len=plan.max_model_len,
        max_prompt_logprob_tokens=plan.max_prompt_logprob_tokens,
        max_states=plan.max_states,
        decode_steps=choose_decode_steps(decode_steps, plan.weights_bytes, is_gpu=is_gpu),
        kernel_backend=config.kernel_backend,
        disable_custom_all_reduce=config.disable_custom_all_reduce,
        window_group=plan.window_group,
        speculation=config.speculation,
        is_deterministic=config.deterministic,
        is_batch_invariant=is_batch_invariant,
        waits_for_programs=config.record is not None,
        **sizes,
    )


def load_alone(config: EngineConfig) -> tuple[Decoder, Params]:
    """The model that `config` names and its parameters on the first device, without what an engine adds.

    Raises as `load_model` does.
    """
    folder, model_config = read_model_config(config)
    model = build_model(model_config, choose_dtype(config.dtype, model_config), 1)
    return model, _load_params(config, folder, model, make_mesh(choose_devices(1)))


def weights_digest(config: EngineConfig, folder: Path | None, draft_folder: Path | None = None) -> str:
    """What hosts compare of the weights that they read: the model's, and the draft model's."""
    if config.load_format == "dummy":
        own = f"dummy of seed {config.seed}"
    else:
        assert folder is not None
        own = open_checkpoint(folder, config.load_format).digest()
    if config.draft is None:
        return own
    return f"{own} with {weights_digest(config.draft, draft_folder)}"


def with_draft(
    config: EngineConfig, model: Decoder, *, needs_weights: bool = True
) -> tuple[Decoder, Path | None]:
    """The model, paired with the draft model that `config` names, if it does; and that one's folder.

    Raises:
      ValueError: they have different vocabularies; or as `read_model_config`.
    """
    if config.draft is None:
        return model, None
    folder, draft = read_model_config(config.draft, needs_weights=needs_weights)
    if draft.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft model {config.draft.model!r} has a vocabulary of {draft.vocab_size} tokens, and the "
            f"model one of {model.config.vocab_size}: name a draft model with the same vocabulary"
        )
    return Pair.of(model, build_model(draft, model.dtype, model.num_devices)), folder


def make_plan(
    config: EngineConfig, model: Decoder, sizes: dict[str, int], budget_bytes: int | None
) -> MemoryPlan:
    """The memory plan of an engine with this model, or pair of models; reads no weights.

    Raises:
      ValueError: as `plan_memory`; or requests may be longer than the draft model's positions.
    """
    draft = model.draft if isinstance(model, Pair) else None
    plan = plan_memory(
        _planned(model),
        model.dtype,
        weights_bytes=_weights_bytes(model),
        budget_bytes=budget_bytes,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        page_size=config.page_size,
        max_model_len=parse_length(config.max_model_len),
        max_logprobs=config.max_logprobs,
        speculation=config.speculation,
        draft=None if draft is None else _planned(draft),
        **sizes,
    )
    if draft is None:
        return plan
    if draft.config.has_learned_positions and plan.max_model_len > draft.config.max_model_len:
        raise ValueError(
            f"max_model_len={plan.max_model_len} is beyond the {draft.config.max_model_len} positions of the "
            "draft model: lower it, or name another draft model"
        )
    return replace(plan, draft_weights_bytes=_weights_bytes(draft))


def _planned(model: Decoder) -> ModelConfig:
    """What each device computes. Logits are gathered: every one has those of the whole vocabulary."""
    return replace(model.own, vocab_size=model.config.vocab_size)


def _weights_bytes(model: Decoder) -> int:
    """What the parameters take on each device."""
    if isinstance(model, Pair):
        return _weights_bytes(model.target) + _weights_bytes(model.draft)
    parts = placed_shapes(model, AbstractMesh((1, model.num_devices), AXES))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(parts)
    )


def _load_params(config: EngineConfig, folder: Path | None, model: Decoder, mesh: Mesh) -> Params:
    if config.load_format == "dummy":
        return dummy_params(placed_shapes(model, mesh), config.seed)
    assert folder is not None
    checkpoint = open_checkpoint(folder, config.load_format)
    with progress_bar("Loading weights", unit=" layers", is_shown=config.use_tqdm_on_load) as show:
        return read_params(model, checkpoint, mesh, show)


def read_generation_config(config: EngineConfig, folder: Path | None) -> Mapping[str, Any]:
    """What the model's generation_config.json holds; nothing without the file, or if it shall not count."""
    path = None if folder is None else folder / "generation_config.json"
    if path is None or config.generation_config == "vllm" or not path.is_file():
        return {}
    return read_json_object(path)


def read_model_config(config: EngineConfig, *, needs_weights: bool = True) -> tuple[Path | None, ModelConfig]:
    """The model's folder, if it has one, and its configuration.

    With `load_format="dummy"` the model may also be the name of a shape, such as "llama-8b".

    Raises:
      ValueError: as `parse_config`; or the model has no experts to be divided as `config` wants.
      OSError: files are missing, damaged or out of reach.
    """
    if config.load_format == "dummy" and config.model in SHAPES:
        return None, _with_experts(config, SHAPES[config.model])
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
    return folder, _with_experts(config, parse_config({**raw, **config.hf_overrides}))


def _with_experts(config: EngineConfig, model: ModelConfig) -> ModelConfig:
    """The model, its experts to be divided among devices as `config` says.

    Raises:
      ValueError: as whole ones, and it has none.
    """
    if not config.enable_expert_parallel:
        return model
    if model.experts is None:
        raise ValueError(
            f"enable_expert_parallel=True wants a mixture of experts, and {config.model!r} has none "
            f"({model.architecture}): leave it out, its layers are divided all the same"
        )
    return replace(model, experts=replace(model.experts, is_whole=True))


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
