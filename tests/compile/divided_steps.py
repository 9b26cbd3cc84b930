"""Programs of models that devices divide, as XLA makes them for two H200s, and draws, as for one too."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.stages import Compiled

from pjengine.batching import Layout
from pjengine.draw import DrawLayout
from pjengine.edit_sizes import EditSizes
from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Decoder
from pjengine.models.registry import build_model
from tests.compile.steps import DETERMINISTIC, Step

NUM_DEVICES = 2


def divided(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    return build_model(config, dtype, NUM_DEVICES)


@dataclasses.dataclass(frozen=True)
class DividedStep(Step):
    """One program of one model, on each device."""

    has_filters: bool = True
    make_model: Callable[..., Decoder] = divided

    @property
    def layout(self) -> Layout:
        return dataclasses.replace(super().layout, has_filters=self.has_filters)


STEPS: Mapping[str, DividedStep] = {
    "llama-8b decode 8, divided": DividedStep("llama-8b", 8, True, has_filters=False),
    "llama-8b decode 128, divided": DividedStep("llama-8b", 128, True, has_filters=False),
    "llama-8b decode 128, divided and filtered": DividedStep("llama-8b", 128, True),
    "llama-8b decode 128, divided without inboxes": DividedStep(
        "llama-8b", 128, True, has_filters=False, has_inboxes=False
    ),
}
DRAWN_AFTER: Mapping[str, Step] = {
    "one H200": DETERMINISTIC,
    "two": DividedStep("llama-8b", 256, True, ends_in_logits=True, is_deterministic=True),
}
DRAW_EDITS: Mapping[str, EditSizes] = {
    "logprobs": EditSizes(num_top=2),
    "penalties too": EditSizes(num_top=2, num_asked=1, has_penalties=True),
    "biases too": EditSizes(num_top=2, num_bias=2),
}
DRAWS: Mapping[str, Callable[[], Compiled]] = {
    f"llama-8b draw with {what} on {where}": functools.partial(step.compile, draw=DrawLayout(256, edits))
    for where, step in DRAWN_AFTER.items()
    for what, edits in DRAW_EDITS.items()
}
PROGRAMS: Mapping[str, Callable[[], Compiled]] = {
    **{name: each.compile for name, each in STEPS.items()},
    **DRAWS,
}
