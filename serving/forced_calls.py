"""Tool calls whose form a grammar has forced on the model, whatever form it was trained to."""

from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser


class RequiredCallsParser(ToolParser):
    """A JSON array of calls: `[{"name": ..., "parameters": {...}}, ...]`."""

    def read(self) -> Reading[None]:
        feed = self.feed
        yield from feed.space()
        separator = yield from feed.mark("[")
        while separator in ("[", ","):
            yield from feed.space()
            if not (yield from self.read_call("parameters")):
                return
            yield from feed.space()
            separator = yield from feed.mark(",", "]")
        if separator == "]":
            self.pass_over()


class NamedCallParser(ToolParser):
    """The arguments of the one tool that there is in `schemas`."""

    def read(self) -> Reading[None]:
        yield from self.feed.space()
        if (yield from self.feed.wait(1)) == "{":
            (name,) = self.schemas
            self.begin(name)
            yield from self.feed.json_object(self.grow)
