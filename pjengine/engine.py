"""LLMEngine: requests in, outputs out. The one owner of mutable state."""

import logging
import time

import numpy as np

from pjengine.config import EngineConfig
from pjengine.generation import Generation
from pjengine.loading import LoadedModel, load_model
from pjengine.outputs import RequestOutput
from pjengine.page_pool import PagePool
from pjengine.prompts import Prompt, encode_prompt
from pjengine.request import Request, new_request_id
from pjengine.runner import Launched, Runner
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from pjengine.tokenizer import IncrementalDetokenizer

logger = logging.getLogger(__name__)


class LLMEngine:
    """Runs requests step by step.

    Each step is launched before the last one is read, so that the device never waits for the host;
    a token therefore comes out one call of `step` after the step that computed it was launched.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        loaded: LoadedModel = load_model(config)
        self.model_config = loaded.model.config
        self.tokenizer = loaded.tokenizer
        self.max_model_len = loaded.runner_config.max_model_len
        self.memory_plan = loaded.memory_plan
        sizes = loaded.runner_config
        self.runner = Runner(loaded.model, loaded.params, sizes, loaded.sharding)
        self.scheduler = self._new_scheduler()
        self._in_flight: Launched | None = None
        self._generations: dict[str, Generation] = {}
        self.is_broken = False  # a step failed, and so did starting over: nothing can run any more
        self._seeds = np.random.default_rng(config.seed)
        if config.warm_up:
            self.runner.warm_up()

    def _new_scheduler(self) -> Scheduler:
        sizes = self.runner.config
        return Scheduler(
            PagePool(sizes.num_pages),
            sizes.page_size,
            sizes.max_num_seqs,
            sizes.max_num_batched_tokens,
            is_caching=self.config.enable_prefix_caching,
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
          ValueError: the prompt is empty, too long or out of the vocabulary; the request can never
            fit; its id is in use; or a priority is given under another policy. Nothing is queued then.
        """
        params = params or SamplingParams()
        generation = self.prepare(prompt, params, request_id=request_id, priority=priority)
        self.submit(generation)
        return generation

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> Generation:
        """Checks a request without queueing it. Raises as `add_request` does.

        May run on another thread, beside a step.
        """
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} needs scheduling_policy='priority'")
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and skip_tokenizer_init=True")
        vocab_size = self.model_config.vocab_size
        encoded = encode_prompt(
            prompt, self.tokenizer, vocab_size=vocab_size, max_tokens=self.max_model_len - 1
        )
        num_prompt = len(encoded.token_ids)
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, num_prompt + params.max_tokens)
        is_seeded = params.seed is not None and params.seed >= 0
        request = Request(
            request_id=request_id or new_request_id(),
            prompt=encoded.text,
            prompt_token_ids=encoded.token_ids,
            params=params,
            max_total_tokens=limit,
            eos_token_ids=frozenset(self.model_config.eos_token_ids),
            seed=params.seed if is_seeded and params.seed is not None else int(self._seeds.integers(2**63)),
            priority=priority,
            salt=f"{encoded.cache_salt}/{self.model_config.rope.excess(num_prompt)}",
        )
        self.scheduler.check_fits(request)
        return Generation(request, self._detokenizer(params, encoded.token_ids))

    def _detokenizer(self, params: SamplingParams, prompt_ids: list[int]) -> IncrementalDetokenizer | None:
        if not params.detokenize or self.tokenizer is None:
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            prompt_ids=prompt_ids[-16:],  # enough to tell whether the text starts here
        )

    def submit(self, generation: Generation) -> None:
        """Queues a prepared request."""
        request_id = generation.request.request_id
        if request_id in self._generations:
            raise ValueError(f"request id {request_id!r} is in use; choose another or leave it out")
        self.scheduler.add(generation.request)
        self._generations[request_id] = generation

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns the requests that got a token from the step before."""
        return [generation.output() for generation in self.advance()]

    def advance(self) -> list[Generation]:
        """Launches the next step, then reads the one before it; returns what grew.

        If the device fails, every unfinished request ends as aborted, the pages return, and the
        engine goes on with new requests.
        """
        try:
            schedule = self.scheduler.schedule()
            launched = self.runner.launch(schedule) if schedule.chunks else None
            self._in_flight, ended = launched, self._in_flight
            return self._take_results(ended) if ended is not None else []
        except BaseException as error:
            if isinstance(error, Exception):  # not Ctrl-C
                logger.error("a step failed; aborted requests=%d", len(self._generations))
            self._start_over()
            raise

    def _take_results(self, ended: Launched) -> list[Generation]:
        grown = []
        tokens, now = ended.read().tokens.tolist(), time.perf_counter()
        for chunk, token in zip(ended.schedule.chunks, tokens, strict=False):  # the rest is padding
            request = chunk.request
            if not chunk.is_sampled or chunk.epoch != request.epoch or request.is_finished:
                continue  # the middle of a prompt, preempted since, or ended by the token before
            request.num_pending -= 1
            generation = self._generations[request.request_id]
            generation.push(token, now)
            grown.append(generation)
        self._drop([generation for generation in grown if generation.is_finished])
        return grown

    def abort_request(self, request_id: str) -> None:
        """Ends a request now, wherever it is. An unknown or finished one is left as it is."""
        generation = self._generations.get(request_id)
        if generation is not None:
            generation.abort()
            self._drop([generation])

    def _drop(self, finished: list[Generation]) -> None:
        if finished:
            self.scheduler.finish(generation.request for generation in finished)
            for generation in finished:
                del self._generations[generation.request.request_id]

    def _start_over(self) -> None:
        self.is_broken = True  # until all of this has worked
        for generation in self._generations.values():
            generation.abort()
        self._generations.clear()
        self._in_flight = None
        self.scheduler = self._new_scheduler()
        self.runner.reset()
        self.is_broken = False

    def reset_prefix_cache(self) -> None:
        """Forgets the pages that requests could share, as after a change of the weights."""
        self.scheduler.reset_prefix_cache()

    def has_unfinished_requests(self) -> bool:
        return bool(self._generations)

    def close(self) -> None:
        """Ends all requests and frees the device memory. The engine cannot be used afterwards."""
        for request_id in list(self._generations):
            self.abort_request(request_id)
        self._in_flight = None
        self.runner.close()
