"""What may be asked of the form of an output."""

from typing import Any

import pytest

from pjengine.sampling_params import SamplingParams
from pjengine.structured_outputs import StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("unchecked_types")  # it is our own refusals that are looked at

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
    ({"regex": "a", "choice": ["b"]}, r"got regex='a', choice=\['b'\]"),
    ({"json_object": False}, "got none"),
    ({"json_object": 1}, "json_object must be bool, got 1"),
    ({"json": 3}, "json must be a JSON schema, as a dict or a text, got 3"),
    ({"json": ""}, "json must be a JSON schema, got ''"),
    ({"json": "{"}, "json must be a JSON schema, got '{'"),
    ({"json": "[]"}, r"json must be a JSON schema that is an object, got '\[\]'"),
    ({"json": {"const": float("nan")}}, "json must be a JSON schema, got .*nan"),
    ({"json": {"const": {1}}}, "json must be a JSON schema, got .*set"),
    ({"json": {"const": 2**53 + 1}}, "json must hold whole numbers .* at #/const; got 9007199254740993"),
    ({"json": {"enum": [1, {"a": [2**64]}]}}, "at #/enum/1/a/0; got 18446744073709551616"),
    ({"json": '{"items": {"maximum": 1234567890123456789}}'}, "at #/items/maximum; got 1234567890123456789"),
    ({"json": {"properties": {"enum": {"minimum": -(2**53) - 1}}}}, "at #/properties/enum/minimum; got -90"),
    ({"json": {"minimum": 2**63 - 1}}, "at #/minimum; got 9223372036854775807"),
    ({"json": {"const": 2**63 - 1}}, "at #/const; got 9223372036854775807"),
    ({"json": "[" * 100_000}, "json must be a JSON schema"),
    ({"regex": ""}, "regex must be a text that is not empty, got ''"),
    ({"regex": b"a"}, "regex must be a text that is not empty, got b'a'"),
    ({"grammar": ""}, "grammar must be a text that is not empty"),
    ({"choice": []}, r"choice must be a list of at least one text, got \[\]"),
    ({"choice": "ab"}, "choice must be a list of at least one text, got 'ab'"),
    ({"choice": ["a", ""]}, "choice must hold texts that are not empty, got ''"),
    ({"choice": ["a", 1]}, "choice must hold texts that are not empty, got 1"),
    ({"json": {"const": "\ud800"}}, "json holds a lone surrogate at character 11"),
    ({"regex": "\ud800"}, "regex holds a lone surrogate at character 0"),
    ({"grammar": "x" * 1_000_001}, "grammar must have at most 1000000 characters, got 1000001"),
    (
        {"regex": "a", "whitespace_pattern": " "},
        "whitespace_pattern goes with json or json_object, got regex",
    ),
    ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace goes with json"),
    ({"json_object": True, "disable_any_whitespace": 1}, "disable_any_whitespace must be bool, got 1"),
    ({"json_object": True, "whitespace_pattern": ""}, "whitespace_pattern must be a text"),
    (
        {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
        "disable_any_whitespace leaves no room for whitespace_pattern=' '",
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_form_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


def test_a_schema_may_hold_large_numbers_that_stay_as_they_are() -> None:
    big = 2**53 + 1
    schema = {"const": 10**18, "maximum": 2**62, "default": big, "properties": {"const": {"examples": [big]}}}
    assert StructuredOutputsParams(json=schema).json == schema


@pytest.mark.parametrize("largest", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_schema_may_bound_numbers_by_the_ends_of_their_type(largest: int) -> None:
    schema = {"type": "integer", "minimum": 1 - 2**63, "maximum": largest, "exclusiveMinimum": -(2**63)}
    assert StructuredOutputsParams(json=schema).json == schema


def test_a_form_does_not_change_with_the_schema_that_it_was_made_of() -> None:
    schema: dict[str, Any] = {"type": "string"}
    wanted = StructuredOutputsParams(json=schema)
    schema["type"] = "bad"
    assert wanted.json_text == '{"type": "string"}'


def test_a_form_is_no_dict() -> None:
    with pytest.raises(ValueError, match="must be StructuredOutputsParams or None, got"):
        SamplingParams(**dict[str, Any](structured_outputs={"regex": "a"}))
