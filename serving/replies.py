"""What the routes answer, as the OpenAPI document describes it.

Answers that generate are written by hand, for speed: these models are their description, which the tests hold
them to. Clients must let fields pass that they do not know.
"""

from typing import Any, Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pjengine"
    root: str
    parent: None = None
    max_model_len: int
    vocab_size: int  # for clients that make up token ids


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionReply(BaseModel):
    version: str


class LoadReply(BaseModel):
    server_load: int


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(BaseModel):
    prompt: str


class GenerateReply(BaseModel):
    text: list[str]  # prompt and output


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingData(BaseModel):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingReply(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[EmbeddingData]
    usage: UsageReply


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobsReply(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobsReply(BaseModel):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class _Choice(BaseModel):
    index: int
    finish_reason: str
    stop_reason: str | int | None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobsReply | None


class AssistantMessage(BaseModel):
    role: str
    content: str | None
    refusal: None


class ChatChoice(_Choice):
    message: AssistantMessage
    logprobs: ChatLogprobsReply | None


class _Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageReply


class CompletionReply(_Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatReply(_Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


def generated(model: type[BaseModel], media_type: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the object of a whole answer, and the media type of a streamed one."""
    return {200: {"model": model, "content": {media_type: {}}}}
