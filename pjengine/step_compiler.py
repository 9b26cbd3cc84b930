"""How the program of one layout is compiled: shapes in, an executable out."""

import ctypes
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Compiled, Lowered
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Int

from pjengine.batching import Layout, Rows
from pjengine.beam_selection import BeamOutput, draw_beams
from pjengine.compile_cache import CompileCache, environment, fingerprint
from pjengine.config import RunnerConfig
from pjengine.device_state import AnyLayout, replicate
from pjengine.draw import DrawLayout, Undrawn, draw
from pjengine.hosts import Hosts
from pjengine.logprobs import Logprobs
from pjengine.models.decoder import Decoder, Params
from pjengine.models.registry import is_ours
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.triton_extra import backend_versions
from pjengine.pooling import StepStates
from pjengine.speculative_step import Drafted
from pjengine.step import StepOutput, compute_logits, step

logger = logging.getLogger(__name__)

COMPILER_OPTIONS: Mapping[str, dict[str, Any]] = {
    "gpu": {
        # XLA's own Triton products take the slice of the stacked weights into each kernel, so every layer
        # is compiled and autotuned anew: 30 s a program of 32 layers. With cuBLAS, 21 of them take 27 s.
        "xla_gpu_enable_triton_gemm": False,
        # The first counts the donated cache twice, finds no room, and warns at every program. The other makes
        # one product of two that read the same, attention's and the MLP's side by side, by joining their
        # weights anew in every step.
        "xla_disable_hlo_passes": "rematerialization,dot-merger",
    }
}

# Of programs that devices run together: sums by NCCL, whatever their size. XLA's own kernels for small ones
# are launched one by one beside the CUDA graphs (jax 0.11), or need memory that NCCL maps for all (0.12).
DIVIDED_OPTIONS = {"gpu": {"xla_gpu_experimental_use_collective_kernels": ""}}
# And of those without loops and conditions, in which a CUDA graph takes no sums: all else that XLA puts into
# graphs, and the sums. The host takes longer to launch 300 kernels on each device than they run.
STRAIGHT_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_command_buffer": "COLLECTIVES,CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,"
        "DYNAMIC_SLICE_FUSION,FUSION"
    }
}
# And of deterministic engines, whose programs of other sizes, or that do more beside, compute the same bits:
# the first of the products that cuBLAS proposes for a shape, not the one that was fastest today, and no
# reductions in XLA's Triton kernels, whose warps for a row depend on the number of rows.
FIXED_OPTIONS = {
    "gpu": {
        "xla_gpu_autotune_level": 0,
        "xla_disable_hlo_passes": COMPILER_OPTIONS["gpu"]["xla_disable_hlo_passes"]
        + ",triton-softmax-rewriter,fusion-block-level-rewriter",
    }
}


class StepCompiler:
    """Makes the compiled program of a layout, from the cache or from the source. Holds shapes, no arrays.

    It may be called in several threads. JAX's context managers do not reach these; `jax.config` does.
    """

    def __init__(
        self,
        model: Decoder,
        config: RunnerConfig,
        state: tuple[Params, KVCache, Rows],
        sharding: NamedSharding,
        cache: CompileCache | None,
        hosts: Hosts | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        self.sharding = sharding
        # A program is known by the sources of this package: of a class from outside nothing is known.
        self.cache = cache if is_ours(model) else None
        self.devices = list(sharding.mesh.devices.flat)
        self.options = dict(COMPILER_OPTIONS.get(self.devices[0].platform, {}))
        if not sharding.is_fully_addressable:
            # Else hosts would wait for each other's choices of kernels, and they compile in no common order.
            self.options["xla_gpu_shard_autotuning"] = False
        self.hosts = hosts  # that launch what is sent here

    def load(self, layout: Layout | DrawLayout) -> Compiled | None:
        """The program for `layout` as an earlier run compiled it."""
        if self.hosts is not None:
            self.hosts.tell_layout("make", layout)
        if self.cache is None or not _is_kept(layout):
            return None
        return self.cache.load(self._key(layout), *self._trees(layout), self.devices)

    def send(self, layout: AnyLayout | None, vector: Int[np.ndarray, "..."]) -> Int[Array, "..."]:
        """Puts a vector on the devices, for the program of `layout`; None: for the one that enters pages.

        That program must be launched next: other hosts are told to launch it.
        """
        if self.hosts is not None:
            if layout is None:
                self.hosts.tell("pages", vector)
            else:
                self.hosts.tell_layout("run", layout, vector)
        return replicate(vector, self.sharding)

    def forget(self, layout: AnyLayout) -> None:
        """Has other hosts let go of a program."""
        if self.hosts is not None:
            self.hosts.tell_layout("drop", layout)

    def lower(self, layout: Layout | DrawLayout) -> Lowered:
        """The program for `layout`, traced and lowered; donates cache and rows, as far as it changes them."""
        run, donated = self._function(layout)
        arguments, results = self._arguments(layout), self._result_shardings(layout)
        if len(self.devices) > 1:
            run = jax.shard_map(
                run,
                mesh=self.sharding.mesh,
                in_specs=jax.tree.map(lambda leaf: leaf.sharding.spec, arguments),
                out_specs=jax.tree.map(lambda sharding: sharding.spec, results),
                check_vma=False,  # kernels do not say what differs between devices
            )
        return jax.jit(run, donate_argnums=donated, out_shardings=results).lower(*arguments)

    def compile(self, layout: Layout | DrawLayout, lowered: Lowered) -> Compiled:
        """The program for `layout`, which later runs load."""
        start, options = time.perf_counter(), self._options(layout)
        is_tuned = self.devices[0].platform == "gpu" and not self.config.is_deterministic
        if self.cache is not None and is_tuned:
            options["xla_gpu_per_fusion_autotune_cache_dir"] = str(self.cache.autotune_folder)
        program = lowered.compile(options or None)
        logger.info("compiled %s seconds=%.1f", layout, time.perf_counter() - start)
        if self.cache is not None and _is_kept(layout):
            self.cache.store(self._key(layout), program, *self._trees(layout))
        _return_memory()
        return program

    def _function(self, layout: Layout | DrawLayout) -> tuple[Callable[..., Any], tuple[int, ...]]:
        """What the program computes, and which of its arguments are donated."""
        settings = self._settings(layout)
        if isinstance(layout, DrawLayout):
            if layout.edits.num_beams:
                return partial(draw_beams, **settings), (0, 1)
            return partial(draw, **settings), (0,)
        return partial(compute_logits if layout.ends_in_logits else step, **settings), (1, 2)

    def _arguments(self, layout: Layout | DrawLayout) -> tuple[Any, ...]:
        def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

        if not isinstance(layout, DrawLayout):
            words = (
                []
                if layout.edit_room is None
                else [array((layout.edit_room.num_slots, layout.edit_room.num_words))]
            )
            return *self.state, array((layout.size,)), *words
        _, cache, rows = self.state
        seqs, vocab_size = layout.num_seqs, self.model.config.vocab_size
        drafted = None
        if layout.num_drafts:
            places = (seqs // (1 + layout.num_drafts), 1 + layout.num_drafts)
            drafted = Drafted(array(places), array(places, jnp.bool_), array(places[:1]))
        own = array((seqs,))
        undrawn = Undrawn(array((seqs, vocab_size), jnp.float32), own, own, own, drafted)
        state = (cache, rows) if layout.edits.num_beams else (rows, cache.token_ids)
        return *state, undrawn, array((layout.size,))

    def _settings(self, layout: Layout | DrawLayout) -> dict[str, Any]:
        """What the function is bound to."""
        settings = {"layout": layout, "backend": self.config.kernel_backend}
        pages = {"num_pages": self.config.num_pages, "window_group": self.config.window_group}
        if not isinstance(layout, DrawLayout):
            return {"model": self.model, **settings, **pages, "speculation": self.config.speculation}
        if layout.edits.num_beams:
            return {"num_layers": self.model.config.num_layers, **settings, **pages}
        return settings

    def _options(self, layout: Layout | DrawLayout) -> dict[str, Any]:
        """What XLA is told beside its defaults."""
        platform, options = self.devices[0].platform, dict(self.options)
        if self.config.is_deterministic:
            options |= FIXED_OPTIONS.get(platform, {})
        if len(self.devices) > 1:
            options |= DIVIDED_OPTIONS.get(platform, {})
            if (
                isinstance(layout, Layout)
                and layout.is_decode
                and layout.depth == 1
                and not layout.num_drafts
            ):
                options |= STRAIGHT_OPTIONS.get(platform, {})
        return options

    def _key(self, layout: Layout | DrawLayout) -> str:
        """What the cache knows the program by: all that `lower` and `compile` go by."""
        leaves = jax.tree.leaves_with_path(self._arguments(layout))
        shapes = [(str(path), leaf.shape, str(leaf.dtype), str(leaf.sharding)) for path, leaf in leaves]
        versions = backend_versions(self.config.kernel_backend)
        options = self._options(layout)
        return fingerprint(*environment(self.devices, options), versions, self._settings(layout), shapes)

    def _result_shardings(self, layout: Layout | DrawLayout) -> Any:
        """Every device comes to the same results; of the pages each has its part."""
        _, tree = self._trees(layout)
        results = jax.tree.unflatten(tree, [self.sharding] * tree.num_leaves)
        if isinstance(layout, DrawLayout) and not layout.edits.num_beams:
            return results
        return jax.tree.map(lambda leaf: leaf.sharding, self.state[1]), *results[1:]

    def _trees(self, layout: Layout | DrawLayout) -> tuple[PyTreeDef, PyTreeDef]:
        """Of the arguments and of the results."""
        _, cache, rows = self.state
        leaf: Any = 0  # the trees hold no leaves
        logprobs, results = Logprobs(*[leaf] * len(Logprobs._fields)), tuple[Any, ...]()
        counts = leaf if layout.num_drafts else None
        if isinstance(layout, DrawLayout):
            own = rows, leaf, None if layout.edits.num_top is None else logprobs
            results = (
                (cache, *own, BeamOutput(leaf, leaf, leaf)) if layout.edits.num_beams else (*own, counts)
            )
        elif layout.ends_in_logits:
            undrawn = Undrawn(
                leaf, leaf, leaf, leaf, Drafted(leaf, leaf, leaf) if layout.num_drafts else None
            )
            states = StepStates(leaf, leaf if layout.has_token_states else None)
            of_prompts = (
                None if layout.num_prompt_top is None else logprobs,
                states if layout.num_states else None,
            )
            results = cache, rows, undrawn, *of_prompts
        else:
            results = cache, rows, StepOutput(leaf, drafted=counts)
        return jax.tree.structure((self._arguments(layout), {})), jax.tree.structure(results)


def _is_kept(layout: Layout | DrawLayout) -> bool:
    """Whether later runs can know the program again: of a caller's functions nothing is known."""
    return not (layout.edits.chains if isinstance(layout, DrawLayout) else layout.edit_room)


def _return_memory() -> None:
    """Gives the system back what a compilation has taken and freed: glibc keeps it, some 60 MB each time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # another C library has none
        trim(0)
