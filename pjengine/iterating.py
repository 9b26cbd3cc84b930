"""Completes prompts that come one by one, of which a bounded number is anywhere at any time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pjengine.generation import Generation
from pjengine.outputs import RequestOutput
from pjengine.prompts import Prompt
from pjengine.replicas import Engine, engines_of
from pjengine.sampling_params import SamplingParams

# Times max_num_seqs. So many requests are with the engine: one that ends finds another waiting.
IN_FLIGHT = 2
# So many are begun whose outputs nobody has taken, where these come in order: behind a long one others end.
UNTAKEN = 8

type Task = tuple[int, Prompt, Any]  # a prompt's number, the prompt, its SamplingParams or None


def generate_each(
    engine: Engine,
    prompts: Iterator[Prompt],
    params: Any,
    *,
    priority: Any,
    make_bar: Callable[[], Any],
) -> Iterator[RequestOutput]:
    """What `LLM.generate` does with an iterator."""
    tasks = in_step(prompts, params)

    def outputs() -> Iterator[RequestOutput]:
        bar = make_bar()
        try:
            for _, output in complete_each(engine, tasks, priority=priority, is_ordered=True):
                bar.update(1)
                yield output
        finally:
            bar.close()

    return outputs()


def in_step(prompts: Iterator[Prompt], params: Any) -> Iterator[Task]:
    """Numbers prompts, and gives each its parameters: the next of an iterator, or those that all have.

    Raises:
      TypeError: `params` are neither.
      ValueError: they end before the prompts do; raised as that prompt is reached.
    """
    if not (params is None or isinstance(params, SamplingParams | Iterator)):
        raise TypeError(
            "sampling_params must be SamplingParams, or an iterator of them in step with the prompts; "
            f"got {type(params).__name__}"
        )
    return _in_step(prompts, params)


def _in_step(prompts: Iterator[Prompt], params: Any) -> Iterator[Task]:
    nothing = object()
    for number, prompt in enumerate(prompts):
        own: Any = next(params, nothing) if isinstance(params, Iterator) else params
        if own is nothing:
            raise ValueError(
                f"sampling_params ended before prompt {number}: give one for each prompt, or one"
            )
        yield number, prompt, own


def complete_each(
    engine: Engine, tasks: Iterator[Task], *, priority: Any = 0, is_ordered: bool
) -> Iterator[tuple[int, RequestOutput]]:
    """Yields the number and the output of each task: as it ends, or in order, which is that of 0, 1, 2 …

    Tasks are taken between steps, while the device computes. What is under way when the loop is left, or when
    `tasks` raises, is aborted.

    Raises:
      ValueError, TypeError: a task is not possible, and all before it have been yielded; names its number.
    """
    num_rows = sum(own.runner.config.max_num_seqs for own in engines_of(engine))
    under_way = _UnderWay(engine, tasks, priority)
    ended: dict[int, RequestOutput] = {}
    num_yielded, was_away = 0, False
    try:
        while True:
            num_untaken = len(under_way.numbers) + len(ended)
            under_way.fill(IN_FLIGHT * num_rows, UNTAKEN * num_rows - num_untaken)
            if not under_way.numbers:
                break
            ended |= under_way.advance(was_away)
            was_away = False
            while ended and (not is_ordered or num_yielded in ended):
                number = num_yielded if is_ordered else next(iter(ended))
                num_yielded, was_away = num_yielded + 1, True
                yield number, ended.pop(number)
    finally:
        under_way.abort()
    if under_way.refusal is not None:
        raise under_way.refusal


@dataclass
class _UnderWay:
    """The requests that are with the engine."""

    engine: Engine
    tasks: Iterator[Task]
    priority: Any
    numbers: dict[Generation, int] = field(default_factory=dict)
    is_open: bool = True  # there may be more tasks
    refusal: Exception | None = None  # why one was not possible

    def fill(self, most: int, most_new: int) -> None:
        """Begins tasks, until `most` are with the engine."""
        for _ in range(min(most - len(self.numbers), most_new)):
            task = next(self.tasks, None) if self.is_open else None
            if task is None:
                self.is_open = False
                return
            number, prompt, params = task
            try:
                generation = self.engine.prepare(prompt, params, priority=self.priority)
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                self.is_open, self.refusal = False, kind(f"prompt {number}: {error}")
                return
            self.engine.submit(generation)
            self.numbers[generation] = number

    def advance(self, was_away: bool) -> dict[int, RequestOutput]:
        """Runs a step; what has ended in it, and while the caller `was_away`, in steps that it ran itself."""
        grown = self.engine.advance()
        is_any = was_away or not self.engine.has_unfinished_requests()
        looked_at = list(self.numbers) if is_any else grown
        ended = [own for own in looked_at if own in self.numbers and own.is_finished]
        return {self.numbers.pop(generation): generation.output() for generation in ended}

    def abort(self) -> None:
        for generation in self.numbers:
            self.engine.abort_request(generation.request.request_id)
