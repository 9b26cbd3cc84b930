"""The device side: the programs of a step, its state donated through every call."""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.profiler import TraceAnnotation
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from pjengine.activation_edits import SentWords, room_for, words_by_slot
from pjengine.batching import Layout, pack, page_updates
from pjengine.compile_cache import CompileCache
from pjengine.config import RunnerConfig
from pjengine.device_state import (
    EARLY_UPDATES,
    AnyLayout,
    Owned,
    Program,
    free,
    new_state,
    page_updater,
    replicate,
    run_draw,
    run_model,
)
from pjengine.divided_sampler import MANY
from pjengine.draw import DrawLayout, Stages, Undrawn, pack_draw
from pjengine.edit_sizes import has_token_states, num_states_for, prompt_top_for, sizes_for
from pjengine.edits import NEEDS, past_prompts, without
from pjengine.hosts import Hosts
from pjengine.inboxes import Inboxes
from pjengine.logprobs import Logprobs
from pjengine.models.decoder import Decoder, Params
from pjengine.pooling import StepStates
from pjengine.processors import NO_CHAINS, Chains
from pjengine.programs import CompilationError, Programs
from pjengine.progress import progress_bar
from pjengine.schedule import NO_MASKS, Masks, Schedule, state_limit
from pjengine.step import StepOutput
from pjengine.step_compiler import StepCompiler

PATIENCE = 32  # steps that run as larger ones before their own program is made
MAX_EDITING = 64  # programs that depend on edits and are kept; each may take 10 MB of the host's memory


@dataclass(slots=True)
class Launched:
    """A step under way on the device."""

    schedule: Schedule
    layout: Layout  # of the program that runs it
    output: StepOutput | None = None  # None: its tokens are not drawn yet
    undrawn: Undrawn | None = None
    draw_layout: DrawLayout | None = None
    prompt_logprobs: Logprobs | None = None
    states: StepStates | None = None

    def read(self) -> StepOutput:
        """Waits for the step to end; numpy arrays."""
        assert self.output is not None, "its tokens were never drawn"
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
        hosts: Hosts | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.params = params
        self.owned = Owned(params, Inboxes(sharding, config))
        self.cache, self.rows = new_state(model, config, sharding, self.owned.inboxes)
        self._enter_pages = page_updater(self.rows, sharding)
        state = params, self.cache, self.rows
        self.compiler = StepCompiler(model, config, state, sharding, compile_cache, hosts)
        self._programs: Programs[AnyLayout, Program] = Programs(
            self.compiler, num_threads=os.cpu_count() or 1
        )
        self._is_warming = False
        self.recompiles_after_warmup = 0
        self.compile_s = 0.0  # that a caller waited for programs
        self._asked: set[AnyLayout] = set()
        self._num_misses: Counter[Stages] = Counter()
        # That depend on edits, with the args that they were last called with; those used last are at the end.
        self._editing: dict[AnyLayout, SentWords | None] = {}

    @property
    def programs(self) -> Mapping[AnyLayout, Program]:
        """Those that are ready."""
        return self._programs.ready

    def reset(self) -> None:
        """Starts over with empty pages, after a step that failed half-way."""
        free(self.cache, self.rows)
        sharding, inboxes = self.compiler.sharding, self.owned.inboxes
        self.cache, self.rows = new_state(self.model, self.config, sharding, inboxes)

    def launch(self, schedule: Schedule) -> Launched:
        """Starts a step and returns at once; the tokens follow by themselves, or, if some of its sequences
        have masks, after `draw`.
        """
        layout, draw_layout = self.stages_for(self._wanted(schedule))
        with TraceAnnotation("pack"):
            updates = page_updates(schedule, self.config.pages_per_seq)
            if updates.shape[1] > layout.max_page_updates:
                updates = self._update_early(updates, layout.max_page_updates)
            blob = pack(schedule, updates, layout, self.model.config.vocab_size)
        with TraceAnnotation("dispatch"):
            vectors = [self.compiler.send(layout, blob)]
            if layout.edit_room is not None:
                vectors.append(self._send_words(layout, schedule))
            results = run_model(self, layout, *vectors)
        if draw_layout is None:
            _send_home(results)
            return Launched(schedule, layout, *results)
        undrawn, *of_prompts = results
        launched = Launched(schedule, layout, None, undrawn, draw_layout, *of_prompts)
        if not schedule.masked:
            self.draw(launched, NO_MASKS)
        return launched

    def draw(self, launched: Launched, masks: Masks) -> None:
        """Lets the tokens of a launched step be drawn, and returns at once; `masks` of its `masked`.

        No step may have been launched since.
        """
        layout, undrawn = launched.draw_layout, launched.undrawn
        assert layout is not None and undrawn is not None
        blob = self.compiler.send(layout, pack_draw(launched.schedule, masks, layout))
        tokens, logprobs, beams, drafted = run_draw(self, layout, undrawn, blob)
        launched.undrawn = None  # the logits take much memory
        of_prompts = launched.prompt_logprobs, launched.states
        launched.output = StepOutput(tokens, logprobs, *of_prompts, beams, drafted)
        _send_home(launched.output)

    def _send_words(self, layout: Layout, schedule: Schedule) -> Int[Array, "slots words"]:
        """The args of a step's activation edits: sent where they are not those of the program's last step."""
        assert layout.edit_room is not None
        edits, sent = tuple(own for _, own in schedule.edited), self._editing[layout]
        if sent is None or sent.edits != edits:
            table = words_by_slot(edits, layout.edit_room)
            self._editing[layout] = sent = SentWords(edits, replicate(table, self.compiler.sharding))
        array: Array = sent.array
        return array

    def _update_early(
        self, updates: Int[np.ndarray, "3 updates"], max_left: int
    ) -> Int[np.ndarray, "3 left"]:
        """Enters page updates that are too many for the step (cached prefixes); returns the rest."""
        while updates.shape[1] > max_left:
            now, updates = updates[:, :EARLY_UPDATES], updates[:, EARLY_UPDATES:]
            padded = np.full((3, EARLY_UPDATES), self.config.max_num_seqs, np.int32)
            padded[:, : now.shape[1]] = now
            self.rows = self._enter_pages(self.rows, self.compiler.send(None, padded))
        return updates

    def _wanted(self, schedule: Schedule) -> Stages:
        """The smallest programs that hold the schedule."""
        if schedule.num_drafts:
            return self._draft_stages(schedule.num_seqs, schedule.needs)
        wanted = schedule.num_seqs if schedule.is_decode else schedule.num_tokens
        buckets = self.config.decode_buckets if schedule.is_decode else self.config.mixed_buckets
        bucket = next(bucket for bucket in buckets if bucket >= wanted)
        if not schedule.needs.any() and not self.config.is_deterministic:
            has_filters = schedule.has_filters or not self._draws_from_parts(bucket)
            return Stages(self._layout(bucket, schedule.is_decode, has_filters))
        return self._editing_stages(bucket, schedule.is_decode, schedule.needs, schedule.chains)

    def layouts(self) -> list[Layout]:
        """Every program with the model that a schedule without edits can need."""
        if self.config.is_deterministic:
            return [stages.model for stages in self._fixed_stages()]
        decode = [self._layout(bucket, True) for bucket in self.config.decode_buckets]
        unfiltered = filter(self._draws_from_parts, self.config.decode_buckets)
        decode += [self._layout(bucket, True, has_filters=False) for bucket in unfiltered]
        mixed = [self._layout(bucket, False) for bucket in self.config.mixed_buckets]
        return decode + mixed + [self._draft_layout(bucket) for bucket in self.config.draft_buckets]

    def _fixed_stages(self) -> list[Stages]:
        """Of steps without edits, of decodes and of prompts: the same as with edits, so that these change
        nothing but what is drawn.
        """
        buckets = [(bucket, True) for bucket in self.config.decode_buckets]
        buckets += [(bucket, False) for bucket in self.config.mixed_buckets]
        return [self._editing_stages(*kind, np.zeros(len(NEEDS), np.int64), ()) for kind in buckets]

    def _draws_from_parts(self, bucket: int) -> bool:
        """Whether decodes of so many rows without filters have a program of their own."""
        return self.model.num_devices > 1 and bucket >= MANY

    def _layout(self, bucket: int, is_decode: bool, has_filters: bool = True) -> Layout:
        config, depth = self.config, self.config.decode_steps if is_decode else 1
        own = Layout(bucket, config.max_num_seqs, config.page_size, is_decode, depth, config.num_groups)
        return own if has_filters else replace(own, has_filters=False)

    def _draft_layout(self, bucket: int) -> Layout:
        assert self.config.speculation is not None
        return replace(self._layout(bucket, True), depth=1, num_drafts=self.config.speculation.num_drafts)

    def _draft_stages(self, num_seqs: int, needs: np.ndarray) -> Stages:
        """The smallest programs that draft for so many sequences, whose edits need so much."""
        model = self._draft_layout(next(own for own in self.config.draft_buckets if own >= num_seqs))
        if not needs.any():
            return Stages(model)
        sizes = sizes_for(needs, self.model.config.vocab_size)
        draw = DrawLayout(model.num_sampled, sizes, self.config.num_groups, model.num_drafts)
        return Stages(replace(model, ends_in_logits=True), draw)

    def can_draft(self, num_seqs: int, needs: np.ndarray) -> bool:
        """Whether there are programs that draft for so many sequences, whose edits need so much.

        If not, begins to make them: with edits for as many sequences as may be, so that these are few.
        """
        wanted = self._draft_stages(num_seqs, needs)
        if all(layout in self.programs for layout in wanted.layouts) or self._covers(wanted):
            return True
        if wanted.draw is not None:
            wanted = self._draft_stages(self.config.draft_buckets[-1], needs)
        if not self._asked.issuperset(wanted.layouts):
            self._make(wanted.layouts)
        return False

    def _editing_stages(
        self, bucket: int, is_decode: bool, needs: np.ndarray, chains: Iterable[Any]
    ) -> Stages:
        """Those of a step whose edits need so much, see `edits.NEEDS`, and these functions."""
        vocab_size, num_groups = self.model.config.vocab_size, self.config.num_groups
        model = replace(
            self._layout(bucket, is_decode),
            depth=1,
            ends_in_logits=True,
            num_prompt_top=prompt_top_for(needs, vocab_size),
            num_states=num_states_for(needs),
            has_token_states=has_token_states(needs),
            edit_room=room_for(int(needs[NEEDS.index("edited")]), chains),
        )
        processors = [chain for chain in chains if isinstance(chain, tuple)]
        sizes = sizes_for(needs, vocab_size, processors).within(model.num_seqs)
        return Stages(model, DrawLayout(model.num_seqs, sizes, num_groups))

    def _by_need(self) -> Sequence[AnyLayout]:
        """Every program; first the one that a first prompt needs, then the one that continues it."""
        if self.config.is_deterministic:
            return _layouts_of(self._fixed_stages()[::-1])
        layouts = self.layouts()
        decode = [layout for layout in layouts if layout.is_decode and not layout.num_drafts]
        mixed = [layout for layout in layouts if not layout.is_decode]
        drafting = [layout for layout in layouts if layout.num_drafts]
        pairs = itertools.zip_longest(mixed, decode, drafting)
        return [layout for layout in itertools.chain.from_iterable(pairs) if layout is not None]

    def use(self, layout: Layout, program: Program) -> None:
        """Takes a step that was made elsewhere, instead of compiling one."""
        self._programs.put(layout, program)

    def stages_for(self, wanted: Stages) -> Stages:
        """`wanted`, or while its programs are not ready, those of a step with more room.

        Where there are none, waits for them to be made, before all others; raises what that raises.
        """
        if not all(layout in self.programs for layout in wanted.layouts):
            if (covers := self._covers(wanted)) and not self.config.waits_for_programs:
                self._num_misses[wanted] += 1
                if self._num_misses[wanted] == PATIENCE:
                    self._make(wanted.layouts)
                wanted = min(covers, key=lambda own: (own.model.num_tokens, own.size))
            else:
                self._make(wanted.layouts)
                self._wait(wanted.layouts)
        self._keep(wanted.layouts)
        return wanted

    def _covers(self, wanted: Stages) -> list[Stages]:
        """Of the programs that are ready, those that `wanted` may run as."""
        ready = list(self.programs)
        models = [own for own in ready if isinstance(own, Layout) and own.covers(wanted.model)]
        if wanted.draw is None:
            return [Stages(model) for model in models]
        draws = [own for own in ready if isinstance(own, DrawLayout) and own.covers(wanted.draw)]
        pairs = itertools.product(models, draws)
        return [Stages(model, draw) for model, draw in pairs if model.num_sampled == draw.num_seqs]

    def _keep(self, layouts: Sequence[AnyLayout]) -> None:
        """Notes that programs are of use. Of those that depend on edits, only the last MAX_EDITING stay.

        What requests may ask for makes thousands of different ones.
        """
        for layout in layouts:
            if isinstance(layout, DrawLayout) or layout.depends_on_edits:
                self._editing[layout] = self._editing.pop(layout, None)
        while len(self._editing) > MAX_EDITING:
            oldest = next(iter(self._editing))
            del self._editing[oldest]
            self._programs.drop(oldest)
            self.compiler.forget(oldest)
            self._asked.discard(oldest)
            for stages in [own for own in self._num_misses if oldest in own.layouts]:
                del self._num_misses[stages]

    def can_edit(self, now: np.ndarray, soon: Callable[[], np.ndarray], chains: Chains = NO_CHAINS) -> bool:
        """Whether every step that needs so much (see `edits.NEEDS`) has programs.

        If not, begins to make those for `soon`, which is more: every new union would be compiled otherwise.

        Raises:
          CompilationError: they could not be made; the next call tries again.
        """
        wanted = self._largest(now, chains.now)
        found = [next(iter(self._covers(stages)), None) for stages in wanted]
        if None not in found:
            self._keep([layout for own in found if own is not None for layout in own.layouts])
            return True
        if self.config.waits_for_programs:
            self._make(_layouts_of(wanted))
            try:
                self._wait(_layouts_of(wanted))
            except Exception as error:
                raise CompilationError(f"no program for these parameters: {error}") from error
            return True
        if self._programs.is_under_way(self._asked):
            return False
        failed, layouts = self._programs.failed, _layouts_of(wanted)
        if errors := [failed.pop(layout) for layout in layouts if layout in failed]:
            raise CompilationError(f"no program for these parameters: {errors[0]}") from errors[0]
        larger = _layouts_of(self._largest(soon(), chains.soon))
        self._make(layouts if any(layout in failed for layout in larger) else larger)
        return False

    def _largest(self, needs: np.ndarray, chains: Iterable[Any]) -> list[Stages]:
        """What any step that needs so much could run as."""
        config, anywhere = self.config, past_prompts(needs)
        most = config.mixed_buckets[-1]
        stages = [self._editing_stages(config.decode_buckets[-1], True, anywhere, chains)]
        limits = [most, most]  # of steps with logprobs of prompts, and with hidden states
        if prompt_top_for(needs, self.model.config.vocab_size) is not None:
            limits[0] = min(config.max_prompt_logprob_tokens or most, most)
        if num_layers := num_states_for(needs):
            limits[1] = state_limit(config.max_states, num_layers, config.mixed_buckets) or most
        kinds = dict.fromkeys(
            (
                self._editing_stages(limits[0], False, without(needs, "states", "token_states"), chains),
                self._editing_stages(limits[1], False, without(needs, "prompt_top"), chains),
                self._editing_stages(min(limits), False, needs, chains),
                self._editing_stages(most, False, anywhere, chains),
            )
        )
        return stages + [own for own in kinds if not any(o != own and o.covers(own) for o in kinds)]

    def wait_for_programs(self) -> None:
        """Returns once there is a new program, or after a moment."""
        start = time.perf_counter()
        self._programs.wait_for_change(timeout_s=0.05)
        self.compile_s += time.perf_counter() - start

    def _make(self, layouts: Sequence[AnyLayout]) -> None:
        """Begins to make programs, before all others."""
        new = [layout for layout in layouts if layout not in self._asked]
        self._asked.update(new)
        self.recompiles_after_warmup += self._is_warming * len(set(new).difference(self._by_need()))
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

    def _wait(self, layouts: Sequence[AnyLayout], *, use_tqdm: bool = False) -> None:
        start = time.perf_counter()
        with progress_bar("Compiling programs", unit=" programs", is_shown=use_tqdm) as show:
            self._programs.wait(layouts, show)
        self.compile_s += time.perf_counter() - start

    def close(self) -> None:
        """Stops making programs and frees the device memory that the runner owns."""
        self._programs.close()
        self.owned.free()
        self.params = {}  # of which some may be the caller's
        free(self.cache, self.rows)


def _layouts_of(several: Sequence[Stages]) -> list[AnyLayout]:
    """Of the programs of several kinds of steps, each once."""
    return list(dict.fromkeys(layout for stages in several for layout in stages.layouts))


def _send_home(output: Any) -> None:
    """Begins to copy arrays to the host, each as soon as it is there."""
    for array in jax.tree.leaves(output):
        array.copy_to_host_async()
