"""The device side: one step, compiled once per program, its state donated through every call."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Lowered
from jaxtyping import Int

from pjengine.batching import (
    Layout,
    Rows,
    pack,
    page_updates,
    update_page_table,
)
from pjengine.compile_cache import CompileCache
from pjengine.config import RunnerConfig
from pjengine.edit_sizes import NO_SIZES, EditSizes, sizes_for
from pjengine.edits import past_prompts
from pjengine.models.decoder import Decoder, Params
from pjengine.models.state import KVCache, kv_shape
from pjengine.programs import CompilationError, Programs
from pjengine.progress import progress_bar
from pjengine.schedule import NO_MASKS, Masks, Schedule
from pjengine.step import StepOutput
from pjengine.step_compiler import StepCompiler

type Program = Callable[..., tuple[KVCache, Rows, StepOutput]]

PATIENCE = 32  # steps that run as larger ones before their own program is made
MAX_EDITING = 64  # programs with room for edits that are kept; each may take 10 MB of the host's memory
EARLY_UPDATES = 1024  # page updates entered at once by the program that runs before a step


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

    def __init__(
        self,
        model: Decoder,
        params: Params,
        config: RunnerConfig,
        sharding: NamedSharding,
        compile_cache: CompileCache | None = None,
    ) -> None:
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
        self._compiler = StepCompiler(model, config, (params, self.cache, self.rows), sharding, compile_cache)
        self._programs: Programs[Layout, Program] = Programs(self._compiler, num_threads=os.cpu_count() or 1)
        self._is_warming = False
        self.recompiles_after_warmup = 0
        self.compile_s = 0.0  # that a caller waited for programs
        self._asked: set[Layout] = set()
        self._num_misses: Counter[Layout] = Counter()
        self._editing: dict[Layout, None] = {}  # programs with room for edits; those used last are at the end

    def _new_state(self) -> tuple[KVCache, Rows]:
        config, dtype = self.config, self.model.dtype
        shape = kv_shape(self.model.config, config.num_pages, config.page_size, config.window_group)

        def make() -> tuple[KVCache, Rows]:
            token_ids = jnp.zeros((config.num_pages, config.page_size), jnp.int32)
            cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), token_ids)
            return cache, Rows.empty(config.max_num_seqs, config.num_groups * config.pages_per_seq)

        return jax.jit(make, out_shardings=self.sharding)()

    def reset(self) -> None:
        """Starts over with empty pages, after a step that failed half-way."""
        self._free(self.cache, self.rows)
        self.cache, self.rows = self._new_state()

    def launch(self, schedule: Schedule, masks: Masks = NO_MASKS) -> Launched:
        """Starts a step and returns at once; the tokens follow by themselves.

        `masks`: for each of `schedule.masked`.
        """
        layout, program = self.program_for(self._layout_for(schedule))
        updates = page_updates(schedule, self.config.pages_per_seq)
        if updates.shape[1] > layout.max_page_updates:
            updates = self._update_early(updates, layout.max_page_updates)
        blob = pack(schedule, updates, masks, layout, self.model.config.vocab_size)
        self.cache, self.rows, output = program(
            self.params, self.cache, self.rows, jax.device_put(blob, self.sharding)
        )
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return Launched(schedule, output)

    def _update_early(
        self, updates: Int[np.ndarray, "3 updates"], max_left: int
    ) -> Int[np.ndarray, "3 left"]:
        """Enters page updates that are too many for the step (cached prefixes); returns the rest."""
        while updates.shape[1] > max_left:
            now, updates = updates[:, :EARLY_UPDATES], updates[:, EARLY_UPDATES:]
            padded = np.full((3, EARLY_UPDATES), self.config.max_num_seqs, np.int32)
            padded[:, : now.shape[1]] = now
            self.rows = self._update_page_table(self.rows, jax.device_put(padded, self.sharding))
        return updates

    def _layout_for(self, schedule: Schedule) -> Layout:
        """The smallest program that holds the schedule."""
        wanted = schedule.num_seqs if schedule.is_decode else schedule.num_tokens
        buckets = self.config.decode_buckets if schedule.is_decode else self.config.mixed_buckets
        bucket = next(bucket for bucket in buckets if bucket >= wanted)
        sizes = sizes_for(schedule.needs, self.model.config.vocab_size)
        return self._layout(bucket, schedule.is_decode, sizes)

    def layouts(self) -> list[Layout]:
        """Every program that a schedule can need."""
        decode = [self._layout(bucket, True) for bucket in self.config.decode_buckets]
        return decode + [self._layout(bucket, False) for bucket in self.config.mixed_buckets]

    def _layout(self, bucket: int, is_decode: bool, edits: EditSizes = NO_SIZES) -> Layout:
        depth = self.config.decode_steps if is_decode and edits == NO_SIZES else 1
        edits = edits.within(min(bucket, self.config.max_num_seqs))
        config = self.config
        return Layout(
            bucket, config.max_num_seqs, config.page_size, is_decode, edits, depth, config.num_groups
        )

    def _by_need(self) -> list[Layout]:
        """Every program; first the one that a first prompt needs, then the one that continues it."""
        layouts = self.layouts()
        decode = [layout for layout in layouts if layout.is_decode]
        mixed = [layout for layout in layouts if not layout.is_decode]
        pairs = zip_longest(mixed, decode)
        return [layout for layout in chain.from_iterable(pairs) if layout is not None]

    @property
    def programs(self) -> Mapping[Layout, Program]:
        """The programs that are ready."""
        return self._programs.ready

    def use(self, layout: Layout, program: Program) -> None:
        """Takes a step that was made elsewhere, instead of compiling one."""
        self._programs.put(layout, program)

    def program_for(self, layout: Layout) -> tuple[Layout, Program]:
        """The compiled step for `layout`, or while that is not ready, for one with more room.

        Where there is none, waits for the program to be made, before all others; raises what that raises.
        """
        if layout not in self.programs:
            if covers := [other for other in list(self.programs) if other.covers(layout)]:
                self._num_misses[layout] += 1
                if self._num_misses[layout] == PATIENCE:
                    self._make([layout])
                layout = min(covers, key=lambda other: (other.num_tokens, other.size))
            else:
                self._make([layout])
                self._wait([layout])
        self._keep([layout])
        return layout, self.programs[layout]

    def _keep(self, layouts: Sequence[Layout]) -> None:
        """Notes that programs are of use. Of those with room for edits, only the last MAX_EDITING stay.

        What requests may ask for makes thousands of different ones.
        """
        for layout in layouts:
            if layout.edits != NO_SIZES:
                self._editing.pop(layout, None)
                self._editing[layout] = None
        while len(self._editing) > MAX_EDITING:
            oldest = next(iter(self._editing))
            del self._editing[oldest]
            self._programs.drop(oldest)
            self._asked.discard(oldest)
            self._num_misses.pop(oldest, None)

    def can_edit(self, now: np.ndarray, soon: Callable[[], np.ndarray]) -> bool:
        """Whether every step that needs so much (see `edits.NEEDS`) has a program.

        If not, begins to make those for `soon`, which is more: every new union would be compiled otherwise.

        Raises:
          CompilationError: they could not be made; the next call tries again.
        """
        wanted, ready = self._largest(now), list(self.programs)
        found = [next((own for own in ready if own.covers(layout)), None) for layout in wanted]
        if None not in found:
            self._keep([own for own in found if own is not None])
            return True
        if self._programs.is_under_way(self._asked):
            return False
        failed = self._programs.failed
        if errors := [failed.pop(layout) for layout in wanted if layout in failed]:
            raise CompilationError(f"no program for these parameters: {errors[0]}") from errors[0]
        larger = self._largest(soon())
        self._make(wanted if any(layout in failed for layout in larger) else larger)
        return False

    def _largest(self, needs: np.ndarray) -> list[Layout]:
        """What any step that needs so much could run as."""
        vocab_size, config = self.model.config.vocab_size, self.config
        anywhere, most = sizes_for(past_prompts(needs), vocab_size), config.mixed_buckets[-1]
        layouts = [self._layout(config.decode_buckets[-1], True, anywhere)]
        if (sizes := sizes_for(needs, vocab_size)) != anywhere:
            limit = min(config.max_prompt_logprob_tokens or most, most)
            layouts.append(self._layout(limit, False, sizes))
            if limit == most:
                return layouts
        return [*layouts, self._layout(most, False, anywhere)]

    def wait_for_programs(self) -> None:
        """Returns once there is a new program, or after a moment."""
        start = time.perf_counter()
        self._programs.wait_for_change(timeout_s=0.05)
        self.compile_s += time.perf_counter() - start

    def _make(self, layouts: Sequence[Layout]) -> None:
        """Begins to make programs, before all others."""
        new = [layout for layout in layouts if layout not in self._asked]
        self._asked.update(new)
        self.recompiles_after_warmup += self._is_warming * len(set(new).difference(self.layouts()))
        self._programs.start(layouts)
        self._keep(layouts)

    def warm_up(self, *, use_tqdm: bool = False) -> None:
        """Begins to make every program; returns when a first short request finds what it needs.

        `use_tqdm` shows a progress bar of those.
        """
        layouts = self._by_need()
        self._is_warming = True
        self._programs.start(layouts)
        self._wait(layouts[:2], use_tqdm=use_tqdm)

    def wait_until_warm(self, *, use_tqdm: bool = False) -> None:
        """Makes every program and returns when all are ready."""
        self._is_warming = True
        self._wait(self._by_need(), use_tqdm=use_tqdm)

    def _wait(self, layouts: list[Layout], *, use_tqdm: bool = False) -> None:
        start = time.perf_counter()
        with progress_bar("Compiling programs", unit=" programs", is_shown=use_tqdm) as show:
            self._programs.wait(layouts, show)
        self.compile_s += time.perf_counter() - start

    def lower(self, layout: Layout) -> Lowered:
        """The step for `layout`, traced and lowered; donates cache and rows."""
        return self._compiler.lower(layout)

    def close(self) -> None:
        """Stops making programs and frees the device memory that the runner owns."""
        self._programs.close()
        self._free(self.params, self.cache, self.rows)

    @staticmethod
    def _free(*trees: Any) -> None:
        for leaf in jax.tree.leaves(trees):
            if not leaf.is_deleted():
                leaf.delete()
