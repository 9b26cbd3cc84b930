"""The compiled programs: loaded or made by threads of their own, in the order in which they are needed."""

import logging
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from pjengine.progress import Show

logger = logging.getLogger(__name__)


@runtime_checkable
class Maker[L: Hashable, P](Protocol):
    """How one program comes to be. Called from several threads, `lower` from one at a time."""

    def load(self, layout: L) -> P | None:
        """From the cache, if it is there."""

    def lower(self, layout: L) -> Any:
        """Traced and lowered."""

    def compile(self, layout: L, lowered: Any) -> P:
        """Compiled, and kept in the cache."""


class CompilationError(RuntimeError):
    """A program could not be made; `__cause__` says why."""


class Stage(Enum):
    LOAD = "load"
    LOWER = "lower"
    COMPILE = "compile"


@dataclass(slots=True)
class _Task[L]:
    """A program under way."""

    layout: L
    stage: Stage = Stage.LOAD
    lowered: Any = None
    is_running: bool = False


class Programs[L: Hashable, P]:
    """Programs by layout, ready or under way.

    Loading and compiling run beside each other. Tracing holds the interpreter's lock, so that several
    traces at once would only delay the most urgent one: there is one at a time. Threads live as long as
    there is work; they also end, after the stage that they are in, when the main thread does.
    """

    def __init__(self, maker: Maker[L, P], num_threads: int) -> None:
        self.ready: dict[L, P] = {}
        self.failed: dict[L, BaseException] = {}  # until they are wanted again
        self._maker = maker
        self._num_threads = num_threads
        self._tasks: list[_Task[L]] = []  # most urgent first
        self._threads: list[threading.Thread] = []
        self._num_working = 0  # of the threads, those that will look for more to do
        self._is_closed = False
        self._changed = threading.Condition()  # guards all of the above

    def start(self, layouts: Sequence[L]) -> None:
        """Puts `layouts` in front of all that is not begun yet, in this order, and returns.

        Raises:
          RuntimeError: closed.
        """
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the programs are closed")
            for layout in layouts:
                self.failed.pop(layout, None)
            under_way = {task.layout: task for task in self._tasks}
            urgent = [under_way.get(layout, _Task(layout)) for layout in layouts if layout not in self.ready]
            self._tasks = urgent + [task for task in self._tasks if task not in urgent]
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for _ in range(min(len(self._tasks), self._num_threads) - self._num_working):
                thread = threading.Thread(target=self._work, name="pjengine-programs")
                thread.start()
                self._threads.append(thread)
                self._num_working += 1
            self._changed.notify_all()

    def put(self, layout: L, program: P) -> None:
        """Takes a program that was made elsewhere."""
        with self._changed:
            self.ready[layout] = program
            self._changed.notify_all()

    def drop(self, layout: L) -> None:
        """Lets go of a program, or does not make it after all."""
        with self._changed:
            self.ready.pop(layout, None)
            self.failed.pop(layout, None)
            self._tasks = [task for task in self._tasks if task.layout != layout]
            self._changed.notify_all()

    def wait(self, layouts: Sequence[L], show: Show = lambda num_ready, total: None) -> None:
        """Returns once all of `layouts` are ready; makes them before any others, and shows how many are.

        Raises what a thread met while it made one of them; it is made anew when it is wanted again.
        """
        self.start(layouts)
        with self._changed:
            while not self._is_closed:
                for layout in layouts:
                    if layout in self.failed:
                        raise self.failed.pop(layout)
                num_ready = sum(layout in self.ready for layout in layouts)
                show(num_ready, len(layouts))
                if num_ready == len(layouts):
                    return
                self._changed.wait()
        raise RuntimeError("the programs are closed")

    def is_under_way(self, layouts: Iterable[L]) -> bool:
        """Whether any of `layouts` is being made, or waits for it."""
        with self._changed:
            return not {task.layout for task in self._tasks}.isdisjoint(layouts)

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns once a stage of a program is done, or after `timeout_s`."""
        with self._changed:
            if not self._is_closed:
                self._changed.wait(timeout_s)

    def close(self) -> None:
        """Drops all programs and waits for the threads, which finish the stage that they are in."""
        with self._changed:
            self._is_closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.ready.clear()

    def _work(self) -> None:
        """What a thread does: the most urgent stage, again and again until there is none."""
        while (task := self._take()) is not None:
            try:
                program = self._advance(task)
            except BaseException as error:  # it belongs to whoever waits
                self._put_back(task, failure=error)
            else:
                self._put_back(task, program)

    def _take(self) -> _Task[L] | None:
        with self._changed:
            while self._tasks and not self._is_closed and threading.main_thread().is_alive():
                if (task := self._most_urgent()) is not None:
                    task.is_running = True
                    return task
                self._changed.wait()
            self._num_working -= 1
            return None

    def _most_urgent(self) -> _Task[L] | None:
        can_lower = not any(task.is_running and task.stage is Stage.LOWER for task in self._tasks)
        for task in self._tasks:
            if not task.is_running and (can_lower or task.stage is not Stage.LOWER):
                return task
            can_lower &= task.stage is not Stage.LOAD  # it may turn out to be the next to be lowered
        return None

    def _advance(self, task: _Task[L]) -> P | None:
        if task.stage is Stage.LOAD:
            return self._maker.load(task.layout)
        if task.stage is Stage.LOWER:
            task.lowered = self._maker.lower(task.layout)
            return None
        return self._maker.compile(task.layout, task.lowered)

    def _put_back(
        self, task: _Task[L], program: P | None = None, failure: BaseException | None = None
    ) -> None:
        with self._changed:
            if not any(task is other for other in self._tasks):  # dropped, or all are closed
                return
            task.is_running = False
            task.stage = Stage.LOWER if task.stage is Stage.LOAD else Stage.COMPILE
            if failure is not None:
                self.failed[task.layout] = failure
                logger.error("the program for %s could not be made: %r", task.layout, failure)
            elif program is not None:
                self.ready[task.layout] = program
            if program is not None or failure is not None:
                self._tasks = [other for other in self._tasks if other is not task]
            self._changed.notify_all()
