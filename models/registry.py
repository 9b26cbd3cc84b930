"""Hugging Face architecture name -> the class that runs it."""

import jax.numpy as jnp

from pjengine.models.config import ModelConfig
from pjengine.models.llama import Llama

ARCHITECTURES: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "LLaMAForCausalLM": Llama,  # the spelling of the first converted checkpoints
}


def build_model(config: ModelConfig, dtype: jnp.dtype) -> Llama:
    """The model that `config` names.

    Raises:
      ValueError: no such architecture here.
    """
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"architecture {config.architecture!r} is not supported; supported: {known}")
    return ARCHITECTURES[config.architecture](config, dtype)
