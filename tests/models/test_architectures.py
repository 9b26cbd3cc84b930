"""Every architecture against what transformers computes: logits, and tokens through the whole engine."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine import models
from pjengine.models import registry
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.decoder import Decoder
from pjengine.models.llama import Llama
from pjengine.models.loader import load_params
from pjengine.models.registry import build_model, known_architectures, parse_config
from tests.golden import golden as goldens
from tests.models.published import PUBLISHED
from tests.models.torch_file import write_torch_file

# Golden case -> the architecture's name here.
CASES = {
    name: registry.OLD_NAMES.get(architecture, architecture)
    for name, architecture in goldens.CASES.items()
    if architecture in known_architectures()
}
FIRST = [names[0] for names in goldens.BY_ARCHITECTURE.values() if names[0] in CASES]  # of each architecture
# Those that `make test` generates with, and further ones of CI: the first of each architecture, windows and
# rotary positions that depend on the length. The logits of all others are compared in CI, too.
QUICK = {"mha", "gpt2", "bloom", "falcon_mqa", "gemma2", "gpt_oss", "mixtral", "qwen3"}
IN_CI = {*FIRST, "dynamic", "dynamic_growing", "phi3_longrope_long", "yarn", "mistral_window", "qwen2_window"}
ON_GPU = ["mqa", "mha", "yarn", *FIRST]
FLOAT32 = jnp.dtype("float32")


def load(folder: Path, config: dict[str, Any]) -> tuple[Decoder, Any]:
    model = build_model(parse_config(config), FLOAT32)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    table, num_layers = model.weight_table(), model.config.num_layers
    return model, load_params(open_checkpoint(folder), table, abstract, num_layers=num_layers)


def last_logits(model: Decoder, params: Any, golden: goldens.Golden) -> np.ndarray:
    logits = jax.jit(model.forward)(params, jnp.asarray([golden.prompt], jnp.int32))
    return np.asarray(logits)[0, -4:, : golden.last_logits.shape[1]]


def assert_logits(model: Decoder, params: Any, golden: goldens.Golden) -> None:
    np.testing.assert_allclose(last_logits(model, params, golden), golden.last_logits, atol=2e-4, rtol=0)


def test_every_architecture_has_golden_cases_and_a_published_size() -> None:
    architectures = set(known_architectures()) - set(registry.OLD_NAMES)
    assert architectures == set(CASES.values())
    assert architectures == set(PUBLISHED)


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_forward_equals_transformers(name: str, tmp_path: Path) -> None:
    """From torch's own file, names without their prefix and with the buffers that old versions stored."""
    golden = goldens.load(name)
    weights = golden.weights()
    prefixes = build_model(parse_config(golden.config), FLOAT32).weight_table().prefixes
    for prefix in prefixes:
        weights = {key.removeprefix(prefix): array for key, array in weights.items()}
    weights |= dict.fromkeys(PUBLISHED[CASES[name]].buffers, np.ones((1, 1), np.float32))
    write_torch_file(tmp_path / "pytorch_model.bin", weights)
    model, params = load(tmp_path, golden.config_v4)
    assert_logits(model, params, golden)


@pytest.mark.parametrize(
    "name",
    [
        *(
            name
            if name in QUICK
            else pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.sweep)
            for name in CASES
        ),
        *(pytest.param(name, marks=pytest.mark.gpu, id=f"gpu-{name}") for name in ON_GPU),
    ],
)
def test_the_engine_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    """From safetensors; the prompt in chunks, then again with its pages in the prefix cache."""
    from pjengine import LLM, SamplingParams

    golden = goldens.load(name)
    goldens.write_checkpoint(golden, tmp_path)
    sizes: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "warm_up": False}
    # Nobody needs these programs again, and to store them would take a fifth of the time.
    sizes |= {"skip_tokenizer_init": True, "compile_cache_dir": ""}
    params = SamplingParams(temperature=0, max_tokens=len(golden.tokens), ignore_eos=True)
    assert len(golden.prompt) > 32  # several chunks, and pages to share
    with LLM(tmp_path, dtype="float32", **sizes) as llm:
        [first] = llm.generate([golden.prompt], params, use_tqdm=False)
        [again] = llm.generate([golden.prompt], params, use_tqdm=False)
    assert first.outputs[0].token_ids == golden.tokens
    assert again.outputs[0].token_ids == golden.tokens
    assert again.num_cached_tokens >= 32


@pytest.mark.parametrize("name", CASES)
def test_both_forms_of_config_json_mean_the_same(name: str) -> None:
    golden = goldens.load(name)
    assert parse_config(golden.config) == parse_config(golden.config_v4)


SIZES = {
    name: ({"architectures": [architecture], **config}, count)
    for architecture, published in PUBLISHED.items()
    for name, (config, count) in published.sizes.items()
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_models_have_the_published_number_of_parameters(name: str) -> None:
    config, published = SIZES[name]
    model = build_model(parse_config(config), jnp.dtype("bfloat16"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == published


def changes(kind: str) -> list[Any]:
    """(architecture, changed fields, message), by what is changed."""
    return [
        pytest.param(name, fields, message, id=f"{name}-{'-'.join(fields)}")
        for name, published in PUBLISHED.items()
        for fields, message in getattr(published, kind)
    ]


def changed(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {**goldens.load(goldens.BY_ARCHITECTURE[architecture][0]).config, **fields}


@pytest.mark.parametrize(("architecture", "fields", "message"), changes("unsupported"))
def test_unsupported_flags_are_refused_by_name(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        parse_config(changed(architecture, fields))


@pytest.mark.parametrize(("architecture", "fields", "message"), changes("wrong"))
def test_what_contradicts_or_is_unknown_is_named(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(changed(architecture, fields))


def test_learned_positions_are_a_hard_limit(tmp_path: Path) -> None:
    from pjengine import LLM

    goldens.write_checkpoint(goldens.load("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="max_model_len=97 is beyond the 96 positions"):
        LLM(tmp_path, max_model_len=97, skip_tokenizer_init=True, warm_up=False)


class Doubled(Llama):
    """Llama whose config.json may scale the embeddings."""

    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        scale = reader.number("embedding_multiplier", default=1.0)
        return dataclasses.replace(Llama.read_config(reader), embedding_scale=scale)


def test_an_architecture_from_outside_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    golden = goldens.load("gqa")
    config = {**golden.config, "architectures": ["DoubledForCausalLM"], "embedding_multiplier": 1.0}
    with pytest.raises(ValueError, match=r"one of the architectures .*LlamaForCausalLM"):
        parse_config(config)
    models.register("DoubledForCausalLM", Doubled)
    goldens.write_checkpoint(golden, tmp_path)
    model, params = load(tmp_path, config)
    assert isinstance(model, Doubled)
    assert_logits(model, params, golden)
    model, params = load(tmp_path, {**config, "embedding_multiplier": 2.0})
    assert np.abs(last_logits(model, params, golden) - golden.last_logits).max() > 0.1
    with pytest.raises(TypeError, match="must be a subclass of Decoder, got <class 'str'>"):
        models.register("OtherForCausalLM", str)


def test_a_registered_class_runs_old_spellings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    models.register("MptForCausalLM", Doubled)
    assert registry.architecture("MPTForCausalLM") is registry.architecture("MptForCausalLM") is Doubled
