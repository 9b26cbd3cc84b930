"""Service: what the routes share. It lets requests in, runs them on the engine, and counts them.

A request's life: the task of its connection calls `outputs`, which reads the prompts, opens one stream
of the engine for each, and yields what they give. Whoever closes that generator, because the client has
left, the time is up or the answer is complete, ends the streams, and the engine frees their pages.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastapi import Request

from pjengine.async_llm import AsyncLLM
from pjengine.generation import NO_TOKEN
from pjengine.outputs import RequestOutput
from pjengine.replicas import engines_of
from pjengine.sampling_params import SamplingParams
from pjengine.schedule import FORBIDDEN
from pjengine.serving.errors import ApiError, bad_request
from pjengine.serving.metrics import Metrics
from pjengine.serving.prompt_reader import GivenPrompt, PromptReader
from pjengine.serving.server_config import ServerConfig
from pjengine.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

_SAMPLING = [own.name for own in fields(SamplingParams)]

type Outputs = AsyncGenerator[tuple[int, RequestOutput], None]  # by the index of the prompt


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of a client, as far as the engine is concerned."""

    request_id: str  # as the client knows it; the engine has ids of its own
    prompts: Sequence[
        GivenPrompt | Callable[[], GivenPrompt]
    ]  # or what reads them, on the tokenizer's thread
    params: SamplingParams
    # The form of an answer, where it depends on the prompt's text; None: that of `params`.
    form: Callable[[str], StructuredOutputsParams | None] = lambda prompt: None
    priority: int = 0
    cache_salt: str = ""
    user: str | None = None
    fields: Mapping[str, str] = field(
        default_factory=dict
    )  # of the body, where the engine's names are others


class Service:
    """The engine, who may use it, and what it has done."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        engine = llm.engine
        self.model_names = config.served_model_names or (engine.config.model,)
        self.created = int(time.time())
        self.prompts = PromptReader(
            tokenizer=engine.tokenizer,
            max_tokens=engine.max_model_len - 1,
            is_request_template_trusted=config.trust_request_chat_template,
            default_template_kwargs=config.default_chat_template_kwargs,
            are_unused_tools_hidden=config.exclude_tools_when_tool_choice_none,
        )
        self.metrics = Metrics(engine, model_name=self.model_names[0], prefix=config.metrics_prefix)
        self.num_requests = 0  # that are being answered
        self._num_sequences = 0  # of theirs, whose prompts' streams are open or will be
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="pjengine-prompts")

    @property
    def default_params(self) -> SamplingParams:
        return self.llm.engine.default_sampling_params

    @property
    def max_sequences_per_request(self) -> int:
        """So that one request does not hold all others up: prompts x n, or best_of in place of n."""
        limit = self.config.max_sequences_per_request
        return max(8 * self.num_rows, 128) if limit is None else limit

    @property
    def num_rows(self) -> int:
        """Continuations that run at once, in all engines together."""
        return sum(own.runner.config.max_num_seqs for own in engines_of(self.llm.engine))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError if a model is named that is not served here."""
        if name is not None and name not in self.model_names:
            raise ApiError(404, f"The model `{name:.200}` does not exist.", param="model")

    async def read[T](self, function: Callable[[], T]) -> T:
        """Has the tokenizer's thread do something."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)

    async def outputs(self, call: Call) -> Outputs:
        """Yields what the engine gives for each prompt, until all have finished.

        Raises:
          ApiError: too many wait already; a prompt or parameter is not possible; or the engine ended the
            request before its time.
          EngineGenerateError, EngineDeadError: a step failed, or the engine.
        """
        with self._logged(call) as log, self._admitted(call) as leave:
            prompts = [await self.read(prompt) if callable(prompt) else prompt for prompt in call.prompts]
            salt = {"cache_salt": call.cache_salt}
            streams = [self._stream({**prompt, **salt}, call, leave) for prompt in prompts]
            async with aclosing(merge(streams)) as merged:
                async for index, output in merged:
                    log(index, output)
                    yield index, output

    async def _stream(
        self, prompt: GivenPrompt, call: Call, leave: Callable[[], None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """One prompt's outputs, measured; calls `leave` when they have ended."""
        params, output = call.params, None
        watch = self.metrics.watch(params)
        try:
            if (form := call.form(prompt.get("prompt", ""))) is not None:
                params = replace(params, structured_outputs=form)
            async with aclosing(self.llm.generate(prompt, params, priority=call.priority)) as outputs:
                async for output in outputs:
                    watch.see(output)
                    for completion in output.outputs:
                        if completion.finish_reason == "error":
                            raise _failure(str(completion.stop_reason), call)
                        if completion.finish_reason == "abort":
                            raise ApiError(503, "the server is shutting down, and has ended this request")
                    yield output
        except (ValueError, TypeError) as error:
            if output is not None:  # not of the caller, whose mistakes are found before anything is run
                raise
            watch.refuse()
            raise bad_request(error, (*_SAMPLING, "priority", "prompt"), call.fields) from error
        finally:
            leave()
            watch.end()

    @contextmanager
    def _admitted(self, call: Call) -> Iterator[Callable[[], None]]:
        """Counts a call's continuations; gives what is to be called when those of one prompt have ended."""
        num_sequences = len(call.prompts) * call.params.num_sequences
        if num_sequences == 0:
            raise ApiError(400, "prompt is empty: at least one is needed", param="prompt")
        if num_sequences > (limit := self.max_sequences_per_request):
            name = call.params.num_field
            raise ApiError(
                400,
                f"{name}: prompts x {name} is {num_sequences}, and this server takes at most {limit} in one "
                "request (--max-sequences-per-request)",
                param=name,
            )
        most = self.config.max_waiting
        if most is not None:
            # What the engine has finished waits for its client alone, who may be slow to read.
            num_open = self._num_sequences - self.llm.num_unread
            room = self.num_rows + most - num_open
            if num_sequences > room:
                raise ApiError(503, "too many requests wait; try again", headers={"Retry-After": "1"})
        self.num_requests += 1
        self._num_sequences += num_sequences
        num_left = num_sequences

        def leave() -> None:
            nonlocal num_left
            num_left -= call.params.num_sequences
            self._num_sequences -= call.params.num_sequences

        try:
            yield leave
        finally:
            self.num_requests -= 1
            self._num_sequences -= num_left  # of prompts that were never run

    @contextmanager
    def _logged(self, call: Call) -> Iterator[Callable[[int, RequestOutput], None]]:
        """A line for what came and one for how it ended, if they are wanted; no prompt, no answer."""
        if not self.config.enable_log_requests:
            yield lambda index, output: None
            return
        name, newest = call.request_id, dict[int, RequestOutput]()
        changed = _changed(call.params)
        logger.info(
            "request %s user=%r prompts=%d params=%.1000s", name, call.user, len(call.prompts), changed
        )
        begun, end = time.perf_counter(), "given up"
        try:
            yield newest.__setitem__
            end = "finished"
        except ApiError as error:
            end = f"refused with {error.status}"
            raise
        finally:
            logger.info(
                "request %s %s after %.3f s: prompt_tokens=%d output_tokens=%d",
                name,
                end,
                time.perf_counter() - begun,
                sum(len(output.prompt_token_ids) for output in newest.values()),
                sum(output.metrics.num_generation_tokens for output in newest.values()),
            )

    def close(self) -> None:
        """Ends all requests, and the engine."""
        self.llm.close()
        self._tokenizing.shutdown(wait=False)


def service_of(request: Request) -> Service:
    return request.app.state.service


def _failure(reason: str, call: Call) -> ApiError:
    """What a request has failed with, on its way.

    A form that nothing fulfils, or that turns out to be too large, is the caller's mistake even there.
    """
    error = bad_request(ValueError(reason), ("structured_outputs",), call.fields)
    is_callers = reason == NO_TOKEN[FORBIDDEN] or error.param is not None
    return ApiError(400 if is_callers else 500, f"the request failed: {error.message}", param=error.param)


def _changed(params: SamplingParams) -> dict[str, Any]:
    default = SamplingParams()
    both = {name: (getattr(params, name), getattr(default, name)) for name in _SAMPLING}
    return {name: value for name, (value, usual) in both.items() if value != usual}


async def merge[T](streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields what any of the streams gives, with its index; the first error ends them all.

    Each stream goes on once its last item has been taken: a slow consumer holds it up, the others do not.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()  # None: a stream has ended
    taken = [asyncio.Event() for _ in streams]

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait((index, item))
                    await taken[index].wait()
                    taken[index].clear()
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            found = await items.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                num_open -= 1
            else:
                yield found
                taken[found[0]].set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
