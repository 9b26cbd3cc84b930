"""The demo model under hundreds of schemas: whatever it would like to say, what it says is valid."""

import json
import random
from collections import Counter
from typing import Any

import jsonschema
import pytest

from tests.engine.random_schemas import parts, random_schema

NUM_SCHEMAS = 300
# What must be in the schemas, and in how many of them at least.
WANTED = {
    **dict.fromkeys(("enum", "const", "pattern", "format", "anyOf", "oneOf", "allOf", "$ref"), 15),
    **dict.fromkeys(("minimum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), 15),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "prefixItems"), 15),
    **dict.fromkeys(("properties", "required", "additionalProperties", "$defs"), 15),
    **dict.fromkeys(("null", "boolean", "integer", "number", "string", "array", "object"), 15),
    "objects in objects in objects": 15,
}


def depth_of_objects(schema: Any) -> int:
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    own = isinstance(schema, dict) and "properties" in schema
    return own + max(map(depth_of_objects, inner), default=0)


def found_in(schema: dict[str, Any]) -> set[str]:
    """Keywords and types."""
    found = {str(word) for part in parts(schema) for word in part}
    found |= {str(part["type"]) for part in parts(schema) if "type" in part}
    return found | ({"objects in objects in objects"} if depth_of_objects(schema) >= 3 else set())


@pytest.mark.slow
def test_every_output_parses_and_is_valid(full_compile: None, unchecked_types: None) -> None:
    """All of them end by themselves: texts, numbers and lists have limits, spaces between tokens too,
    and a bias to the brackets that close lists ends chains of objects.
    """
    from pjengine import LLM, SamplingParams, StructuredOutputsParams

    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    seen = Counter(word for schema in schemas for word in found_in(schema))
    assert not {word: seen[word] for word, least in WANTED.items() if seen[word] < least}
    sizes: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 64, "max_model_len": 336}
    with (
        pytest.MonkeyPatch.context() as patch,
        LLM("demo", dtype="float32", warm_up=False, **sizes) as llm,
    ):
        patch.setattr("pjengine.runner.PATIENCE", 1_000_000)
        tokenizer = llm.engine.tokenizer
        assert tokenizer is not None
        texts = map(tokenizer.decode, [[token] for token in range(4096)])
        bias = {token: 8.0 for token, text in enumerate(texts) if text.strip()[:1] == "]" or text == "[]"}
        common: dict[str, Any] = {"temperature": 1.0, "max_tokens": 320, "logit_bias": bias}
        params = []
        for i, schema in enumerate(schemas):
            spaces: Any = {"whitespace_pattern": " ?"} if i % 2 else {"disable_any_whitespace": True}
            form = StructuredOutputsParams(json=schema, **spaces)
            params.append(SamplingParams(seed=i, structured_outputs=form, **common))
        outputs = llm.generate(["data = "] * NUM_SCHEMAS, params, use_tqdm=False)
    for schema, output in zip(schemas, outputs, strict=True):
        [completion] = output.outputs
        assert completion.finish_reason == "stop", (schema, completion.text)
        jsonschema.validate(json.loads(completion.text), schema, jsonschema.Draft202012Validator)
