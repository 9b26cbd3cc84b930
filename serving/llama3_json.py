"""Tool calls as Llama 3 writes them: `{"name": ..., "parameters": {...}}`, with `;` between several."""

from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser


class Llama3JsonParser(ToolParser):
    """A call stands where the text begins, behind another call, or behind the mark."""

    marks = ("<|python_tag|>",)

    def read(self) -> Reading[None]:
        feed, (tag,) = self.feed, self.marks
        while True:
            yield from feed.space()
            yield from feed.mark(tag)
            yield from feed.space()
            while (yield from self.read_call("parameters", "arguments", needs_arguments=True)):
                yield from feed.space()
                yield from feed.mark(";")
                yield from feed.space()
                yield from feed.mark(tag)
                yield from feed.space()
            self.give_back()
            if not (yield from self.content_until(tag)):
                return
