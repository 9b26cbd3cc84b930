"""Granite: Llama's form with factors on embeddings, scores, residuals and logits.

Source: Granite Team 2024; parameter names of Hugging Face's `GraniteForCausalLM`.
"""

import dataclasses

from pjengine.models.config import ModelConfig
from pjengine.models.config_reader import ConfigReader
from pjengine.models.json_values import POSITIVE
from pjengine.models.llama import Llama


class Granite(Llama):
    @staticmethod
    def read_config(reader: ConfigReader) -> ModelConfig:
        return dataclasses.replace(
            Llama.read_config(reader),
            embedding_scale=reader.number("embedding_multiplier", default=1.0),
            attention_scale=reader.number("attention_multiplier", default=1.0),
            residual_scale=reader.number("residual_multiplier", default=1.0),
            logit_scale=1 / reader.number("logits_scaling", default=1.0, wanted=POSITIVE),
        )
