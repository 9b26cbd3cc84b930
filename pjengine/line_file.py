"""A file of lines that one process at a time appends to, and that the next one goes on with after a crash."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LineFile:
    """See `open_line_file`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Its whole lines, each with the place of its first byte. What a crash has cut off is none."""
        place = 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield place, line
                place += len(line)

    def drop_torn_line(self) -> None:
        """Drops what follows the last whole line."""
        with open(self.path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - 2**16)
                file.seek(begin)
                if (found := file.read(end - begin).rfind(b"\n")) >= 0:
                    end = begin + found + 1
                    break
                end = begin
        os.ftruncate(self._descriptor, end)

    def append(self, line: bytes) -> int:
        """Writes a line, its end included, through to the system; returns the place of its first byte.

        In one piece: a crash leaves a whole line, or one without an end.
        """
        place = os.fstat(self._descriptor).st_size
        while line:
            line = line[os.write(self._descriptor, line) :]
        return place


@contextmanager
def open_line_file(path: Path) -> Iterator[LineFile]:
    """Opens a file for this process alone, or makes it. Nothing in it is changed.

    Raises:
      ValueError: another process is writing it.
      OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another run") from error
        if os.fstat(descriptor).st_ino != os.stat(path).st_ino:
            raise ValueError(f"{path} has just been replaced by another run")
        yield LineFile(path, descriptor)
    finally:
        os.close(descriptor)
