"""Programs of models that devices divide, as XLA makes them for two H200s."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.stages import Compiled

from pjengine.batching import Layout, Rows
from pjengine.models.decoder import Decoder, Params
from pjengine.models.shapes import SHAPES
from pjengine.models.share import padded
from pjengine.models.state import KVCache, kv_shape
from pjengine.sharding.partition import KV_PAGES, placed
from tests.compile.steps import DTYPE, PAGE_SIZE, Step
from tests.compile.target import sharding

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

    @property
    def sharding(self) -> NamedSharding:
        return sharding(NUM_DEVICES)

    def placed(self, sharding: NamedSharding) -> tuple[Params, KVCache, Rows]:
        params, cache, rows = self.state()

        def on_each(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        shape = kv_shape(padded(self.model.config, NUM_DEVICES), self.config.num_pages, PAGE_SIZE, None)
        kv: Any = jax.ShapeDtypeStruct(shape, DTYPE, sharding=NamedSharding(sharding.mesh, KV_PAGES))
        return (
            placed(params, sharding.mesh),
            KVCache(kv, kv, on_each(cache.token_ids)),
            jax.tree.map(on_each, rows),
        )


STEPS: Mapping[str, DividedStep] = {
    "llama-8b decode 128, divided": DividedStep("llama-8b", 128, True, has_filters=False),
    "llama-8b decode 128, divided and filtered": DividedStep("llama-8b", 128, True),
}
PROGRAMS: Mapping[str, Callable[[], Compiled]] = {name: each.compile for name, each in STEPS.items()}
