"""Tool calls are found in what models write, however it comes in pieces, and nothing else is lost."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.call_texts import (
    NAMES,
    SCHEMAS,
    WRITERS,
    hermes,
    in_order,
    mistral_with_ids,
    parse_pieces,
    parser,
    pieces,
    shown,
)

PARSERS = (*sorted({*WRITERS.values()}), "required", "named")
FIXED = settings(max_examples=100, deadline=None, derandomize=True)

WORDS = st.text("ab éÄ🐍.,-", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab"\\{}[]<>é🐍;\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("xy}", max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.dictionaries(st.text("xyz", min_size=1, max_size=3), VALUES, max_size=3)
    ),
    max_size=3,
)
# Those that Qwen3's form can write: bare text means what the schema says.
TYPED_CALLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.fixed_dictionaries(
            {},
            optional={
                "text": st.text('ab"\\{}[]<>é🐍;\n', max_size=8),
                "count": st.integers(),
                "share": st.floats(allow_nan=False, allow_infinity=False),
                "is_on": st.booleans(),
                "place": st.dictionaries(st.text("xy", max_size=3), VALUES, max_size=2),
                "note": st.none() | st.text("xyz", min_size=1),
                "kind": st.sampled_from([1, "two", None]),
                "unknown": st.text("xyz1"),
            },
        ),
    ),
    max_size=3,
)
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
    *("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>", "<tool", "call>", "[TOOL_", "</par"),
    *(
        '{"name": "f", "arguments": {',
        '{"name": "f", "parameters": {',
        '"name"',
        '"f"',
        '"arguments"',
        "f>",
        "f",
    ),
    *(
        '<tool_call>{"name": "f", "arguments": {',
        "}}</tool_call>",
        "<tool_call><function=f><parameter=count>",
    ),
    *(
        "</parameter></function>",
        '[TOOL_CALLS][{"name": "f", "arguments": {',
        "[TOOL_CALLS]f{",
        "}}]",
        "}}; ",
    ),
    *("{", "}", "[", "]", '"', ":", ",", ";", "\\", " ", "\n", "<", "a", "é", "🐍", '{"a": 1}', "1", '"id"'),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
CUTS = st.lists(st.integers(0, 10_000), max_size=8)


@FIXED
@given(content=WORDS, calls=CALLS, typed=TYPED_CALLS, cuts=CUTS)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_a_model_writes_is_read_back(
    write: Any, content: str, calls: Any, typed: Any, cuts: list[int]
) -> None:
    name = WRITERS[write]
    calls = typed if name == "qwen3" else calls
    text = write(content, calls)
    parts = parse_pieces(parser(name), pieces(text, cuts))
    # Whitespace ahead of a call, as Hermes and Qwen write it, is not content.
    assert parts.content == (content.rstrip() if calls else content)
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == calls


@FIXED
@given(text=TEXTS, cuts=CUTS)
@pytest.mark.parametrize("name", PARSERS)
def test_pieces_make_no_difference(name: str, text: str, cuts: list[int]) -> None:
    whole = shown(parser(name).parse(text))
    assert shown(parse_pieces(parser(name), pieces(text, cuts))) == whole
    assert shown(parse_pieces(parser(name), text)) == whole  # letter by letter


# What stands around calls; the last mark may be cut off where the text ends.
FRAMES = {
    "hermes": (r"<tool_call>|</tool_call>", "</tool_call>"),
    "llama3_json": (r"<\|python_tag\|>|;", ""),
    "mistral": (r"\[TOOL_CALLS\]|\[CALL_ID\]|\[ARGS\]|[\[\]f1]", ""),
    "required": (r"[\[\]]", ""),
    "named": (r"(?!)", ""),
}


@FIXED
@given(text=TEXTS)
@pytest.mark.parametrize("name", FRAMES)
def test_content_and_arguments_are_all_of_a_text_but_the_frames_of_calls(name: str, text: str) -> None:
    parts = in_order(parser(name), text)
    if not parser(name).parse(text).calls:
        assert "".join(parts) == text
        return
    marks, last = FRAMES[name]
    frame = rf'(?:{marks}|[\s{{}}:,]|"(?:name|arguments|parameters|id|type|f|get_weather)")*'
    # Arguments that nobody wrote stand for none.
    wanted = [f"(?:{re.escape(part)}{'|' if part == '{}' else ''})" for part in parts]
    cut = "|".join(re.escape(last[:length]) for length in range(len(last)))
    assert re.fullmatch(f"{frame}{frame.join(wanted)}{frame}(?:{cut})", text), parts


@FIXED
@given(text=st.text('ab{}[]<>|"; \n', max_size=30))
@pytest.mark.parametrize("name", PARSERS)
def test_a_text_without_a_call_is_content_as_it_is(name: str, text: str) -> None:
    parts = parser(name).parse(text)
    if name != "named" or not text.lstrip().startswith("{"):
        assert shown(parts) == ("", text, [])


def calls_of(name: str, text: str) -> tuple[str, list[tuple[str | None, str]]]:
    _, content, calls = shown(parser(name).parse(text))
    return content, calls


WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", f"Look: <tool_call>{WEATHER}</tool_call> done", "Look: done", ['{"city": "Paris"}']),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", ["{}"]),
        ("hermes", "a <tool_call> is a mark", "a <tool_call> is a mark", []),
        ("hermes", f"<tool_call><tool_call>{WEATHER}</tool_call>", "<tool_call>", ['{"city": "Paris"}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1', "", ['{"a": [1']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool', "", ["{}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} so', " so", ["{}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "text"}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "place": 1}</tool_call>', ..., []),
        ("llama3_json", '{"name": "f", "parameters": {}};\n{"name": "f", "parameters": {"a": 1}}', "", ["{}", '{"a": 1}']),  # noqa: E501
        ("llama3_json", '{"name": "Bob", "age": 3}', ..., []),
        ("llama3_json", '{"name": "Bob"}', ..., []),
        ("llama3_json", 'It is {"name": "f", "parameters": {}}', ..., []),
        ("llama3_json", "<|python_tag|>print(1)", ..., []),
        ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]f{}', "", ['{"a": 1}', "{}"]),
        ("mistral", '[{"name": "f", "arguments": {}}]', ..., []),
        ("mistral", "[TOOL_CALLS][]", ..., []),
        ("qwen3", "<function=f>\n</function>", "", ["{}"]),
        ("qwen3", "<function=f><parameter=text>\na\n\n</parameter></function>", "", ['{"text": "a\\n"}']),
        ("qwen3", "<function=f><parameter=text>null</parameter></function>", "", ['{"text": "null"}']),
        ("qwen3", "<function=f><parameter=text>a", "", ['{"text": "a']),
        ("qwen3", "<function=f><parameter=count>many</parameter></function>", "", ['{"count": "many"}']),
        ("qwen3", "<function=f><parameter=share>1e999</parameter></function>", "", ['{"share": 1e999}']),
        ("qwen3", "<function=f><parameter=share>NaN</parameter></function>", "", ['{"share": "NaN"}']),
        ("qwen3", "<function=f><parameter=is_on> True </parameter></function>", "", ['{"is_on": true}']),
        ("qwen3", "<function=f><parameter=note>None</parameter></function>", "", ['{"note": null}']),
        ("qwen3", "<function=f>so</function>", "so</function>", ["{}"]),
        ("required", '[{"name": "f", "parameters": {"a": 1}}, {"name": "f", "parameters": {}}]', "", ['{"a": 1}', "{}"]),  # noqa: E501
        ("required", '[{"name": "f", "parameters": {"a', "", ['{"a']),
        ("named", ' {"a": {}}', "", ['{"a": {}}']),
    ],
)  # fmt: skip
def test_examples(name: str, text: str, content: Any, calls: list[str]) -> None:
    found, found_calls = calls_of(name, text)
    assert found == (text if content is ... else content)
    assert [arguments for _, arguments in found_calls] == calls


def test_arguments_are_shown_as_they_grow() -> None:
    texts = {
        "hermes": ("<tool_call>", '{"name": "f", "arguments": {"a"', ': "xy', "z", '"}', "}"),
        "required": ("", '[{"name": "f", "parameters": {"a"', ': "xy', "z", '"}', "}]"),
        "mistral": ("[TOOL_CALLS]", 'f{"a"', ': "xy', "z", '"}', " "),
        "qwen3": ("<tool_call><function=f>", "<parameter=a>", "xy", "z", "</parameter></function>", ""),
    }
    for name, (begin, *rest) in texts.items():
        own = parser(name)
        found = [own.push(text).calls for text in (begin, *rest)]
        grown = ["".join(call.arguments for call in calls) for calls in found]
        assert json.loads("".join(grown)) == {"a": "xyz"} and grown[3] == "z", name
        named = [call for calls in found for call in calls if call.name is not None]
        assert [(call.name, call.index) for call in named] == [("f", 0)] and named[0].id


def test_content_waits_for_nothing_but_what_may_be_a_mark() -> None:
    own = parser("hermes")
    found = [own.push(text).content for text in ("Hello", " ", "world <", "b> <tool_", "box>")]
    assert found == ["Hello", "", " world", " <b>", " <tool_box>"]


def test_ids_are_those_of_the_model_or_new_ones() -> None:
    text = hermes("", [("f", {}), ("f", {})])
    ids = [call.id for call in parser("hermes").parse(text).calls]
    assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", own or "") for own in ids)
    own, new = (
        parser("mistral").parse(text).calls[0].id
        for text in (mistral_with_ids("", [("f", {})]), "[TOOL_CALLS]f{}")
    )
    assert own == "a1B2c3D4e" and re.fullmatch("[a-zA-Z0-9]{9}", new)
    listed = '[TOOL_CALLS][{"name": "f", "id": "%s", "arguments": {}}]'
    assert parser("mistral").parse(listed % "123456789").calls[0].id == "123456789"
    assert re.fullmatch("[a-zA-Z0-9]{9}", parser("mistral").parse(listed % "call-1").calls[0].id)


def test_schemas_of_any_kind_are_taken() -> None:
    from pjengine.serving.schema_values import types_of

    circle = {"properties": {"a": {"$ref": "#/properties/a"}}}
    assert types_of(circle, "a") == {"string"}
    assert types_of({"properties": {"a": {"type": ["integer", "null"]}}}, "a") == {"integer", "null"}
    assert types_of(SCHEMAS["f"], "place") == {"object"}
    assert types_of(SCHEMAS["f"], "kind") == {"integer", "string", "null"}
    odd_ones: list[Any] = [None, 3, [], {"type": 3}, {"anyOf": 3}, {"$ref": 3}, {"$ref": "#/no/where"}]
    for odd in [*odd_ones, {"enum": 3}, {"type": [{}]}]:
        assert types_of({"properties": {"a": odd}}, "a") == {"string"}
    assert types_of({"properties": 3}, "a") == types_of({}, "a") == {"string"}
