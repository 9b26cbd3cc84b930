"""The engine's programs as its compiler makes them, of models as wide as real ones and two layers deep."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from pjengine.batching import Layout, Rows
from pjengine.config import RunnerConfig
from pjengine.draw import DrawLayout
from pjengine.edit_sizes import EditSizes
from pjengine.models.config import ModelConfig
from pjengine.models.decoder import Decoder, Params
from pjengine.models.llama import Llama
from pjengine.models.pair import empty_cache
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from pjengine.models.state import KVCache, page_bytes
from pjengine.models.window_group import WindowGroup
from pjengine.sharding.mesh import AXES, TENSOR
from pjengine.sharding.partition import KV_PAGES, placed
from pjengine.speculation_config import SpeculationConfig
from pjengine.step import step
from pjengine.step_compiler import COMPILER_OPTIONS, StepCompiler
from tests.compile.target import sharding
from tests.kernels.cases import cuda_target

PAGE_SIZE, MAX_NUM_SEQS, DTYPE = 16, 256, jnp.dtype("bfloat16")
DRAFTING = SpeculationConfig(num_drafts=4, lookup_min=2, lookup_max=5)
KV_BYTES = 96 * 2**30  # of an H200's 141 GB: there is no room for a second one


@dataclasses.dataclass(frozen=True)
class Step:
    """One program of one model."""

    shape: str
    num_tokens: int
    is_decode: bool
    depth: int = 1
    ends_in_logits: bool = False
    num_prompt_top: int | None = None
    num_states: int = 0
    num_drafts: int = 0
    make_model: Callable[..., Decoder] = build_model
    has_inboxes: bool = True  # where devices sum
    is_deterministic: bool = False  # then batch-invariant too

    @functools.cached_property
    def model(self) -> Decoder:
        model = self.make_model(dataclasses.replace(SHAPES[self.shape], num_layers=2), DTYPE)
        return dataclasses.replace(model, is_batch_invariant=self.is_deterministic)

    @property
    def own(self) -> ModelConfig:
        """What one device computes; logits are gathered."""
        return dataclasses.replace(self.model.own, vocab_size=self.model.config.vocab_size)

    @property
    def layout(self) -> Layout:
        num_groups = self.config.num_groups
        return Layout(
            self.num_tokens, MAX_NUM_SEQS, PAGE_SIZE, self.is_decode, self.depth, num_groups,
            self.ends_in_logits, self.num_prompt_top, self.num_states, self.num_states > 0, self.num_drafts,
        )  # fmt: skip

    @property
    def config(self) -> RunnerConfig:
        model = self.own
        num_pages = KV_BYTES // page_bytes(model, PAGE_SIZE, DTYPE)
        group, windows = None, model.windowed_layers(model.max_model_len)
        if windows:
            group = WindowGroup(layers=tuple(windows), window=max(windows.values()), num_pages=num_pages)
        return RunnerConfig(
            num_pages=num_pages,
            window_group=group,
            page_size=PAGE_SIZE,
            max_model_len=model.max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=1024,
            speculation=DRAFTING if self.num_drafts else None,
            is_deterministic=self.is_deterministic,
            is_batch_invariant=self.is_deterministic,
        )

    def state(self) -> tuple[Params, KVCache, Rows]:
        """Shapes of the parameters, and of what is donated, the cache and the rows, on each device."""

        def own(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

        return jax.tree.map(own, self.placed_state(AbstractMesh((1, self.model.num_devices), AXES)))

    def placed_state(self, mesh: Mesh | AbstractMesh) -> tuple[Params, KVCache, Rows]:
        """The same on all devices together, and how it is divided."""
        config = self.config

        def make() -> tuple[Params, KVCache, Rows]:
            cache = empty_cache(self.model, config.num_pages, PAGE_SIZE, config.window_group)
            rows = Rows.empty(MAX_NUM_SEQS, config.num_groups * config.pages_per_seq)
            return self.model.init(jax.random.key(0)), cache, rows

        def place(leaf: Any, *axes: str | None) -> Any:
            return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        params, cache, rows = jax.eval_shape(make)
        params = placed(params, mesh, has_whole_experts=self.model.config.has_whole_experts)
        cache = KVCache(place(cache.k, *KV_PAGES), place(cache.v, *KV_PAGES), place(cache.token_ids))
        if self.has_inboxes and (num := self.model.num_devices) > 1:
            tables = jax.ShapeDtypeStruct((num, num + 2, 2), jnp.uint32)
            cache = cache._replace(inboxes=place(tables, TENSOR))
        return params, cache, jax.tree.map(place, rows)

    def compile(
        self, make: Callable[..., StepCompiler] = StepCompiler, draw: DrawLayout | None = None
    ) -> Compiled:
        """The program with the model, or `draw`."""
        everywhere = sharding(self.model.num_devices)
        compiler = make(self.model, self.config, self.placed_state(everywhere.mesh), everywhere, None)
        layout = draw or self.layout
        with cuda_target():
            lowered = compiler.lower(layout)
        return compiler.compile(layout, lowered)


def with_whole_experts(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """On two devices, each of which has half of the experts."""
    assert config.experts is not None
    experts = dataclasses.replace(config.experts, is_whole=True)
    return build_model(dataclasses.replace(config, experts=experts), dtype, 2)


class Undonated(StepCompiler):
    """Forgets to donate."""

    def lower(self, layout: Layout | DrawLayout) -> Lowered:
        return jax.jit(functools.partial(step, **self._settings(layout))).lower(*self._arguments(layout))


class Plain(StepCompiler):
    """Forgets its options for XLA."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.options == COMPILER_OPTIONS["gpu"]
        self.options = {}


class Sliced(Llama):
    """Takes every layer's weights out of the stack."""

    def run(self, params: Params, *args: Any) -> Any:
        def cut(stack: jax.Array) -> jax.Array:
            return jnp.stack([jax.lax.optimization_barrier(layer) for layer in stack])

        return super().run({**params, "layers": jax.tree.map(cut, params["layers"])}, *args)


EDITS = EditSizes(
    num_bias=16,
    num_allowed=16,
    num_bad_words=4,
    num_masks=64,
    mask_words=SHAPES["llama-8b"].vocab_size // 32,
    bad_word_len=4,
    has_penalties=True,
    num_top=32,
    num_asked=4,
)
STEPS: Mapping[str, Step] = {
    # One of each kind of products: cut for few rows, cut for more, XLA's.
    "llama-8b decode 1": Step("llama-8b", 1, True),
    "llama-8b decode 32": Step("llama-8b", 32, True),
    "llama-8b decode 128": Step("llama-8b", 128, True),
    "llama-8b decode 256": Step("llama-8b", 256, True),
    "llama-8b decode 32 to logits": Step("llama-8b", 32, True, ends_in_logits=True),
    "llama-8b decode 4 with drafts": Step("llama-8b", 4, True, num_drafts=4),
    "llama-8b mixed 1024": Step("llama-8b", 1024, False),
    # Soft caps, windows and heads of 256.
    "gemma2-9b decode 1": Step("gemma2-9b", 1, True),
    # Biases behind every product; and two products that read the same.
    "bloom-7b decode 32": Step("bloom-7b", 32, True),
    "falcon-7b decode 1": Step("falcon-7b", 1, True),
    # Experts, planned by a kernel and by XLA. 768: of more or fewer, pairs have as many elements as a weight.
    "qwen3-30b-a3b decode 32": Step("qwen3-30b-a3b", 32, True),
    "qwen3-30b-a3b mixed 768": Step("qwen3-30b-a3b", 768, False),
    "qwen3-30b-a3b decode 32 on two": Step("qwen3-30b-a3b", 32, True, make_model=with_whole_experts),
    "qwen3-30b-a3b mixed 768 on two": Step("qwen3-30b-a3b", 768, False, make_model=with_whole_experts),
    "opt-125m-llama decode 32 times 4": Step("opt-125m-llama", 32, True, depth=4),
    "opt-125m-llama mixed 1024": Step("opt-125m-llama", 1024, False),
    "opt-125m-llama mixed 32 to logits": Step(
        "opt-125m-llama", 32, False, ends_in_logits=True, num_prompt_top=32, num_states=2
    ),
}
DRAW = DrawLayout(64, EDITS)
DETERMINISTIC = Step("llama-8b", 256, True, ends_in_logits=True, is_deterministic=True)
DRAW_WITH_LOGPROBS = DrawLayout(256, EditSizes(num_top=2, num_asked=1))
BEAMS = DrawLayout(8, EditSizes(num_beams=8, num_beam_searches=1, beam_width=8, num_beam_ends=4))
PROGRAMS: Mapping[str, Callable[[], Compiled]] = {
    **{name: each.compile for name, each in STEPS.items()},
    "llama-8b draw 64": functools.partial(STEPS["llama-8b decode 32 to logits"].compile, draw=DRAW),
    "llama-8b decode 256, deterministic": DETERMINISTIC.compile,
    "llama-8b draw 256, deterministic": functools.partial(DETERMINISTIC.compile, draw=DRAW_WITH_LOGPROBS),
    "llama-8b draw 8 beams": functools.partial(STEPS["llama-8b decode 32 to logits"].compile, draw=BEAMS),
}
WRONG_STEPS: Mapping[str, Step] = {
    "undonated": Step("opt-125m-llama", 1, True),
    "plain": Step("opt-125m-llama", 64, True),
    "sliced": Step("opt-125m-llama", 1, True, make_model=Sliced),
}
WRONG: Mapping[str, Callable[[], Compiled]] = {
    "undonated": functools.partial(WRONG_STEPS["undonated"].compile, Undonated),
    "plain": functools.partial(WRONG_STEPS["plain"].compile, Plain),
    "sliced": WRONG_STEPS["sliced"].compile,
}
