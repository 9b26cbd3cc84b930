"""LLMEngine: requests in, outputs out. The one owner of mutable state."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
from jaxtyping import Int

from pjengine.beam_search import BeamStep, Candidate
from pjengine.compile_cache import open_compile_cache
from pjengine.config import EngineConfig, compile_cache_folder, is_whole
from pjengine.follower import follow
from pjengine.generation import NO_TOKEN, Completion, Generation
from pjengine.grammars import Matcher
from pjengine.hidden_states import states_to_host
from pjengine.hosts import HostLostError, Hosts, telling_failure
from pjengine.loading import LoadedModel, load_model
from pjengine.models.config import ModelConfig
from pjengine.outputs import RequestOutput
from pjengine.page_pool import PagePool
from pjengine.preparation import Preparation, seed_source
from pjengine.prompts import Prompt
from pjengine.ray_hosts import gather_hosts
from pjengine.recording import Recorder
from pjengine.request import Request, request_id_for
from pjengine.runner import Launched, Runner
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.schedule import BROKEN, NO_MASKS, Masks, Schedule
from pjengine.scheduler import Scheduler
from pjengine.speculation import Speculation
from pjengine.step import StepOutput
from pjengine.step_log import StepLog
from pjengine.token_logprobs import to_host
from pjengine.turns import Turns
from pjengine.weights import replace_params

logger = logging.getLogger(__name__)


class LLMEngine:
    """Runs requests step by step.

    Each step is launched before the last one is read, so that the device never waits for the host;
    a token therefore comes out one call of `step` after the step that computed it was launched. Of a step
    with grammars the model is launched, and what they allow is found while it runs.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel | None = None) -> None:
        if config.data_parallel_size > 1:
            raise ValueError(
                f"an LLMEngine is one engine, got data_parallel_size={config.data_parallel_size}: use LLM, "
                "AsyncLLM or pjengine.replicas.start_engine"
            )
        if config.node_rank > 0:
            raise SystemExit(follow(config))
        self.config, hosts = gather_hosts(config)
        with telling_failure(hosts):
            self._start(hosts, loaded)

    def _start(self, hosts: Hosts | None, loaded: LoadedModel | None) -> None:
        config = self.config
        loaded = load_model(config, hosts) if loaded is None else loaded
        self.tokenizer = loaded.tokenizer
        self.memory_plan = loaded.memory_plan
        sizes = loaded.runner_config
        compile_cache = open_compile_cache(compile_cache_folder(config.compile_cache_dir))
        with ExitStack() as undo:  # of what a start that fails has begun
            self._recorder = Recorder(config, loaded)
            undo.callback(self._recorder.discard)
            self.runner = Runner(loaded.model, loaded.params, sizes, loaded.sharding, compile_cache, hosts)
            undo.callback(self.runner.close)
            self.scheduler = self._new_scheduler()
            self.step_log = StepLog()
            self.num_generation_tokens = 0
            self._in_flight: Launched | None = None
            self._turns = Turns()  # to change what is below, and the scheduler
            self._generations: dict[str, Generation] = {}
            self._completions: dict[str, tuple[Completion, Generation]] = {}  # by the id of each continuation
            self._preparation = Preparation(
                model_config=self.model_config,
                tokenizer=self.tokenizer,
                max_model_len=sizes.max_model_len,
                max_logprobs=config.max_logprobs,
                history_len=sizes.pages_per_seq * sizes.page_size,
                generation_config=loaded.generation_config,
                draw_seed=seed_source(config.seed),
            )
            self.is_broken = False  # a step failed, and so did starting over: nothing can run any more
            self.is_closed = False
            if hosts is not None:
                hosts.begin(loaded.facts)
            if config.warm_up:
                self.runner.warm_up(use_tqdm=config.use_tqdm_on_load)
            undo.pop_all()

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return self.runner.config.max_model_len

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model.config

    def _new_scheduler(self) -> Scheduler:
        sizes = self.runner.config
        group, wanted = sizes.window_group, sizes.speculation
        return Scheduler(
            PagePool(sizes.num_pages),
            sizes.page_size,
            sizes.max_num_seqs,
            sizes.max_num_batched_tokens,
            is_caching=self.config.enable_prefix_caching,
            decode_steps=sizes.decode_steps,
            can_edit=self.runner.can_edit,
            max_prompt_logprob_tokens=sizes.max_prompt_logprob_tokens,
            max_states=sizes.max_states,
            mixed_sizes=sizes.mixed_buckets,
            is_deterministic=sizes.is_deterministic,
            prefill_first=bool(self.config.prefill_first),
            speculation=Speculation(wanted, sizes.max_num_seqs, self.runner.can_draft) if wanted else None,
            window_pool=None if group is None else PagePool(group.num_pages),
            window=None if group is None else group.window,
        )

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Generation:
        """Queues a request and returns what will grow as `step` is called.

        Raises:
          ValueError: the prompt is empty, too long or out of the vocabulary; the parameters do not suit
            the model; the request can never fit; its id is in use; or the priority is no whole number, or
            given under another policy. Nothing is queued then.
          TypeError: it is no prompt, `params` are no SamplingParams, or the id is no str.
          RuntimeError: the engine is closed.
        """
        generation = self.prepare(prompt, params, request_id=request_id, priority=priority)
        self.submit(generation)
        return generation

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Generation:
        """Checks a request without queueing it. Raises as `add_request` does.

        Without `params`, the model's own defaults hold. May run on another thread, beside a step.
        """
        if not is_whole(priority):
            raise ValueError(f"priority must be a whole number, got {priority!r:.80}")
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} needs scheduling_policy='priority'")
        params = self.default_sampling_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r:.80}")
        for name in ("logits_processors", "activation_edits"):
            if getattr(params, name) and self._hosts is not None:
                raise ValueError(f"{name} are functions of this process: with nnodes > 1 leave them out")
        for name in ("use_beam_search", "activation_edits"):
            if getattr(params, name) and self.config.deterministic:
                raise ValueError(f"{name} does not go with deterministic=True: leave one of them out")
        self._recorder.check(params)
        generation = self._preparation.generation(request_id_for(request_id), prompt, params, priority)
        self.scheduler.check_fits(generation.request)
        return generation

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What holds for requests without parameters: the model's generation_config.json says it."""
        return self._preparation.default_params

    def submit(self, generation: Generation) -> None:
        """Queues a prepared request; after the step that another thread is in."""
        with self._turns.take():
            self._check_open()
            ids = [completion.request.request_id for completion in generation.completions]
            for request_id in ids:
                if request_id in self._completions or request_id in self._generations:
                    raise ValueError(f"request id {request_id!r} is in use; choose another or leave it out")
            for completion in generation.completions[: 1 if generation.request.beams else None]:
                self.scheduler.add(completion.request)
            self._completions |= {
                request_id: (completion, generation)
                for request_id, completion in zip(ids, generation.completions, strict=True)
            }
            self._generations[ids[0]] = generation
            self._recorder.submit(generation)

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("this engine is closed; create another")

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns the requests that got a token from the step before, as they want it."""
        return [
            generation.output()
            for generation in self.advance()
            if generation.is_finished
            or generation.request.params.output_kind is not RequestOutputKind.FINAL_ONLY
        ]

    def advance(self) -> list[Generation]:
        """Launches the next step, then reads the one before it; returns what grew.

        If the device fails, every unfinished request ends as aborted, the pages return, and the
        engine goes on with new requests.

        Raises:
          RuntimeError: the engine is closed, or another thread is in here; AsyncLLM is for several of them.
        """
        with self._turns.take(is_waiting=False), self.step_log.turn(self.runner.compile_s):
            self._check_open()
            try:
                return self._advance() if self._hosts is None else self._hosts.run(self._advance)
            except BaseException as error:
                if isinstance(error, Exception):  # not Ctrl-C
                    logger.error("a step failed: %r; aborted requests=%d", error, len(self._generations))
                self._start_over(error)
                raise

    def _advance(self) -> list[Generation]:
        self._recorder.num_steps += self._in_flight is not None or bool(self._generations)
        with self.step_log.phase("schedule"):
            schedule = self.scheduler.schedule()
        with self.step_log.phase("launch"):
            launched = self.runner.launch(schedule) if schedule.num_seqs else None
        if launched is not None:
            self.step_log.add(launched, self.scheduler, self.runner.compile_s)
        self._in_flight, ended = launched, self._in_flight
        if ended is None and self.scheduler.speculation is not None:
            self.scheduler.speculation.pause()
        grown = self._refuse(schedule)
        if launched is ended is None and not grown:
            self.runner.wait_for_programs()
        if ended is not None:
            with self.step_log.phase("output"):
                grown += self._take_results(ended)
        if launched is not None and schedule.masked:
            with self.step_log.phase("draw"):
                self.runner.draw(launched, self._masks(schedule))
        return grown

    def _masks(self, schedule: Schedule) -> Masks:
        """What their grammars allow those requests of a step that have one and have not ended meanwhile.

        Of a token that was given out before, and is sampled again: it alone.
        """
        seqs, matchers, known = list[int](), list[Matcher](), dict[int, int]()
        for seq, request in schedule.masked:
            if not request.is_finished:
                matcher = self._completions[request.request_id][0].matcher
                assert matcher is not None
                if (position := schedule.position(seq)) < request.num_known:
                    known[len(seqs)] = request.known_tokens(position, position + 1)[0]
                seqs.append(seq)
                matchers.append(matcher)
        return Masks(seqs, self._preparation.grammars.masks(matchers, known)) if seqs else NO_MASKS

    def _refuse(self, schedule: Schedule) -> list[Generation]:
        """Ends requests whose program could not be made; the others go on."""
        refused = []
        for request, reason in schedule.refused:
            completion, generation = self._completions[request.request_id]
            ended = generation.completions if request.beams else [completion]
            for one in ended:
                one.abort("error", reason)
            self._drop(ended)
            refused.append(generation)
        return refused

    def _take_results(self, ended: Launched) -> list[Generation]:
        with self.step_log.phase("read"):
            schedule, output = ended.schedule, ended.read()
        now = time.perf_counter()
        sampled = np.asarray(output.tokens)
        lengths = self._settle(schedule, output, now)
        arrays = None if output.logprobs is None else to_host(output.logprobs)
        if output.prompt_logprobs is not None or output.states is not None:
            self._take_prompts(schedule, output)
        grown: list[Generation] = []
        finished: list[Completion] = []

        def look(request: Request, seq: int, length: int) -> None:
            completion, generation = self._completions[request.request_id]
            first_row = seq * (schedule.num_drafts + 1)  # of the logprobs
            for place, token in enumerate(sampled[:length, seq].tolist()):
                completion.push(token, now, arrays, first_row + place)
                self.num_generation_tokens += token >= 0
                if request.is_finished:
                    finished.append(completion)
                    break
            grown.append(generation)

        decodes, table = schedule.decodes, self.scheduler.rows
        is_live = table.admissions[decodes.rows] == decodes.admissions  # not ended or preempted since
        is_live &= ~table.is_beam[decodes.rows]
        if self.scheduler.is_deterministic:  # after a preemption, tokens come that were given out before
            is_live &= decodes.starts + 1 >= np.array([own.num_known for own in decodes.requests], np.int64)
        is_plain = is_live & ~table.needs_look(decodes.rows, decodes.starts, lengths, sampled)
        plain = np.flatnonzero(is_plain)
        completions, depth = self._completions, len(sampled)
        for request, tokens in zip(
            compress(decodes.requests, is_plain.tolist()), sampled[:, plain].T.tolist(), strict=True
        ):
            request.output_token_ids += tokens
            metrics = request.metrics
            metrics.last_token_s = now
            metrics.num_generation_tokens += depth
            grown.append(completions[request.request_id][1])
        self.num_generation_tokens += depth * len(plain)
        for seq in np.flatnonzero(is_live & ~is_plain).tolist():
            look(decodes.requests[seq], seq, int(lengths[seq]))
        for seq, chunk in enumerate(schedule.chunks, len(decodes.requests)):
            is_own = table.admissions[chunk.row] == chunk.admission
            is_new = chunk.start + chunk.length >= chunk.request.num_known
            if chunk.is_sampled and is_own and is_new and chunk.request.beams is None:
                look(chunk.request, seq, 1)
        for index, step in enumerate(schedule.beams):
            if table.admissions[step.rows[0]] == step.admission:
                _, generation = self._completions[step.request.request_id]
                every = list(generation.completions)
                if self._take_beams(step, index, output, now):
                    finished += every
                    grown.append(generation)
        self._drop(finished)
        return list(dict.fromkeys(grown))

    def _take_beams(self, step: BeamStep, index: int, output: StepOutput, now: float) -> bool:
        """Follows the `index`-th beam search of a step; returns whether it has ended."""
        request, beams = step.request, output.beams
        _, generation = self._completions[request.request_id]
        assert beams is not None and request.beams is not None
        metrics = request.metrics
        metrics.first_token_s = metrics.first_token_s or now
        metrics.last_token_s = now
        self.num_generation_tokens += request.beams.width
        if (output.tokens[0, step.seqs] == BROKEN).any():
            generation.abort("error", NO_TOKEN[BROKEN])
            return True
        going_on, ended = (
            [
                Candidate(*fields)
                for fields in zip(*(array[index, kind].tolist() for array in beams), strict=True)
            ]
            for kind in (0, 1)
        )
        going_on = going_on[: request.beams.width]
        self.scheduler.beams.follow(step, [candidate.parent for candidate in going_on])
        if not request.beams.take(going_on, ended):
            return False
        generation.take_beams(request.beams.finished)
        return True

    def _settle(self, schedule: Schedule, output: StepOutput, now: float) -> Int[np.ndarray, " decodes"]:
        """How many tokens each of a step's decodes got; what drafts had booked beyond that is taken back."""
        speculation, decodes = self.scheduler.speculation, schedule.decodes
        if speculation is not None:
            speculation.see(schedule, now)
        if output.drafted is None:
            return decodes.lengths
        assert speculation is not None
        taken, drafted = np.asarray(output.drafted, np.int64)[:, : len(decodes.rows)]
        speculation.settle(self.scheduler.rows, schedule, taken, drafted)
        self.step_log.settle(taken)
        return taken

    def _take_prompts(self, schedule: Schedule, output: StepOutput) -> None:
        """What requests want to know of the tokens of their prompts."""
        arrays = None if output.prompt_logprobs is None else to_host(output.prompt_logprobs)
        states = None if output.states is None else states_to_host(output.states)
        first = row = len(schedule.decodes.requests)
        for seq, chunk in enumerate(schedule.chunks, first):
            edits = chunk.request.edits
            is_asked = edits.num_prompt_logprobs is not None or edits.layers
            if is_asked and not chunk.request.is_finished:
                _, generation = self._completions[chunk.request.request_id]
                if generation.prompt_logprobs is not None and arrays is not None:
                    generation.prompt_logprobs.put(chunk.start, arrays, row, chunk.length)
                if generation.prompt_states is not None and states is not None:
                    generation.prompt_states.put(chunk.start, chunk.length, states, seq, row)
            row += chunk.length

    def abort_request(self, request_id: str) -> None:
        """Ends a request wherever it is: now, or after the step that another thread is in.

        An unknown or finished one is left as it is.
        """
        self._turns.leave(partial(self._abort, request_id))

    def _abort(self, request_id: str) -> None:
        generation = self._generations.get(request_id)
        if generation is not None:
            self._recorder.note("abort", generation)
            generation.abort()
            self._drop([c for c in generation.completions if c.request.request_id in self._completions])

    def _drop(self, finished: list[Completion]) -> None:
        """Forgets continuations that have ended, and their requests once all of theirs have."""
        if finished:
            self.scheduler.finish(completion.request for completion in finished)
            for completion in finished:
                _, generation = self._completions.pop(completion.request.request_id)
                if generation.is_finished:
                    found = self._generations.pop(generation.request.request_id, None)
                    if found is not None:
                        self._recorder.end(found)

    @property
    def _hosts(self) -> Hosts | None:
        return self.runner.compiler.hosts

    def call_when_lost(self, call: Callable[[HostLostError], None]) -> None:
        """Has something called, on another thread, when a host of several is lost: nothing can run then."""
        if self._hosts is not None:
            self._hosts.call_when_lost(call)

    def _start_over(self, error: BaseException) -> None:
        self.is_broken = True  # until all of this has worked
        self._recorder.note("failure")
        for generation in self._generations.values():
            generation.abort()
        self._generations.clear()
        self._completions.clear()
        self._in_flight = None
        if self._hosts is not None:
            if isinstance(error, Exception):  # nobody knows how far the other hosts are
                return self._hosts.fail(error)
            self._hosts.tell("reset")
        self.scheduler = self._new_scheduler()
        self.step_log = StepLog(self.step_log.num_steps)
        self.runner.reset()
        self.is_broken = False

    def reset_prefix_cache(self) -> None:
        """Forgets the pages that requests could share, as after a change of the weights."""
        with self._turns.take():
            self._check_open()
            self.scheduler.reset_prefix_cache()
            self._recorder.note("reset")

    def update_params(self, tree: Any, *, donate: bool = False) -> None:
        """As `LLM.update_params`; after the step that another thread is in.

        Raises:
          ValueError: the tree does not fit, or the engine records: the old parameters stay in force.
          NotImplementedError: the engine is of several hosts.
          RuntimeError: the engine is closed.
        """
        with self._turns.take():
            self._check_open()
            if self.config.record is not None:
                raise ValueError("a recording has one set of weights: update_params needs an engine without")
            if self._hosts is not None:
                raise NotImplementedError(
                    "update_params is of one host: with nnodes > 1 save a checkpoint, and start anew with it"
                )
            replace_params(self.runner, tree, donate=donate)
            self.scheduler.reset_prefix_cache()

    def has_unfinished_requests(self) -> bool:
        return bool(self._generations)

    def __contains__(self, request_id: object) -> bool:
        """Whether it has a request of this id that has not ended."""
        return request_id in self._generations

    def close(self) -> None:
        """Ends all requests and frees the device memory: now, or after the step that another thread is in.

        The engine cannot be used afterwards. Safe to call twice.
        """
        self.is_closed = True
        self._turns.leave(self._close)

    def _close(self) -> None:
        for request_id in list(self._generations):
            self._abort(request_id)
        self._in_flight = None
        self._preparation.grammars.close()
        self._recorder.close()
        if self._hosts is not None and self._hosts.lost is not None:
            return  # its devices may wait for the lost one, and nothing ends that but the end of the process
        if self._hosts is not None:
            self._hosts.close()  # first: the runner waits for compilations
        self.runner.close()
