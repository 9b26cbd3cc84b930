"""What clients may send: OpenAI's request bodies with vLLM's extra fields. Nothing is coerced or ignored."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.serving.errors import ApiError, bad_request
from pjengine.serving.refusals import (
    REFUSED_FIELDS,
    REFUSED_MESSAGE_FIELDS,
    REFUSED_PART_FIELDS,
    Refusal,
    check_fields,
)

REQUEST_ID = r"^[!-~]{1,256}$"  # goes into headers and logs


def _document_null(schema: dict[str, Any]) -> None:
    """Null may stand for every field that may be left out."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kept = {key: field.pop(key) for key in ("title", "default") if key in field}
            kept["anyOf"] = [dict(field), {"type": "null"}]
            field.clear()
            field |= kept


class _Body(BaseModel):
    """A JSON object with known fields alone; null stands for the default of a field."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_document_null)
    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_FIELDS

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        return check_fields(data, cls.model_fields, cls.refused) if isinstance(data, dict) else data


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage in every chunk, not only in one of its own at the end

    @model_validator(mode="after")
    def _check_together(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ApiError(400, "continuous_usage_stats needs include_usage", param="stream_options")
        return self


class SamplingFields(_Body):
    """Fields of SamplingParams, which checks their values; a default may come from the model."""

    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None  # by token id, which JSON writes as a string
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    stream: bool = False

    def sampling_params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """The defaults, with what is given here and `more` over them.

        Raises:
          ApiError: SamplingParams does not take a value.
        """
        if self.best_of not in (None, more.get("n", self.n or 1)):
            raise ApiError(
                400, f"best_of={self.best_of} is not supported here: leave it out", param="best_of"
            )
        names = {field.name for field in dataclasses.fields(defaults)} & type(self).model_fields.keys()
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _by_token(self.logit_bias)
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        try:
            return dataclasses.replace(defaults, **{"output_kind": kind, **given, **more})
        except (ValueError, TypeError) as error:
            raise bad_request(error, type(self).model_fields) from error


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        if not token.isdecimal() or not token.isascii() or len(token) > 18:
            raise ApiError(400, f"logit_bias is by token id, got {token!r:.80}", param="logit_bias")
    return {int(token): value for token, value in bias.items()}


class GenerationFields(SamplingFields):
    """Fields that completions and chat completions share."""

    model: str | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the log
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = None  # part of the answer's id
    priority: int = 0
    cache_salt: str = ""  # cached pages are shared only under the same salt
    truncation_side: Literal["left"] = "left"
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # in logprobs: "token_id:17"

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs are not streamed", param="prompt_logprobs")
        return self


class CompletionRequest(GenerationFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None  # what follows the text that is generated
    max_tokens: int | None = None  # 0, with echo: no answer, only what echo shows
    logprobs: int | None = None  # of so many likeliest tokens
    echo: bool = False
    add_special_tokens: bool = True  # to prompts that are text

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        return [prompt] if is_one else prompt


class TextPart(_Body):
    refused = REFUSED_PART_FIELDS

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    refused = REFUSED_MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message = {"role": self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ConversationFields(_Body):
    """What a chat template makes a prompt of."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # most templates write them themselves
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: list[dict[str, str]] | None = None

    @model_validator(mode="after")
    def _check_end(self) -> "ConversationFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message needs add_generation_prompt=false",
                param="continue_final_message",
            )
        return self


class ChatRequest(ConversationFields, GenerationFields):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    echo: bool = False  # the final message, if it is of the role that answers, begins the answer

    @model_validator(mode="after")
    def _check_counts(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ApiError(
                400,
                f"max_tokens={old} and max_completion_tokens={new} say the same thing: give one",
                param="max_tokens",
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class GenerateRequest(SamplingFields):
    """The body of /generate, whose answer shows nothing but text."""

    prompt: str
    max_tokens: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, data: Any) -> Any:
        """curl's own content type says nothing of JSON, and this route has always taken it."""
        try:
            return json.loads(data) if isinstance(data, bytes) else data
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class TokenizeTextRequest(_Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ConversationFields):
    model: str | None = None
    return_token_strs: bool = False


def _kind(data: Any) -> str:
    return "<chat>" if isinstance(data, dict) and "messages" in data else "<text>"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("<text>")] | Annotated[TokenizeChatRequest, Tag("<chat>")],
    Discriminator(_kind),
]


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[int]
