"""A parser of what a model writes: whole, or as it grows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from pjengine.serving.text_feed import Reading, TextFeed, overlap

_MOST_SPACES = 64  # that may stand ahead of a mark and are not content


@dataclass
class Call:
    """A tool call, or what one has grown by: `id` and `name` are in its first part."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # JSON, or a piece of it


@dataclass
class Parts:
    """What a text, or a piece of it, holds."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)  # by index, each once

    def add(self, other: "Parts") -> "Parts":
        """Appends what comes after it."""
        self.reasoning += other.reasoning
        self.content += other.content
        for call in other.calls:
            if self.calls and self.calls[-1].index == call.index:
                self.calls[-1].arguments += call.arguments
            else:
                self.calls.append(Call(call.index, call.id, call.name, call.arguments))
        return self


class TextParser(ABC):
    """Takes a text in pieces; what it returns, put together, does not depend on the pieces.

    Nothing is returned before it is settled what it is: no half of a mark as content.
    """

    def __init__(self) -> None:
        self.feed = TextFeed()
        self.parts = Parts()  # settled, and not yet returned
        self._reading: Reading[None] | None = None

    @abstractmethod
    def read(self) -> Reading[None]:
        """Reads `feed` and adds to `parts`; what is left when it returns is content."""

    def push(self, text: str) -> Parts:
        """Takes the next piece, and returns what it settles."""
        self.feed.add(text)
        self._reading = self._reading or self._read_all()
        next(self._reading, None)
        settled, self.parts = self.parts, Parts()
        return settled

    def finish(self) -> Parts:
        """Returns the rest: the text has ended."""
        self.feed.is_ended = True
        return self.push("")

    def parse(self, text: str) -> Parts:
        """All of a text at once."""
        return self.push(text).add(self.finish())

    def _read_all(self) -> Reading[None]:
        yield from self.read()
        while True:
            self.feed.skip(len(self.feed.rest))
            self.give_back()
            yield

    def give_back(self) -> None:
        """What has been read, and turned out to be nothing else, is content."""
        self.parts.content += self.feed.take()

    def content_until(self, *marks: str) -> Reading[bool]:
        """Passes content on up to one of the marks, and to the spaces ahead of it; False: none came."""
        feed = self.feed
        while True:
            rest = feed.rest
            found = [index for mark in marks if (index := rest.find(mark)) >= 0]
            end = min(found) if found else len(rest) - max(overlap(rest, mark) for mark in marks)
            feed.skip(max(len(rest[:end].rstrip()), end - _MOST_SPACES))
            self.give_back()
            if found:
                yield from feed.space()
                return True
            if feed.is_ended:
                feed.skip(len(feed.rest))
                self.give_back()
                return False
            yield
