"""LLMEngine: requests in, outputs out. The one owner of mutable state."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pjengine.config import EngineConfig
from pjengine.generation import Generation
from pjengine.loading import LoadedModel, load_model
from pjengine.outputs import RequestOutput
from pjengine.page_pool import PagePool
from pjengine.request import Request, new_request_id
from pjengine.runner import Launched, Runner
from pjengine.sampling_params import SamplingParams
from pjengine.scheduler import Scheduler
from pjengine.tokenizer import IncrementalDetokenizer

logger = logging.getLogger(__name__)

# A text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}; what ids hold is checked one by one.
type Prompt = str | Sequence[Any] | np.ndarray | Mapping[str, Any]


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
        self._seeds = np.random.default_rng(config.seed)
        if config.warm_up:
            self.runner.warm_up()

    def _new_scheduler(self) -> Scheduler:
        sizes = self.runner.config
        return Scheduler(
            PagePool(sizes.num_pages), sizes.page_size, sizes.max_num_seqs, sizes.max_num_batched_tokens
        )

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Generation:
        """Queues a request and returns what will grow as `step` is called.

        Raises:
          ValueError: the prompt is empty, too long or out of the vocabulary; the request can never
            fit; or its id is in use. Nothing is queued then.
        """
        generation = self.prepare(prompt, params or SamplingParams(), request_id=request_id)
        self.submit(generation)
        return generation

    def prepare(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> Generation:
        """Checks a request without queueing it. Raises as `add_request` does."""
        text, token_ids = self._encode(prompt)
        num_prompt = len(token_ids)
        if num_prompt == 0:
            raise ValueError("the prompt is empty: at least one token is needed")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens; with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer. Shorten it or raise max_model_len"
            )
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, num_prompt + params.max_tokens)
        if params.detokenize and self.tokenizer is None and params.stop_strings:
            raise ValueError("stop strings need a tokenizer, and skip_tokenizer_init=True")
        is_seeded = params.seed is not None and params.seed >= 0
        request = Request(
            request_id=request_id or new_request_id(),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            max_total_tokens=limit,
            eos_token_ids=frozenset(self.model_config.eos_token_ids),
            seed=params.seed if is_seeded and params.seed is not None else int(self._seeds.integers(2**63)),
        )
        self.scheduler.check_fits(request)
        detokenizer = None
        if params.detokenize and self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                prompt_ids=token_ids[-16:],  # enough to tell whether the text starts here
            )
        return Generation(request, detokenizer)

    def submit(self, generation: Generation) -> None:
        """Queues a prepared request."""
        request_id = generation.request.request_id
        if request_id in self._generations:
            raise ValueError(f"request id {request_id!r} is in use; choose another or leave it out")
        self.scheduler.add(generation.request)
        self._generations[request_id] = generation

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "a text prompt needs a tokenizer, and skip_tokenizer_init=True: pass token ids"
                )
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            return self._encode_dict(prompt)
        if not isinstance(prompt, Sequence | np.ndarray):
            raise TypeError(f"a prompt is a str, a list of token ids or a dict, got {type(prompt).__name__}")
        if len(prompt) == 0:
            return None, []
        if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in prompt):
            raise TypeError(f"token ids must be whole numbers in one list, got {prompt!r:.80}")
        token_ids = np.asarray(prompt)
        vocab_size = self.model_config.vocab_size
        outside = (token_ids < 0) | (token_ids >= vocab_size)
        if outside.any():
            raise ValueError(
                f"token id {token_ids[outside][0]} is out of the vocabulary of {vocab_size} tokens"
            )
        return None, token_ids.tolist()

    def _encode_dict(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            got = ", ".join(map(repr, prompt)) or "nothing"
            raise ValueError(f"a prompt dict holds 'prompt' or 'prompt_token_ids', got {got}")
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), self._encode(list(prompt["prompt_token_ids"]))[1]
        return self._encode(prompt["prompt"])

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
        except BaseException:
            self._start_over()
            raise

    def _take_results(self, ended: Launched) -> list[Generation]:
        grown = []
        for chunk, token in zip(ended.schedule.chunks, ended.read(), strict=True):
            request = chunk.request
            if not chunk.is_sampled or chunk.epoch != request.epoch or request.is_finished:
                continue  # the middle of a prompt, preempted since, or ended by the token before
            request.num_pending -= 1
            generation = self._generations[request.request_id]
            generation.push(token)
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
        for generation in self._generations.values():
            generation.abort()
        logger.error("a step failed; aborted requests=%d", len(self._generations))
        self._generations.clear()
        self._in_flight = None
        self.scheduler = self._new_scheduler()
        self.runner.reset()

    def has_unfinished_requests(self) -> bool:
        return bool(self._generations)

    def close(self) -> None:
        """Ends all requests and frees the device memory. The engine cannot be used afterwards."""
        for request_id in list(self._generations):
            self.abort_request(request_id)
        self._in_flight = None
        self.runner.close()
