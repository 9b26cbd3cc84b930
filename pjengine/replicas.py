"""Replicas: several engines of one model behind one queue, each on devices of its own.

A request goes to one engine when it is queued, whole: its continuations, its beams, and the completions
that are scored together share pages. `routing.py` says to which. From then on it is that engine's: first
come, first served, and priorities, hold within an engine and not between two. Where it goes does not change
its tokens: noise is a function of seed and position, and seeds are drawn in the order of arrival.

Each engine advances on a thread of its own. `LLMEngine.advance` launches step n + 1, then waits for step n:
on one thread for all, an engine whose step takes 5 ms would wait for its neighbour's prompt of 40 ms. JAX
lets go of the interpreter while it waits, so that the threads share it for the host's part of a step alone,
and while that of one runs, the others' devices have a launched step before them. Engines run only while
somebody is in `advance`, as one engine does; it returns as soon as any of them has ended its step.
"""

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from pjengine.config import EngineConfig
from pjengine.engine import LLMEngine
from pjengine.generation import Generation
from pjengine.loading import load_replicas
from pjengine.outputs import RequestOutput
from pjengine.page_pool import page_hashes
from pjengine.prompts import Prompt
from pjengine.request import Request
from pjengine.routing import choose_engine, tokens_of
from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.turns import Turns
from pjengine.weights import copies_for

_EXIT_TIMEOUT_S = 10.0  # how long the interpreter's exit waits for steps under way


@dataclass(eq=False)
class _Replica:
    """One engine, and what waits for the end of the step that it has under way."""

    index: int
    engine: LLMEngine
    load: int = 0  # as `routing.py` counts it
    is_busy: bool = False  # its thread has a turn of it
    waiting: list[Generation] = field(default_factory=list)  # to be queued at the beginning of the next turn
    aborted: list[Generation] = field(default_factory=list)  # to be ended when this turn is over


@dataclass(frozen=True, eq=False)
class _Place:
    """Where an unfinished request is, and what it counts there."""

    replica: _Replica
    generation: Generation
    request_ids: Sequence[str]  # of its continuations
    num_tokens: int


@dataclass(frozen=True)
class _Ended:
    """What a replica's turn has come to."""

    replica: _Replica
    grown: Sequence[Generation]
    error: BaseException | None


class Replicas:
    """`data_parallel_size` engines that are used as one `LLMEngine`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.engines = _start_all(config)
        first = self.engines[0]
        self.model_config = first.model_config
        self.tokenizer = first.tokenizer
        self.max_model_len = first.max_model_len
        self.memory_plan = first.memory_plan  # of each
        self.is_closed = False
        self._turns = Turns()  # to change what is below; the engines' threads write into `_ended` alone
        self._replicas = [_Replica(index, engine) for index, engine in enumerate(self.engines)]
        self._places: dict[str, _Place] = {}  # by the id of each continuation
        self._forks: dict[str, list[_Place]] = {}  # of what shares pages by a name
        self._news: tuple[list[Generation], list[BaseException]] = [], []  # that `advance` has not told yet
        self._ended: SimpleQueue[_Ended | None] = SimpleQueue()  # None: nothing, but look again
        self._threads = _Threads(len(self.engines))
        weakref.finalize(self, self._threads.stop, 0.0).atexit = False  # without `close`

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Generation:
        """As `LLMEngine.add_request`."""
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
        """As `LLMEngine.prepare`: the engines are alike, and the first one prepares for all."""
        return self.engines[0].prepare(prompt, params, request_id=request_id, priority=priority)

    @property
    def default_sampling_params(self) -> SamplingParams:
        """As `LLMEngine.default_sampling_params`."""
        return self.engines[0].default_sampling_params

    def submit(self, generation: Generation) -> None:
        """Gives a prepared request to an engine, which queues it before its next step."""
        with self._turns.take():
            self._check_open()
            ids = [completion.request.request_id for completion in generation.completions]
            for request_id in ids:
                self._free_id(request_id)
            place = self._place(generation, ids)
            place.replica.load += place.num_tokens
            place.replica.waiting.append(generation)
            self._places |= dict.fromkeys(ids, place)
            if fork := generation.request.fork:
                self._forks.setdefault(fork, []).append(place)
            for completion in generation.completions:
                completion.request.metrics.engine_index = place.replica.index

    def _free_id(self, request_id: str) -> None:
        """Makes sure that no request has this id; waits for one that ends with the step under way.

        Raises:
          ValueError: a request has it.
        """
        while (place := self._places.get(request_id)) is not None:
            replica, generation = place.replica, place.generation
            if not replica.is_busy or not (generation.is_finished or generation in replica.aborted):
                raise ValueError(f"request id {request_id!r} is in use; choose another or leave it out")
            self._gather()

    def _place(self, generation: Generation, ids: Sequence[str]) -> _Place:
        """Chooses the engine of a request."""
        cached = self._cached(generation.request)
        if beside := self._forks.get(generation.request.fork):
            index = beside[0].replica.index
        else:
            index = choose_engine([replica.load for replica in self._replicas], cached)
        num_tokens = tokens_of(generation.request, len(generation.completions), cached[index])
        return _Place(self._replicas[index], generation, ids, num_tokens)

    def _cached(self, request: Request) -> list[int]:
        """Tokens of its prompt that each engine's prefix cache holds, as far as can be told beside a step."""
        if not (self.config.enable_prefix_caching and request.is_cache_read):
            return [0] * len(self.engines)
        size, tokens = self.config.page_size, request.prompt_token_ids
        request.page_hashes = page_hashes(tokens, size, request.salt)
        names = request.page_hashes[: (len(tokens) - 1) // size]
        return [len(engine.scheduler.pool.match(names)) * size for engine in self.engines]

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("these engines are closed; create others")

    def step(self) -> list[RequestOutput]:
        """As `LLMEngine.step`, of the engines that end their step first."""
        return [
            generation.output()
            for generation in self.advance()
            if generation.is_finished
            or generation.request.params.output_kind is not RequestOutputKind.FINAL_ONLY
        ]

    def advance(self) -> list[Generation]:
        """Has each engine take a step that has none under way; returns what grew in those that end first.

        If a device fails, the requests of its engine end as aborted, and the other engines go on with theirs.

        Raises:
          RuntimeError: closed, or another thread is in here; AsyncLLM is for several of them. Besides, what
            the `advance` of an engine raises.
        """
        with self._turns.take(is_waiting=False):
            self._check_open()
            for replica in self._replicas:
                if not replica.is_busy and (replica.waiting or replica.engine.has_unfinished_requests()):
                    arrived, replica.waiting = replica.waiting, []
                    replica.is_busy = True
                    self._threads.run(replica.index, partial(_take_turn, replica, arrived, self._ended))
            grown, errors = self._news
            if not (grown or errors) and any(replica.is_busy for replica in self._replicas):
                self._gather()
            if errors:
                raise errors.pop(0)
            self._news = [], []
            return list(dict.fromkeys(grown))

    def _gather(self) -> None:
        """Takes what engines have come to; waits for the first of them, or until `wake` is called."""
        found = [self._ended.get()]
        while not self._ended.empty():
            found.append(self._ended.get())
        for ended in found:
            if ended is not None:
                self._settle(ended)

    def _settle(self, ended: _Ended) -> None:
        """Books the end of a turn."""
        replica, (grown, errors) = ended.replica, self._news
        replica.is_busy = False
        aborted, replica.aborted = replica.aborted, []
        for generation in aborted:
            replica.engine.abort_request(generation.request.request_id)
        touched = [*ended.grown, *aborted]
        grown += touched
        if ended.error is not None:  # has ended them all
            errors.append(ended.error)
            touched += [place.generation for place in self._places.values() if place.replica is replica]
        for generation in touched:
            if generation.is_finished:
                self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        place = self._places.get(generation.request.request_id)
        if place is None or place.generation is not generation:
            return
        place.replica.load -= place.num_tokens
        for request_id in place.request_ids:
            del self._places[request_id]
        if fork := generation.request.fork:
            self._forks[fork].remove(place)
            if not self._forks[fork]:
                del self._forks[fork]

    def wake(self) -> None:
        """Has an `advance` that waits return, for who has a request for an idle engine. From any thread."""
        self._ended.put(None)

    def abort_request(self, request_id: str) -> None:
        """Ends a request: now, or when its engine's step is over. `advance` returns it then.

        An unknown or finished one is left as it is.
        """
        self._turns.leave(partial(self._abort, request_id))

    def _abort(self, request_id: str) -> None:
        place = self._places.get(request_id)
        if place is None or place.generation.request.request_id != request_id:
            return
        replica, generation = place.replica, place.generation
        if generation in replica.waiting:
            replica.waiting.remove(generation)
            generation.abort()
        elif replica.is_busy:
            replica.aborted.append(generation)
            return
        else:
            replica.engine.abort_request(request_id)
        self._forget(generation)
        self._news[0].append(generation)

    def reset_prefix_cache(self) -> None:
        """As `LLMEngine.reset_prefix_cache`, of all."""
        with self._turns.take():
            self._check_open()
            for engine in self.engines:
                engine.reset_prefix_cache()

    def update_params(self, tree: Any, *, donate: bool = False) -> None:
        """As `LLMEngine.update_params`: `tree` is of the first engine's devices, and each other gets a copy,
        which it keeps beside its old parameters until all have theirs.
        """
        with self._turns.take():
            self._check_open()
            own, *copies = copies_for([engine.runner for engine in self.engines], tree)
            self.engines[0].update_params(own, donate=donate)
            for engine, copy in zip(self.engines[1:], copies, strict=True):
                engine.update_params(copy, donate=True)

    def __contains__(self, request_id: object) -> bool:
        """Whether there is a request of this id whose end `advance` has not seen."""
        place = self._places.get(request_id) if isinstance(request_id, str) else None
        return place is not None and place.generation.request.request_id == request_id

    def has_unfinished_requests(self) -> bool:
        """Whether `advance` has more to tell."""
        return bool(self._places) or any(self._news)

    @property
    def is_broken(self) -> bool:
        """Whether an engine can run nothing any more. All end then: the process has to start anew."""
        return any(own.engine.is_broken and not own.is_busy for own in self._replicas)

    def close(self) -> None:
        """Ends all requests and frees the device memory, once no step is under way. Safe to call twice."""
        self.is_closed = True
        self._turns.leave(self._close)

    def _close(self) -> None:
        self._threads.stop()
        for place in self._places.values():
            place.generation.abort()
        self._places.clear()
        self._forks.clear()
        for engine in self.engines:
            engine.close()


type Engine = LLMEngine | Replicas


def start_engine(config: EngineConfig) -> Engine:
    """One engine, or `data_parallel_size` of them. Raises as `load_model` does."""
    return LLMEngine(config) if config.data_parallel_size == 1 else Replicas(config)


def engines_of(engine: Engine) -> Sequence[LLMEngine]:
    """Those that compute: itself, or each of the replicas."""
    return engine.engines if isinstance(engine, Replicas) else [engine]


def _start_all(config: EngineConfig) -> list[LLMEngine]:
    """Makes the engines beside each other, since each waits for its first programs."""
    loaded = load_replicas(config)
    own = replace(config, data_parallel_size=1)
    quiet = replace(own, use_tqdm_on_load=False)  # the bars of one are enough
    with ThreadPoolExecutor(len(loaded)) as pool:
        made = [pool.submit(LLMEngine, quiet if index else own, part) for index, part in enumerate(loaded)]
    if errors := [error for future in made if (error := future.exception()) is not None]:
        for future in made:
            if future.exception() is None:
                future.result().close()
        raise errors[0]
    return [future.result() for future in made]


def _take_turn(replica: _Replica, arrived: Sequence[Generation], told: "SimpleQueue[_Ended | None]") -> None:
    """What an engine's thread does: queues what has arrived, and advances once."""
    engine, grown, failure = replica.engine, list[Generation](), None
    try:
        for generation in arrived:
            engine.submit(generation)
        grown = engine.advance()
    except BaseException as error:  # of whoever called `advance` of all
        failure = error
        for generation in arrived:
            if generation.request.request_id not in engine:
                generation.abort()
    told.put(_Ended(replica, grown, failure))


class _Threads:
    """Threads that each do what they are given, in order. They know no engine but the one of their turn."""

    def __init__(self, count: int) -> None:
        self._inboxes: list[SimpleQueue[Callable[[], None] | None]] = [SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=_work, args=(inbox,), name=f"pjengine-engine-{index}", daemon=True)
            for index, inbox in enumerate(self._inboxes)
        ]
        for thread in self._threads:
            thread.start()
        # JAX takes its backend down at exit: no step may be under way then.
        atexit.register(self.stop, _EXIT_TIMEOUT_S)

    def run(self, index: int, job: Callable[[], None]) -> None:
        self._inboxes[index].put(job)

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends them after what they are in; waits for that, at most `timeout_s` each."""
        atexit.unregister(self.stop)
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)


def _work(inbox: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := inbox.get()) is not None:
        job()
        del job  # which holds an engine
