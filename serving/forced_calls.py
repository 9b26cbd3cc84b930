"""Tool calls whose form a grammar has forced on the model, whatever form it was trained to."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pjengine.serving.reasoning import ReasoningParser
from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser
from pjengine.structured_outputs import StructuredOutputsParams

_SPACES = " ?"  # between the tokens of forced JSON; small models that may add more never end


def forced_form(
    schema: Mapping[str, Any], reasoning: ReasoningParser | None = None
) -> StructuredOutputsParams:
    """The form of an answer that is JSON, behind the reasoning that its parser may read first.

    Raises:
      ValueError: the schema is too long, or no Unicode.
    """
    if reasoning is None or not reasoning.rule:
        return StructuredOutputsParams(json=schema, whitespace_pattern=_SPACES)
    closing = re.escape(reasoning.marks[1]).replace("/", "\\/")
    settings = {"whitespace_flexible": True, "whitespace_pattern": _SPACES, "lenient": False}
    answer = json.dumps({**schema, "x-guidance": settings})
    return StructuredOutputsParams(
        grammar=f"""start: {reasoning.rule} SPACE? answer
thought[lazy]: /(?s:.*){closing}/
SPACE: /[ \\n]{{1,8}}/
answer: %json {answer}
"""
    )


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
