"""What the parsers of tool calls share: each of them knows how one family of models writes calls."""

import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pjengine.serving.text_feed import Reading
from pjengine.serving.text_parser import Call, TextParser

_KEYS = ("name", "id", "type")  # of an object that is a call, beside its arguments


class ToolParser(TextParser):
    """Finds the tool calls in what a model writes.

    A call has begun once its name is known and its arguments begin. From there on it is one, however it
    ends, and its arguments are passed on as they come. What begins like a call and is none is content.
    """

    marks: ClassVar[tuple[str, ...]] = ()  # which may be special tokens of the model

    def __init__(
        self,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        """`schemas` are those of the arguments, by the name of the tool."""
        super().__init__()
        self.schemas = schemas or {}
        self._make_id = make_id or self.new_id
        self._num_calls = 0
        self._is_after_call = False  # nothing has followed it, or spaces

    @classmethod
    def new_id(cls) -> str:
        """An id for a call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def begin(self, name: str, call_id: str | None = None) -> None:
        """What has been read begins a call."""
        self.parts.calls.append(Call(self._num_calls, call_id or self._make_id(), name))
        self._num_calls += 1
        self.pass_over()

    def grow(self, arguments: str) -> None:
        """What has been read are arguments of the last call, written like this."""
        index = self._num_calls - 1
        if not self.parts.calls or self.parts.calls[-1].index != index:
            self.parts.calls.append(Call(index))
        self.parts.calls[-1].arguments += arguments
        self.pass_over()

    def pass_over(self) -> None:
        """What has been read belongs to a call, and holds nothing more."""
        self.feed.take()
        self._is_after_call = True

    def give_back(self) -> None:
        text = self.feed.take()
        if self._is_after_call and text.isspace() and self.feed.is_ended and not self.feed.rest:
            return
        self._is_after_call = self._is_after_call and not text
        self.parts.content += text

    def read_call(self, *keys: str, needs_arguments: bool = False) -> Reading[bool]:
        """Reads a call that is a JSON object: its "name", and its arguments under one of `keys`.

        Returns whether it is one. What has been read ends where it turned out to be none, or to end.
        """
        feed, found, held = self.feed, dict[str, str](), list[str]()  # held: arguments ahead of the name
        has_arguments = False
        separator = yield from feed.mark("{")
        while separator in ("{", ","):
            key = yield from self._read_key()
            if key in keys and not has_arguments and (yield from feed.wait(1)) == "{":
                has_arguments = True
                if "name" in found:
                    self.begin(found["name"], found.get("id"))
                yield from feed.json_object(self.grow if "name" in found else held.append)
            elif key in _KEYS and key not in found and (value := (yield from feed.string())):
                found[key] = value
                if key == "name" and has_arguments:
                    self.begin(value, found.get("id"))
                    self.grow("".join(held))
            else:
                break
            yield from feed.space()
            separator = yield from feed.mark(",", "}")
        if separator == "}" and "name" in found and not has_arguments and not needs_arguments:
            has_arguments = True
            self.begin(found["name"], found.get("id"))
            self.grow("{}")
        is_call = has_arguments and "name" in found
        if is_call and separator == "}":
            self.pass_over()
        return is_call

    def read_name(self) -> Reading[str | None]:
        """Reads a name that stands bare, not in a JSON string; None: there is none."""
        return (
            yield from self.feed.word(lambda char: char.isascii() and (char.isalnum() or char in "_.:/-"))
        )

    def _read_key(self) -> Reading[str | None]:
        feed = self.feed
        yield from feed.space()
        key = yield from feed.string()
        yield from feed.space()
        if key is None or not (yield from feed.mark(":")):
            return None
        yield from feed.space()
        return key
