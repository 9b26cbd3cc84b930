"""What a model thinks before it answers, split from the answer: `<think>...</think>`."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from pjengine.serving.text_feed import Reading, overlap
from pjengine.serving.text_parser import TextParser


class ReasoningParser(TextParser):
    """Splits a text at the first closing mark; an opening mark ahead of it is not shown."""

    marks: ClassVar[tuple[str, str]] = ("<think>", "</think>")

    def __init__(self, prompt: str = "", begun: str = "") -> None:
        """`prompt` is what the text continues, and `begun` the part of it that is of the same message."""
        super().__init__()
        opening, closing = self.marks
        end = prompt.rstrip()
        self._is_open = end.endswith(opening) or begun.rfind(opening) > begun.rfind(closing)
        self._is_closed = not self._is_open and (end.endswith(closing) or bool(begun.strip()))

    @abstractmethod
    def _is_thought(self, *, is_opened: bool) -> bool:
        """Whether a text begins with reasoning of which the prompt says nothing."""

    @property
    def rule(self) -> str:
        """What may stand ahead of an answer whose form is forced: in the Lark language, with `thought`."""
        if self._is_closed:
            return ""
        is_certain = self._is_open or self._is_thought(is_opened=False)
        return "thought" if is_certain else f'("{self.marks[0]}" thought)?'

    def read(self) -> Reading[None]:
        feed, (opening, closing) = self.feed, self.marks
        if self._is_closed:
            return
        yield from feed.space()
        is_opened = (yield from feed.mark(opening)) == opening
        if not self._is_open and not self._is_thought(is_opened=is_opened):
            return
        if is_opened:
            feed.take()
        while True:
            rest = feed.rest
            index = rest.find(closing)
            feed.skip(index if index >= 0 else len(rest) - (0 if feed.is_ended else overlap(rest, closing)))
            self.parts.reasoning += feed.take()
            if index >= 0:
                feed.skip(len(closing))
                feed.take()
                return
            if feed.is_ended:
                return
            yield


class DeepSeekR1Parser(ReasoningParser):
    """The model always thinks first; the opening mark may be in the prompt."""

    def _is_thought(self, *, is_opened: bool) -> bool:
        return True


class Qwen3ReasoningParser(ReasoningParser):
    """The model thinks where the prompt, or it, opens the reasoning, and where it was not told not to."""

    def _is_thought(self, *, is_opened: bool) -> bool:
        return is_opened


REASONING_PARSERS: Mapping[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1Parser,
    "qwen3": Qwen3ReasoningParser,
}
