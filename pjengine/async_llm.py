"""AsyncLLM: one engine on a thread of its own, for the tasks of any number of event loops."""

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pjengine.config import EngineConfig, known_settings
from pjengine.generation import Generation
from pjengine.outputs import RequestOutput
from pjengine.prompts import Prompt
from pjengine.replicas import Engine, Replicas, start_engine
from pjengine.request import request_id_for
from pjengine.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

_EXIT_TIMEOUT_S = 10.0  # how long the interpreter's exit waits for a step under way


class EngineGenerateError(RuntimeError):
    """A step failed, and the request with it. The engine goes on with new requests."""


class EngineDeadError(RuntimeError):
    """The engine is closed, or has failed and cannot go on."""


class AsyncLLM:
    """A model, loaded and ready, that many tasks use at once.

    Args:
      model: a folder in the Hugging Face format, a Hub id, or "demo" for the packaged model.
      **settings: the fields of `EngineConfig`, under vLLM's names.

    Raises:
      TypeError: no such setting.
      NotImplementedError: a setting of vLLM asks for what is not here.
      ValueError, OSError: the model or a setting is not possible; the text says what to change.

    Use it as an asynchronous context manager, or call `close()`: the device memory then returns at once.
    """

    def __init__(self, model: str | os.PathLike[str], **settings: Any) -> None:
        self._start(start_engine(EngineConfig(model=os.fspath(model), **known_settings(settings))))

    @classmethod
    def from_engine(cls, engine: Engine) -> "AsyncLLM":
        """Takes over an engine: from now on only this object's thread runs it, and `close` closes it."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: Engine) -> None:
        self._thread = _EngineThread(engine)
        # Without `close`, the engine ends with the last reference to this object.
        weakref.finalize(self, self._thread.inbox.put, None).atexit = False

    @property
    def engine(self) -> Any:
        """The engine underneath, an `LLMEngine` or `Replicas`, to look at (`tokenizer`, `model_config`, ...):
        its thread runs it.
        """
        return self._thread.engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields what there is, each time that there is more; the last output is `finished`.

        An output holds all so far or what is new, or is the last alone, as `output_kind` of the parameters
        says. A consumer slower than the engine gets fewer outputs, and misses nothing.
        The request starts with the first `anext`, as `async for` does. Leaving the loop, `aclose`,
        cancelling the task or dropping the generator ends it and frees its pages.

        Raises:
          ValueError: the prompt or the parameters are not possible, or the id is in use.
          EngineGenerateError: a step failed while the request ran; `__cause__` says why.
          EngineDeadError: the engine is closed, or has failed for good.
        """
        thread, request_id = self._thread, request_id_for(request_id)
        stream = thread.open(
            request_id,
            partial(
                thread.engine.prepare,
                prompt,
                sampling_params,
                request_id=request_id,
                priority=priority,
            ),
            has_grammar=getattr(sampling_params, "structured_outputs", None) is not None,
        )
        try:
            is_finished = False
            while not is_finished:
                output = await stream.next_output()
                is_finished = output.finished
                yield output
        finally:
            thread.release(stream)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose consumer gets a last output with finish_reason "abort".

        An unknown or finished one is left as it is.
        """
        self._thread.abort(request_id)

    async def reset_prefix_cache(self) -> None:
        """Forgets the pages that requests could share, as after a change of the weights.

        Raises:
          EngineDeadError: the engine is closed, or has failed for good.
        """
        await asyncio.wrap_future(self._thread.call(self.engine.reset_prefix_cache))

    async def update_params(self, tree: Any, *, donate: bool = False) -> None:
        """Puts other weights in force between two steps, as `LLM.update_params` does.

        Requests under way go on with them.

        Raises:
          ValueError: the tree does not fit; the old weights stay in force.
          NotImplementedError: the engine is of several hosts.
          EngineDeadError: the engine is closed, or has failed for good.
        """
        await asyncio.wrap_future(self._thread.call(partial(self.engine.update_params, tree, donate=donate)))

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return not self._thread.is_closed

    @property
    def num_unread(self) -> int:
        """Continuations that have ended, and whose last output nobody has taken yet."""
        return self._thread.num_unread()

    @property
    def errored(self) -> bool:
        """Whether the engine has failed for good."""
        return self._thread.failure is not None

    async def check_health(self) -> None:
        """Raises EngineDeadError if requests are not taken any more."""
        self._thread.check()

    def close(self) -> None:
        """Ends all requests, as `abort` does, and frees the device memory. Safe to call twice.

        Waits for the step under way. Requests whose prompt is still being tokenized get EngineDeadError.
        """
        self._thread.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)


@dataclass(eq=False, kw_only=True)
class _Stream:
    """One request, between the engine's thread and the task that waits for it.

    The engine's thread writes `generation`, `error` and `is_ended`, then calls `_signal`; at most one
    signal is under way, however slow the task is. What is refused before the engine has it, the task's own
    thread is told (`_refuse`).
    """

    request_id: str
    loop: asyncio.AbstractEventLoop
    arrival_s: float = field(default_factory=time.perf_counter)
    generation: Generation | None = None  # None: not queued yet
    error: Exception | None = None
    is_ended: bool = False  # nothing more will come
    is_aborted: bool = False
    is_signalled: bool = False  # `changed` is set, or will be
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_shown: int = 0

    async def next_output(self) -> RequestOutput:
        """Waits until there are more tokens, or the end; returns what there is."""
        output: RequestOutput | None = None
        while True:
            await self.changed.wait()
            self.changed.clear()
            self.is_signalled = False
            is_ended = self.is_ended  # read first: what is read after it is then complete
            if self.error is not None:
                raise self.error
            assert self.generation is not None
            if self.generation.num_output_tokens == self.num_shown and not is_ended:
                continue  # the signal before this one showed them
            output = output or self._take(self.generation)
            # What a failed step has aborted looks finished, too; the signal of its end tells it apart.
            if is_ended or not output.finished:
                return output

    def _take(self, generation: Generation) -> RequestOutput:
        output = generation.output()
        is_delta = generation.request.params.output_kind is RequestOutputKind.DELTA
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self.num_shown = num_tokens + (self.num_shown if is_delta else 0)
        return output


class _EngineThread:
    """Owns the engine. Other threads leave calls in `inbox`; it makes them between two steps.

    Prompts are tokenized on one more thread, in order of arrival, while steps run. Those with a grammar,
    which may take seconds to compile, have another thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: the end
        self.is_closed = False
        self.failure: BaseException | None = None  # what ended the thread before its time
        # Of several engines, one that is idle need not wait for the others' steps.
        self._wake = engine.wake if isinstance(engine, Replicas) else None
        self._lock = threading.Lock()  # of `is_closed`, `_open` and `_calls`
        self._open: dict[str, _Stream] = {}  # whose consumer still waits
        self._calls: list[Future[None]] = []  # that somebody waits for
        self._live: dict[str, _Stream] = {}  # whose request the engine has; of the engine's thread alone
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="pjengine-tokenize")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="pjengine-compile")
        self._thread = threading.Thread(target=self._run, name="pjengine-engine", daemon=True)
        self._thread.start()
        if not isinstance(engine, Replicas):  # which are of one host
            engine.call_when_lost(lambda lost: self.inbox.put(partial(_raise, lost)))
        # JAX takes its backend down at exit: no step may be under way then.
        atexit.register(self.close, _EXIT_TIMEOUT_S)

    # Called by any thread.

    def check(self) -> None:
        if self.is_closed:
            raise self._dead_error()

    def open(self, request_id: str, prepare: Callable[[], Generation], *, has_grammar: bool) -> _Stream:
        """Starts a request for the running event loop."""
        stream = _Stream(request_id=request_id, loop=asyncio.get_running_loop())
        with self._lock:
            self.check()
            if request_id in self._open:
                raise ValueError(f"request id {request_id!r} is in use; choose another or leave it out")
            self._open[request_id] = stream
            preparer = self._compiler if has_grammar else self._preparer
            preparer.submit(self._prepare, stream, prepare)
        return stream

    def _prepare(self, stream: _Stream, prepare: Callable[[], Generation]) -> None:
        if self.is_closed or self._open.get(stream.request_id) is not stream:  # nobody waits any more
            return
        try:
            generation = prepare()
        except BaseException as error:  # tokenizers and grammars panic with one that is no Exception
            if not isinstance(error, Exception):
                error = RuntimeError(f"the request could not be prepared: {error!r}")
            if not self.is_closed:  # which may be why; all that are open are told so
                self._call_loop(stream.loop, [stream], partial(_refuse, stream, error))
            return
        for completion in generation.completions:
            completion.request.metrics.arrival_s = stream.arrival_s
        self._leave(lambda: self._submit(stream, generation))

    def _leave(self, call: Callable[[], None] | None) -> None:
        """Leaves a call for the engine's thread."""
        self.inbox.put(call)
        if self._wake is not None:
            self._wake()

    def num_unread(self) -> int:
        with self._lock:
            generations = [stream.generation for stream in self._open.values() if stream.is_ended]
        return sum(len(generation.completions) for generation in generations if generation is not None)

    def abort(self, request_id: str) -> None:
        with self._lock:
            stream = self._open.get(request_id)
        if stream is not None:
            self._request_abort(stream)

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Has the engine's thread call a function between two steps."""
        done: Future[None] = Future()

        def call() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                function()
                done.set_result(None)
            except Exception as error:  # of the caller
                done.set_exception(error)

        with self._lock:
            self.check()
            self._calls = [call for call in self._calls if not call.done()] + [done]
            self._leave(call)
        return done

    def _request_abort(self, stream: _Stream) -> None:
        stream.is_aborted = True
        self._leave(lambda: self._abort(stream))

    def release(self, stream: _Stream) -> None:
        """Ends a request that nobody waits for any more, and frees its id."""
        self._request_abort(stream)
        with self._lock:
            if self._open.get(stream.request_id) is stream:
                del self._open[stream.request_id]

    def close(self, timeout_s: float | None = None) -> None:
        with self._lock:
            self.is_closed = True
        self._leave(None)
        self._thread.join(timeout_s)
        for preparer in (self._preparer, self._compiler):
            preparer.shutdown(wait=timeout_s is None)

    def _dead_error(self) -> EngineDeadError:
        if self.failure is None:
            return EngineDeadError("this AsyncLLM is closed; create another")
        error = EngineDeadError(f"the engine failed and cannot go on; create another: {self.failure!r}")
        error.__cause__ = self.failure
        return error

    # Called by the engine's thread.

    def _run(self) -> None:
        try:
            while self._make_calls():
                self._step()
            for stream in list(self._live.values()):
                self._abort(stream)
            while self._live:  # in engines whose step is under way
                self._step()
        except BaseException as error:
            logger.exception("the engine has failed and cannot go on")
            self.failure = error
        with self._lock:
            self.is_closed = True
            left = list(self._open.values())
            calls = [call for call in self._calls if not call.done()]
        try:
            for call in calls:
                if call.set_running_or_notify_cancel():
                    call.set_exception(self._dead_error())
            for stream in left:
                self._give_up(stream)
            self.engine.close()
        finally:
            for preparer in (self._preparer, self._compiler):
                preparer.shutdown(wait=False)
            atexit.unregister(self.close)

    def _make_calls(self) -> bool:
        """Makes the calls that are there, and waits for one if there is nothing to run; False: the end."""
        while True:
            try:
                call = self.inbox.get(block=not self.engine.has_unfinished_requests())
            except Empty:
                return True
            if call is None:
                return False
            call()

    def _step(self) -> None:
        try:
            grown = self.engine.advance()
        except Exception as error:
            if self.engine.is_broken:
                raise
            for stream in [own for own in self._live.values() if own.request_id not in self.engine]:
                stream.error = EngineGenerateError(f"request {stream.request_id!r}: a step failed: {error}")
                stream.error.__cause__ = error
                self._end(stream)
            return
        streams = []
        for generation in grown:
            request_id = generation.request.request_id
            if request_id not in self._live or self._live[request_id].generation is not generation:
                continue  # the engine had it before this thread had the engine, or nobody waits for it
            stream = self._live[request_id]
            if generation.is_finished:
                stream.is_ended = True
                del self._live[request_id]
            elif generation.request.params.output_kind is RequestOutputKind.FINAL_ONLY:
                continue
            streams.append(stream)
        self._signal(streams)

    def _submit(self, stream: _Stream, generation: Generation) -> None:
        stream.generation = generation
        if stream.is_aborted:
            generation.abort()
            self._end(stream)
            return
        try:
            self.engine.submit(generation)
        except Exception as error:  # of this request alone
            stream.error = error
            self._end(stream)
        else:
            self._live[stream.request_id] = stream

    def _abort(self, stream: _Stream) -> None:
        """Ends a request; one that is not queued yet is ended by `_submit`.

        Several engines end one in the middle of a step when that is over, and `advance` returns it.
        """
        if stream.generation is not None and not stream.is_ended:
            self.engine.abort_request(stream.request_id)
            if self._wake is None or stream.request_id not in self.engine:
                self._end(stream)

    def _give_up(self, stream: _Stream) -> None:
        if self.failure is None:
            self._abort(stream)
        if not stream.is_ended:
            stream.error = self._dead_error()
            self._end(stream)

    def _end(self, stream: _Stream) -> None:
        stream.is_ended = True
        self._live.pop(stream.request_id, None)
        self._signal([stream])

    def _signal(self, streams: Iterable[_Stream]) -> None:
        """Wakes the tasks that wait for these, with one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for stream in streams:
            if stream.loop.is_closed():  # perhaps with a signal under way: its tasks are gone
                self.release(stream)
            elif not stream.is_signalled:
                stream.is_signalled = True
                by_loop.setdefault(stream.loop, []).append(stream)
        for loop, own in by_loop.items():
            self._call_loop(loop, own, partial(_wake, own))

    def _call_loop(
        self, loop: asyncio.AbstractEventLoop, streams: list[_Stream], call: Callable[[], None]
    ) -> None:
        """Has the loop of some streams make a call; if it is closed, nobody waits for them any more."""
        try:
            loop.call_soon_threadsafe(call)
        except RuntimeError:
            for stream in streams:
                self.release(stream)


def _raise(error: Exception) -> None:
    raise error


def _refuse(stream: _Stream, error: Exception) -> None:
    stream.error = stream.error or error
    stream.changed.set()


def _wake(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.changed.set()
