"""The grammar of an answer that calls tools if it likes to, with arguments that their schemas allow."""

import json
from collections.abc import Callable, Mapping, Sequence

from pjengine.serving.hermes import HermesParser
from pjengine.serving.llama3_json import Llama3JsonParser
from pjengine.serving.tool_parser import ToolParser
from pjengine.serving.tool_schemas import any_call_schema
from pjengine.serving.tools import Function

_SPACES = " ?"  # between the tokens of a call's JSON
_ANY_OBJECT = {"type": "object"}


def strict_grammar(parser: type[ToolParser], functions: Sequence[Function], *, is_one: bool) -> str | None:
    """In the Lark language: text, and calls as the parser reads them; `is_one`: of at most one.

    None: there is no grammar for calls of that form. Functions that are not strict take any object.
    """
    write = _GRAMMARS.get(parser)
    return None if write is None else write(functions, is_one)


def _hermes(functions: Sequence[Function], is_one: bool) -> str:
    return f"""start: (before SPACE? call SPACE? "</tool_call>"){"?" if is_one else "*"} TEXT
before[lazy]: /(?s:.*)<tool_call>/
TEXT: /(?s:.*)/ & ~/(?s:.*<tool_call>.*)/
SPACE: /[ \\n]+/
call: %json {_call_schema(functions, "arguments")}
"""


def _llama3(functions: Sequence[Function], is_one: bool) -> str:
    return f"""start: TEXT | call{"" if is_one else ' (";" SPACE? call)*'}
TEXT: /(?s:.*)/ & ~/(?s:\\s*\\{{.*)/ & ~/(?s:.*<\\|python_tag\\|>.*)/
SPACE: /[ \\n]+/
call: %json {_call_schema(functions, "parameters")}
"""


def _call_schema(functions: Sequence[Function], key: str) -> str:
    schemas = [
        (function.name, function.schema_of_arguments if function.strict else _ANY_OBJECT)
        for function in functions
    ]
    settings = {"whitespace_flexible": True, "whitespace_pattern": _SPACES, "lenient": False}
    return json.dumps({"x-guidance": settings, **any_call_schema(schemas, key, root="#")})


_GRAMMARS: Mapping[type[ToolParser], Callable[[Sequence[Function], bool], str]] = {
    HermesParser: _hermes,
    Llama3JsonParser: _llama3,
}
