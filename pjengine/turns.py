"""One thread at a time: another one waits, is turned away, or leaves a call to be made."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Whose turn it is to change an object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()

    @contextmanager
    def take(self, *, is_waiting: bool = True) -> Iterator[None]:
        """A turn, after those of other threads.

        Raises:
          RuntimeError: it is another's, and this thread does not wait.
        """
        if not self._lock.acquire(blocking=is_waiting):
            raise RuntimeError("another thread runs this engine; use AsyncLLM, or one thread")
        try:
            yield
        finally:
            self._lock.release()
            self._make_calls()

    def leave(self, call: Callable[[], None]) -> None:
        """Makes a call in a turn of its own: now, or right after the one that is under way.

        It never waits: the garbage collector may come here in the middle of its own thread's turn.
        """
        self._calls.append(call)
        self._make_calls()

    def _make_calls(self) -> None:
        while self._calls and self._lock.acquire(blocking=False):
            try:
                while self._calls:
                    self._calls.popleft()()
            finally:
                self._lock.release()
