"""Hugging Face architecture name -> the class that reads its config and runs it."""

import importlib
import reprlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pjengine.models.block import Block
from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader, refuse_unread
from pjengine.models.decoder import Decoder
from pjengine.models.json_values import TEXTS, check_values
from pjengine.models.pair import Pair

# "module.Class" within this package, imported when it is first asked for.
_OURS: Mapping[str, str] = {
    "BaiChuanForCausalLM": "baichuan.Baichuan",  # of 7B, the first one
    "BaichuanForCausalLM": "baichuan.Baichuan",
    "BloomForCausalLM": "bloom.Bloom",
    "Cohere2ForCausalLM": "cohere.Cohere2",
    "CohereForCausalLM": "cohere.Cohere",
    "FalconForCausalLM": "falcon.Falcon",
    "Gemma2ForCausalLM": "gemma2.Gemma2",
    "Gemma3ForCausalLM": "gemma3.Gemma3",
    "GemmaForCausalLM": "gemma.Gemma",
    "Glm4ForCausalLM": "glm.Glm4",
    "GlmForCausalLM": "glm.Glm",
    "GPT2LMHeadModel": "gpt2.GPT2",
    "GPTBigCodeForCausalLM": "gpt_bigcode.GPTBigCode",
    "GPTJForCausalLM": "gptj.GPTJ",
    "GPTNeoXForCausalLM": "gpt_neox.GPTNeoX",
    "GptOssForCausalLM": "gpt_oss.GptOss",
    "GraniteForCausalLM": "granite.Granite",
    "LlamaForCausalLM": "llama.Llama",
    "MistralForCausalLM": "mistral.Mistral",
    "MixtralForCausalLM": "mixtral.Mixtral",
    "MptForCausalLM": "mpt.MPT",
    "Olmo2ForCausalLM": "olmo2.Olmo2",
    "OPTForCausalLM": "opt.OPT",
    "Phi3ForCausalLM": "phi3.Phi3",
    "PhiForCausalLM": "phi.Phi",
    "Qwen2ForCausalLM": "qwen2.Qwen2",
    "Qwen3ForCausalLM": "qwen3.Qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe.Qwen3Moe",
    "SmolLM3ForCausalLM": "smollm3.SmolLM3",
    "StableLmForCausalLM": "stablelm.StableLM",
    "Starcoder2ForCausalLM": "starcoder2.Starcoder2",
}
# What the first checkpoints of an architecture call it -> its name here.
OLD_NAMES: Mapping[str, str] = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
}
_registered: dict[str, type[Decoder]] = {}


def register(name: str, architecture: type) -> None:
    """Makes checkpoints whose config.json names the architecture `name` run as `architecture`.

    A name that the package knows already is run by the new class from now on.

    Raises:
      TypeError: it is not a subclass of `Decoder`.
    """
    if not issubclass(architecture, Decoder):
        raise TypeError(f"an architecture must be a subclass of Decoder, got {architecture!r}")
    _registered[name] = architecture


def known_architectures() -> list[str]:
    return sorted({*_OURS, *OLD_NAMES, *_registered})


def architecture(name: str) -> type[Decoder]:
    """The class of an architecture.

    Raises:
      ValueError: no such architecture here.
    """
    for spelling in (name, OLD_NAMES.get(name, name)):
        if spelling in _registered:
            return _registered[spelling]
    name = OLD_NAMES.get(name, name)
    if name not in _OURS:
        raise ValueError(
            f"architecture {name!r} is not supported; supported: {', '.join(known_architectures())}"
        )
    module, _, attribute = _OURS[name].rpartition(".")
    found: type[Decoder] = getattr(importlib.import_module(f"pjengine.models.{module}"), attribute)
    return found


def is_ours(model: Decoder) -> bool:
    """Whether the model is this package's alone, its layers too."""
    if isinstance(model, Pair):
        return is_ours(model.target) and is_ours(model.draft)
    classes = [*type(model).__mro__, *type(model).block.__mro__]
    own = [each for each in classes if issubclass(each, Decoder | Block)]
    return all(each.__module__.startswith("pjengine.") for each in own)


def build_model(config: ModelConfig, dtype: jnp.dtype, num_devices: int = 1) -> Decoder:
    """The model that `config` names, to be computed by so many devices together.

    Raises:
      ValueError: no such architecture here.
    """
    return architecture(config.architecture)(config, dtype, num_devices=num_devices)


def parse_config(config: object) -> ModelConfig:
    """Reads a config.json, as transformers 4 wrote it or as transformers 5 writes it.

    Raises:
      ValueError: it is no mapping; a key is missing, holds a value of the wrong type, or is neither
        handled nor known to be irrelevant; or the architecture is unknown.
      NotImplementedError: the config asks for something this engine does not do.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json must hold a JSON object, got {reprlib.repr(config)}")
    check_values(config, {"architectures": TEXTS})
    names: list[Any] = list(config.get("architectures") or ())
    known = known_architectures()
    name = next((name for name in names if name in known), None)
    if name is None:
        raise ValueError(
            f"config.json must name one of the architectures {', '.join(known)}, "
            f"got architectures={reprlib.repr(names)}"
        )
    reader = ConfigReader(config, name if name in _registered else OLD_NAMES.get(name, name))
    found = architecture(name).read_config(reader)
    refuse_unread(reader)
    return found
