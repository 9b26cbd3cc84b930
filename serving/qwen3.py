"""Tool calls as Qwen3-Coder writes them, in a kind of XML:

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

Values are bare text; what they are in JSON follows from the schema of the tool.
"""

import json

from pjengine.serving.schema_values import json_of, types_of
from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser


def _is_of_key(char: str) -> bool:
    return char.isprintable() and char not in "<>"


class Qwen3Parser(ToolParser):
    """The outer marks may be missing, as some models leave them out."""

    marks = ("<tool_call>", "<function=", "<parameter=", "</parameter>", "</function>", "</tool_call>")

    def read(self) -> Reading[None]:
        feed, (outer, opening, *_, outer_end) = self.feed, self.marks
        while (yield from self.content_until(outer, opening)):
            is_marked = (yield from feed.mark(outer, opening)) == outer
            if is_marked:
                yield from feed.space()
                if not (yield from feed.mark(opening)):
                    self.give_back()
                    continue
            if (yield from self._read_function()) and is_marked:
                yield from feed.space()
                if (yield from feed.mark(outer_end)):
                    self.pass_over()
            self.give_back()

    def _read_function(self) -> Reading[bool]:
        """Reads a call from its name on; returns whether it came to its end."""
        feed, (_, _, opening, _, closing, _) = self.feed, self.marks
        name = yield from self.read_name()
        if name is None or not (yield from feed.mark(">")):
            return False
        self.begin(name)
        self.grow("{")
        separator = ""
        while True:
            yield from feed.space()
            mark = yield from feed.mark(opening, closing)
            key = (yield from feed.word(_is_of_key)) if mark == opening else None
            if key is None or not (yield from feed.mark(">")):
                if mark == closing or not feed.is_ended:
                    self.grow("}")
                else:  # cut off
                    feed.skip(len(feed.rest))
                    self.pass_over()
                return mark == closing
            self.grow(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._read_value(types_of(self.schemas.get(name, {}), key))):
                return False
            separator = ", "

    def _read_value(self, types: frozenset[str]) -> Reading[bool]:
        """Reads a parameter's value; texts are passed on as they come, others when they are complete."""
        feed, closing = self.feed, self.marks[3]
        yield from feed.mark("\n")
        if types == {"string"}:
            self.grow('"')
            is_complete = yield from feed.passage(
                closing, lambda text: self.grow(json.dumps(text, ensure_ascii=False)[1:-1])
            )
            if is_complete:
                self.grow('"')
            return is_complete
        held: list[str] = []
        is_complete = yield from feed.passage(closing, held.append)
        text = "".join(held)
        self.grow(json_of(text, types) if is_complete else text)
        return is_complete
