"""Tool calls as Hermes and Qwen2.5 write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser


class HermesParser(ToolParser):
    """Each call stands between marks of its own."""

    marks = ("<tool_call>", "</tool_call>")

    def read(self) -> Reading[None]:
        feed, (opening, closing) = self.feed, self.marks
        while (yield from self.content_until(opening)):
            yield from feed.mark(opening)
            yield from feed.space()
            if (yield from self.read_call("arguments", "parameters")):
                yield from feed.space()
                if (yield from feed.mark(closing)):
                    self.pass_over()
            self.give_back()
