"""The device side: one step, compiled once per program, its state donated through every call."""

import dataclasses
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int

from pjengine.batching import (
    Layout,
    Rows,
    pack,
    page_updates,
    update_page_table,
)
from pjengine.config import RunnerConfig
from pjengine.edits import NO_EDITS, sizes_of
from pjengine.models.llama import Llama, Params
from pjengine.models.state import KVCache, kv_shape
from pjengine.scheduler import Schedule
from pjengine.step import StepOutput, step

logger = logging.getLogger(__name__)

EARLY_UPDATES = 1024  # page updates entered at once by the program that runs before a step
COMPILER_OPTIONS = {
    "gpu": {
        # XLA's own Triton products take the slice of the stacked weights into each kernel, so every layer
        # is compiled and autotuned anew: 30 s a program of 32 layers, where cuBLAS needs 5 and is as fast.
        "xla_gpu_enable_triton_gemm": False,
        # It counts the donated cache twice, finds no room, and warns at every program.
        "xla_disable_hlo_passes": "rematerialization",
    }
}


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way on the device."""

    schedule: Schedule
    output: StepOutput

    def read(self) -> StepOutput:
        """Waits for the step to end; numpy arrays."""
        return jax.tree.map(np.asarray, self.output)


class Runner:
    """Owns parameters, KV pages, row state and the compiled programs."""

    def __init__(self, model: Llama, params: Params, config: RunnerConfig, sharding: NamedSharding) -> None:
        self.model = model
        self.config = config
        self.sharding = sharding
        self.params = params
        self.cache, self.rows = self._new_state()
        early = jax.ShapeDtypeStruct((3, EARLY_UPDATES), jnp.int32, sharding=sharding)
        self._update_page_table = (
            jax.jit(update_page_table, donate_argnums=0, out_shardings=sharding)
            .lower(self.rows, early)
            .compile()
        )
        self.programs: dict[Layout, jax.stages.Compiled] = {}
        self.is_warm = False
        self.recompiles_after_warmup = 0
        self.compile_s = 0.0

    def _new_state(self) -> tuple[KVCache, Rows]:
        config, dtype = self.config, self.model.dtype
        shape = kv_shape(self.model.config, config.num_pages, config.page_size)

        def make() -> tuple[KVCache, Rows]:
            token_ids = jnp.zeros((config.num_pages, config.page_size), jnp.int32)
            cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), token_ids)
            return cache, Rows.empty(config.max_num_seqs, config.pages_per_seq)

        return jax.jit(make, out_shardings=self.sharding)()

    def reset(self) -> None:
        """Starts over with empty pages, after a step that failed half-way."""
        self._free(self.cache, self.rows)
        self.cache, self.rows = self._new_state()

    @property
    def platform(self) -> str:
        return self.sharding.mesh.devices.flat[0].platform

    def launch(self, schedule: Schedule) -> Launched:
        """Starts a step and returns at once; the tokens follow by themselves."""
        layout = self.layout_for(schedule)
        updates = page_updates(schedule)
        if updates.shape[1] > layout.max_page_updates:
            updates = self._update_early(updates, layout.max_page_updates)
        blob = pack(schedule, updates, layout, self.model.config.vocab_size)
        program = self.program(layout)
        self.cache, self.rows, output = program(
            self.params, self.cache, self.rows, jax.device_put(blob, self.sharding)
        )
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return Launched(schedule, output)

    def _update_early(
        self, updates: Int[np.ndarray, "3 updates"], max_left: int
    ) -> Int[np.ndarray, "3 updates"]:
        """Enters page updates that are too many for the step (cached prefixes); returns the rest."""
        while updates.shape[1] > max_left:
            now, updates = updates[:, :EARLY_UPDATES], updates[:, EARLY_UPDATES:]
            padded = np.full((3, EARLY_UPDATES), self.config.max_num_seqs, np.int32)
            padded[:, : now.shape[1]] = now
            self.rows = self._update_page_table(self.rows, jax.device_put(padded, self.sharding))
        return updates

    def layout_for(self, schedule: Schedule) -> Layout:
        """The smallest program that holds the schedule."""
        wanted = len(schedule.chunks) if schedule.is_decode else schedule.num_tokens
        buckets = self.config.decode_buckets if schedule.is_decode else self.config.mixed_buckets
        layout = self._layout(next(bucket for bucket in buckets if bucket >= wanted), schedule.is_decode)
        edits = [chunk.request.edits for chunk in schedule.chunks if chunk.request.edits is not NO_EDITS]
        if not edits:
            return layout
        sizes = sizes_of(edits, self.model.config.vocab_size)
        if schedule.is_past_prompts:
            sizes = dataclasses.replace(sizes, num_prompt_top=None)
        return dataclasses.replace(layout, edits=sizes)

    def layouts(self) -> list[Layout]:
        """Every program that a schedule can need."""
        decode = [self._layout(bucket, True) for bucket in self.config.decode_buckets]
        return decode + [self._layout(bucket, False) for bucket in self.config.mixed_buckets]

    def _layout(self, bucket: int, is_decode: bool) -> Layout:
        return Layout(bucket, self.config.max_num_seqs, self.config.page_size, is_decode)

    def program(self, layout: Layout) -> jax.stages.Compiled:
        """The compiled step for `layout`; compiles it at first use."""
        if layout not in self.programs:
            self.recompiles_after_warmup += self.is_warm
            self._compile([layout])
        return self.programs[layout]

    def warm_up(self) -> None:
        """Compiles every program; from here on a compilation is counted as a fault."""
        self._compile([layout for layout in self.layouts() if layout not in self.programs])
        self.is_warm = True

    def _compile(self, layouts: list[Layout]) -> None:
        """Traces the programs one after the other, and compiles them beside each other."""
        start = time.perf_counter()
        options = COMPILER_OPTIONS.get(self.platform)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            under_way = {layout: pool.submit(self.lower(layout).compile, options) for layout in layouts}
            self.programs |= {layout: future.result() for layout, future in under_way.items()}
        elapsed = time.perf_counter() - start
        self.compile_s += elapsed
        logger.info("compiled programs=%d seconds=%.1f", len(layouts), elapsed)

    def lower(self, layout: Layout) -> jax.stages.Lowered:
        """The step for `layout`, traced and lowered; donates cache and rows."""
        run = partial(
            step,
            model=self.model,
            layout=layout,
            num_pages=self.config.num_pages,
            backend=self.config.kernel_backend,
        )
        blob = jax.ShapeDtypeStruct((layout.size,), jnp.int32, sharding=self.sharding)
        jitted = jax.jit(run, donate_argnums=(1, 2), out_shardings=self.sharding)
        return jitted.lower(self.params, self.cache, self.rows, blob)

    def close(self) -> None:
        """Frees the device memory that the runner owns."""
        self._free(self.params, self.cache, self.rows)
        self.programs.clear()

    @staticmethod
    def _free(*trees: Any) -> None:
        for leaf in jax.tree.leaves(trees):
            if not leaf.is_deleted():
                leaf.delete()
