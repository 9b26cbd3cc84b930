"""The form that a client wants an answer in: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from typing import Any, Literal, Required, TypedDict

from pydantic import ConfigDict, with_config

from pjengine.serving.errors import ApiError
from pjengine.structured_outputs import StructuredOutputsParams

_EXACT = ConfigDict(strict=True, extra="forbid")


@with_config(_EXACT)
class JsonSchema(TypedDict, total=False):
    name: Required[str]
    schema: Required[dict[str, Any]]
    description: str | None
    strict: bool | None  # the answer follows the schema in any case


@with_config(_EXACT)
class ResponseFormat(TypedDict, total=False):
    type: Required[Literal["text", "json_object", "json_schema", "structural_tag"]]
    json_schema: JsonSchema | None
    structures: Any  # of a structural_tag, which is refused
    triggers: Any
    format: Any


@with_config(_EXACT)
class StructuredOutputs(TypedDict, total=False):
    """Fields of StructuredOutputsParams; null stands for their defaults."""

    json: dict[str, Any] | str | None
    regex: str | None
    choice: list[str] | None
    grammar: str | None
    json_object: bool | None
    disable_any_whitespace: bool | None
    whitespace_pattern: str | None
    structural_tag: Any  # refused


def form_of(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """What an answer must look like; None: like nothing in particular.

    Raises:
      ApiError: both say something, or what one says is not possible.
    """
    if response_format is not None and (form := _of_format(response_format)) is not None:
        if structured_outputs is not None:
            raise ApiError(
                400,
                f"response_format {response_format['type']!r} and structured_outputs are two forms: give one",
                param="structured_outputs",
            )
        return form
    if structured_outputs is None:
        return None
    given: dict[str, Any] = {name: value for name, value in structured_outputs.items() if value is not None}
    if "structural_tag" in given:
        raise _refused("structured_outputs")
    try:
        return StructuredOutputsParams(**given)
    except ValueError as error:
        raise ApiError(400, f"structured_outputs: {error}", param="structured_outputs") from error


def _of_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    kind, schema = wanted["type"], wanted.get("json_schema")
    if kind == "structural_tag":
        raise _refused("response_format")
    if (kind == "json_schema") != (schema is not None):
        raise ApiError(
            400,
            f"response_format: json_schema goes with the type 'json_schema' and with no other, got {kind!r} "
            f"and json_schema={schema!r:.80}",
            param="response_format",
        )
    if schema is not None:
        try:
            return StructuredOutputsParams(json=schema["schema"])
        except ValueError as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from error
    return StructuredOutputsParams(json_object=True) if kind == "json_object" else None


def _refused(field: str) -> ApiError:
    return ApiError(
        400,
        f"{field}: structural_tag is refused: the whole answer has one form. Use a grammar of "
        "structured_outputs",
        param=field,
    )
