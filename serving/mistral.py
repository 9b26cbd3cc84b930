"""Tool calls as Mistral's models write them, behind `[TOOL_CALLS]`.

Older ones write a list, `[{"name": ..., "arguments": {...}}, ...]`; newer ones a name and its arguments,
`name{...}`, or `name[CALL_ID]id[ARGS]{...}`, and the mark again ahead of the next.
"""

import re
import secrets
import string

from pjengine.serving.text_feed import Reading
from pjengine.serving.tool_parser import ToolParser

_ID = re.compile(r"[a-zA-Z0-9]{9}")  # the chat templates take no others


class MistralParser(ToolParser):
    """Both forms, whichever comes."""

    marks = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    @classmethod
    def new_id(cls) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def begin(self, name: str, call_id: str | None = None) -> None:
        super().begin(name, call_id if call_id is not None and _ID.fullmatch(call_id) else None)

    def read(self) -> Reading[None]:
        feed, mark = self.feed, self.marks[0]
        while (yield from self.content_until(mark)):
            yield from feed.mark(mark)
            yield from feed.space()
            if (yield from feed.mark("[")):
                yield from self._read_list()
            else:
                yield from self._read_named()
            self.give_back()

    def _read_list(self) -> Reading[None]:
        feed = self.feed
        yield from feed.space()
        while (yield from self.read_call("arguments", "parameters")):
            yield from feed.space()
            separator = yield from feed.mark(",", "]")
            if separator == "]":
                self.pass_over()
            if separator != ",":
                return
            yield from feed.space()

    def _read_named(self) -> Reading[None]:
        feed, (_, id_mark, arguments_mark) = self.feed, self.marks
        name = yield from self.read_name()
        if name is None:
            return
        call_id = None
        if (yield from feed.mark(id_mark)):
            call_id = yield from feed.word(str.isalnum)
        yield from feed.mark(arguments_mark)
        yield from feed.space()
        if (yield from feed.wait(1)) == "{":
            self.begin(name, call_id)
            yield from feed.json_object(self.grow)
