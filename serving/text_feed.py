"""Text that comes in pieces, read as if it were there already.

A reader is a generator. It yields where it needs more text to decide, and is resumed when there is more, or
when there will be none. What it decides depends on the text alone, never on how that came in pieces.
"""

import json
from collections.abc import Callable, Generator
from typing import Any

MAX_NAME_CHARS = 256  # of a function, a parameter or a key: a reader waits for no longer ones

type Reading[T] = Generator[None, None, T]


class TextFeed:
    """The text that has come and is not yet taken, and how far into it a reader is."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self.is_ended = False  # no more will come

    @property
    def rest(self) -> str:
        """What has come and has not been read."""
        return self._text[self._position :]

    def add(self, text: str) -> None:
        self._text += text

    def take(self) -> str:
        """What has been read since the last call; it cannot be read again."""
        taken, self._text = self._text[: self._position], self._text[self._position :]
        self._position = 0
        return taken

    def skip(self, count: int) -> str:
        """Reads characters that have come."""
        text = self._text[self._position : self._position + count]
        self._position += count
        return text

    def wait(self, count: int) -> Reading[str]:
        """The next characters, unread: fewer than `count` only where the text ends before."""
        while len(self._text) < self._position + count and not self.is_ended:
            yield
        return self._text[self._position : self._position + count]

    def space(self) -> Reading[None]:
        while True:
            rest = self.rest
            num_spaces = len(rest) - len(rest.lstrip())
            self.skip(num_spaces)
            if num_spaces < len(rest) or self.is_ended:
                return
            yield

    def mark(self, *marks: str) -> Reading[str | None]:
        """Reads the one of the marks that comes next; None: none does.

        Where the text ends within a mark, the beginning of it is read, and returned.
        """
        while True:
            rest = self.rest
            for mark in marks:
                if rest.startswith(mark):
                    return self.skip(len(mark))
            is_open = any(mark.startswith(rest) for mark in marks)
            if not is_open or self.is_ended:
                return self.skip(len(rest)) if is_open and rest else None
            yield

    def word(self, is_letter: Callable[[str], bool]) -> Reading[str | None]:
        """Reads the letters that come next; None: there are none, or too many, or the text ends with them."""
        for length in range(MAX_NAME_CHARS + 1):
            text = yield from self.wait(length + 1)
            if len(text) <= length:
                return None
            if not is_letter(text[length]):
                return self.skip(length) or None
        return None

    def string(self) -> Reading[str | None]:
        """Reads a short JSON string; None: there is none."""
        if (yield from self.wait(1)) != '"':
            return None
        is_escaped = False
        for length in range(2, MAX_NAME_CHARS + 3):
            text = yield from self.wait(length)
            if len(text) < length or text[-1] < " ":
                return None
            if text[-1] == '"' and not is_escaped:
                try:
                    value: Any = json.loads(text)
                except ValueError:  # an escape that JSON does not have
                    return None
                self.skip(length)
                return value
            is_escaped = text[-1] == "\\" and not is_escaped
        return None

    def json_object(self, emit: Callable[[str], None]) -> Reading[bool]:
        """Reads a JSON object and passes it on as it comes, to the bracket that closes it.

        Returns whether it did close. Nothing else about it is checked: it is passed on before it could be.
        """
        depth, is_string, is_escaped = 0, False, False
        while True:
            rest = self.rest
            for count, char in enumerate(rest, 1):
                if is_escaped:
                    is_escaped = False
                elif is_string:
                    is_escaped, is_string = char == "\\", char != '"'
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                    if depth == 0:
                        emit(self.skip(count))
                        return True
                else:
                    is_string = char == '"'
            emit(self.skip(len(rest)))
            if self.is_ended:
                return False
            yield

    def passage(self, end: str, emit: Callable[[str], None]) -> Reading[bool]:
        """Passes text on up to `end` and a newline ahead of it, read as well; returns whether it came."""
        ends = (end, f"\n{end}")
        while True:
            rest = self.rest
            index = rest.find(end)
            if index >= 0:
                emit(rest[: index - 1 if rest[:index].endswith("\n") else index])
                self.skip(index + len(end))
                return True
            num_held = max(overlap(rest, mark) for mark in ends)
            emit(self.skip(len(rest) - num_held))
            if self.is_ended:
                self.skip(num_held)
                return False
            yield


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    longest = min(len(mark) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(mark[:count])), 0)
