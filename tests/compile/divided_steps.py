"""Programs of models that devices divide, as XLA makes them for two H200s."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from jax.stages import Compiled

from pjengine.batching import Layout
from pjengine.models.decoder import Decoder
from pjengine.models.shapes import SHAPES
from tests.compile.steps import DTYPE, Step

NUM_DEVICES = 2


@dataclasses.dataclass(frozen=True)
class DividedStep(Step):
    """One program of one model, on each device."""

    has_filters: bool = True

    @functools.cached_property
    def model(self) -> Decoder:
        return self.make_model(dataclasses.replace(SHAPES[self.shape], num_layers=2), DTYPE, NUM_DEVICES)

    @property
    def layout(self) -> Layout:
        return dataclasses.replace(super().layout, has_filters=self.has_filters)


STEPS: Mapping[str, DividedStep] = {
    "llama-8b decode 128, divided": DividedStep("llama-8b", 128, True, has_filters=False),
    "llama-8b decode 128, divided and filtered": DividedStep("llama-8b", 128, True),
}
PROGRAMS: Mapping[str, Callable[[], Compiled]] = {name: each.compile for name, each in STEPS.items()}
