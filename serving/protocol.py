"""What clients may send: OpenAI's request bodies with vLLM's extra fields. Nothing is coerced or ignored."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pjengine.sampling_params import RequestOutputKind, SamplingParams
from pjengine.serving.body import Body
from pjengine.serving.errors import ApiError, bad_request
from pjengine.serving.messages import Message
from pjengine.serving.refusals import REFUSED_OUTSIDE_CHAT, REFUSED_WITH_EMBEDDINGS
from pjengine.serving.response_format import ResponseFormat, StructuredOutputs, form_of
from pjengine.serving.tools import ToolChoiceFields, ToolFields
from pjengine.structured_outputs import StructuredOutputsParams

REQUEST_ID = r"^[!-~]{1,256}$"  # goes into headers and logs

# Lists are checked while other answers wait. Pydantic stops at the first item that is too many.
_MANY = Field(max_length=4096, fail_fast=True)
_TokenIds = Annotated[list[int], Field(fail_fast=True)]
MAX_MESSAGES = 65_536  # with the parts of their contents and their tool calls
_LISTS_OF_MESSAGES = ("content", "tool_calls")
_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_NOTHING_DRAWN: dict[str, Any] = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}  # in a beam search
_OF_VOCABULARY = Field(max_length=2**19)  # no vocabulary is as large


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage in every chunk, not only in one of its own at the end

    @model_validator(mode="after")
    def _check_together(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ApiError(400, "continuous_usage_stats needs include_usage", param="stream_options")
        return self


class SamplingFields(Body):
    """Fields of SamplingParams, which checks their values; a default may come from the model."""

    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None  # of best_of beams, or n
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | Annotated[list[str], _MANY] | None = None
    stop_token_ids: Annotated[list[int], _MANY] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    # By token id, which JSON writes as a string.
    logit_bias: Annotated[dict[str, float], _OF_VOCABULARY] | None = None
    allowed_token_ids: Annotated[list[int], _OF_VOCABULARY] | None = None
    bad_words: Annotated[list[str], _MANY] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False

    def sampling_params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """The defaults, with what is given here and `more` over them.

        Raises:
          ApiError: SamplingParams does not take a value.
        """
        if self.use_beam_search:
            if self.stream:
                text = "a beam search is not streamed: what it finds is known at the end"
                raise ApiError(400, text, param="use_beam_search")
            defaults = dataclasses.replace(defaults, **_NOTHING_DRAWN)
        elif self.best_of not in (None, more.get("n", self.n or 1)):
            raise ApiError(
                400, f"best_of={self.best_of} is not supported here: leave it out", param="best_of"
            )
        names = self.model_fields_set & _SAMPLING
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _by_token(self.logit_bias)
        given["structured_outputs"] = self._form()
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        try:
            return dataclasses.replace(defaults, **{"output_kind": kind, **given, **more})
        except (ValueError, TypeError) as error:
            raise bad_request(
                error, type(self).model_fields, {"structured_outputs": self.form_field}
            ) from error

    @property
    def form_field(self) -> str:
        """The field that says what form the answer must have."""
        return "structured_outputs"

    def _form(self) -> StructuredOutputsParams | None:
        return form_of(None, self.structured_outputs)


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
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs are not streamed", param="prompt_logprobs")
        return self

    @property
    def form_field(self) -> str:
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def _form(self) -> StructuredOutputsParams | None:
        return form_of(self.response_format, self.structured_outputs)


class CompletionRequest(GenerationFields):
    refused = REFUSED_OUTSIDE_CHAT

    prompt: str | Annotated[list[str], _MANY] | _TokenIds | Annotated[list[_TokenIds], _MANY]
    suffix: str | None = None  # what follows the text that is generated
    max_tokens: int | None = None  # 0, with echo: no answer, only what echo shows
    logprobs: int | None = None  # of so many likeliest tokens
    echo: bool = False
    add_special_tokens: bool = True  # to prompts that are text

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return _each(self.prompt)


class EmbeddingRequest(Body):
    refused = REFUSED_WITH_EMBEDDINGS

    model: str | None = None
    input: str | Annotated[list[str], _MANY] | _TokenIds | Annotated[list[_TokenIds], _MANY]
    encoding_format: Literal["float", "base64"] = "float"  # base64: of the float32s, little-endian
    user: str | None = None  # for the log
    request_id: Annotated[str, Field(pattern=REQUEST_ID)] | None = None  # part of the answer's id
    pooling: Literal["last", "mean"] = "last"  # which tokens' states
    layer: int = -1  # of which layer, as `HiddenStatesParams` numbers them
    normalize: bool = True  # to length 1
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left"] = "left"
    add_special_tokens: bool = True  # to inputs that are text
    priority: int = 0
    cache_salt: str = ""  # cached pages are shared only under the same salt

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        return _each(self.input)


def _each(given: Any) -> Any:
    """One text or list of token ids, or a list of such, as a list."""
    is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    return [given] if is_one else given


class ConversationFields(ToolFields):
    """What a chat template makes a prompt of."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # most templates write them themselves
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    documents: Annotated[list[dict[str, str]], _MANY] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, data: Any) -> Any:
        """Before anything is made of them, counts the messages and what they hold."""
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list):
            return data
        held = (own.get(name) for own in messages if isinstance(own, dict) for name in _LISTS_OF_MESSAGES)
        count = len(messages)
        if count <= MAX_MESSAGES:
            count += sum(len(items) for items in held if isinstance(items, list))
        if count > MAX_MESSAGES:
            raise ApiError(
                400,
                f"messages, with their parts and tool calls, must be at most {MAX_MESSAGES}, got {count}",
                param="messages",
            )
        return data

    @model_validator(mode="after")
    def _check_end(self) -> "ConversationFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message needs add_generation_prompt=false",
                param="continue_final_message",
            )
        return self


class ChatRequest(ToolChoiceFields, ConversationFields, GenerationFields):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    include_reasoning: bool = True  # what the model thinks before it answers
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
    def form_field(self) -> str:
        return "tools" if self.are_calls_formed else super().form_field

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class GenerateRequest(SamplingFields):
    """The body of /generate, whose answer shows nothing but text."""

    refused = REFUSED_OUTSIDE_CHAT

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


class TokenizeTextRequest(Body):
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


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: _TokenIds
