"""Texts with tool calls in them, as models write them, and what parsers make of them."""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

NAMES = ("f", "get_weather")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "is_on": {"type": "boolean"},
        "place": {"$ref": "#/$defs/Place"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "kind": {"enum": [1, "two", None]},
    },
    "$defs": {"Place": {"type": "object"}},
}
SCHEMAS = dict.fromkeys(NAMES, SCHEMA)

type Call = tuple[str, dict[str, Any]]


def hermes(content: str, calls: Iterable[Call]) -> str:
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return content + "".join(f"\n<tool_call>\n{text}\n</tool_call>" for text in texts)


def hermes_arguments_first(content: str, calls: Iterable[Call]) -> str:
    texts = [json.dumps({"arguments": arguments, "name": name}) for name, arguments in calls]
    return content + "".join(f"<tool_call>{text}</tool_call>" for text in texts)


def llama3(content: str, calls: Iterable[Call]) -> str:
    text = "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    return f"{content}<|python_tag|>{text}" if content and text else content or text


def mistral_list(content: str, calls: Iterable[Call]) -> str:
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"{content}[TOOL_CALLS] {json.dumps(objects)}" if objects else content


def mistral_named(content: str, calls: Iterable[Call]) -> str:
    return content + "".join(f"[TOOL_CALLS]{name}{json.dumps(arguments)}" for name, arguments in calls)


def mistral_with_ids(content: str, calls: Iterable[Call]) -> str:
    texts = [f"{name}[CALL_ID]a1B2c3D4e[ARGS]{json.dumps(arguments)}" for name, arguments in calls]
    return content + "".join(f"[TOOL_CALLS]{text}" for text in texts)


def qwen3(content: str, calls: Iterable[Call]) -> str:
    def function(name: str, arguments: dict[str, Any]) -> str:
        values = [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments.items()
        ]
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
        return f"<function={name}>\n{inner}</function>"

    return content + "".join(f"\n<tool_call>\n{function(*call)}\n</tool_call>" for call in calls)


# What writes a text, and the name of the parser that reads it.
WRITERS = {
    hermes: "hermes",
    hermes_arguments_first: "hermes",
    llama3: "llama3_json",
    mistral_list: "mistral",
    mistral_named: "mistral",
    mistral_with_ids: "mistral",
    qwen3: "qwen3",
}


def parser(name: str) -> Any:
    """One of the parsers, for tools that take `SCHEMA`; "required" and "named" are those of forced calls."""
    from pjengine.serving.forced_calls import NamedCallParser, RequiredCallsParser
    from pjengine.serving.tool_parsers import TOOL_PARSERS

    if name == "named":
        return NamedCallParser({"f": SCHEMA})
    return RequiredCallsParser(SCHEMAS) if name == "required" else TOOL_PARSERS[name](SCHEMAS)


def pieces(text: str, cuts: Iterable[int]) -> Iterator[str]:
    """The text, cut at these places."""
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    yield from (text[start:end] for start, end in pairwise(places))


def parse_pieces(parser: Any, texts: Iterable[str]) -> Any:
    from pjengine.serving.text_parser import Parts

    parts = Parts()
    for text in texts:
        parts.add(parser.push(text))
    return parts.add(parser.finish())


def shown(parts: Any) -> tuple[str, str, list[tuple[str | None, str]]]:
    """All of a message but the ids of its calls."""
    assert [call.index for call in parts.calls] == list(range(len(parts.calls)))
    return parts.reasoning, parts.content, [(call.name, call.arguments) for call in parts.calls]


def in_order(parser: Any, text: str) -> list[str]:
    """What is content, and what are arguments, in the order of the text; neighbours are joined."""
    found: list[tuple[Any, str]] = []
    for part in [*map(parser.push, text), parser.finish()]:
        own = [("content", part.content)] if part.content else []
        own += [(call.index, call.arguments) for call in part.calls if call.arguments]
        for kind, piece in own:
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + piece)
            else:
                found.append((kind, piece))
    return [piece for _, piece in found]
