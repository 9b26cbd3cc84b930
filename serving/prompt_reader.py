"""What a body says the prompt is -> token ids. Raises ApiError for what is wrong."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pjengine.serving.errors import ApiError
from pjengine.serving.protocol import ConversationFields
from pjengine.serving.tools import ToolChoiceFields
from pjengine.tokenizer import Tokenizer

type GivenPrompt = dict[str, Any]  # as the engine takes it: "prompt", "prompt_token_ids", or both


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Encodes texts and conversations with the model's tokenizer and chat template."""

    tokenizer: Tokenizer | None
    max_tokens: int | None = None  # of a prompt; none: any number
    is_request_template_trusted: bool = False
    default_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    are_unused_tools_hidden: bool = False  # from the template, if the answer may call none

    @property
    def has_chat_template(self) -> bool:
        tokenizer = self.tokenizer
        return tokenizer is not None and bool(tokenizer.chat_template or tokenizer.hf.chat_template)

    def read(self, text: str, *, add_special_tokens: bool, is_cut: bool = False) -> GivenPrompt:
        """`is_cut`: the prompt may be longer than what fits."""
        self._check_length(text, is_cut, "prompt")
        return {"prompt": text, "prompt_token_ids": self._encode(text, add_special_tokens)}

    def read_chat(self, body: ConversationFields) -> GivenPrompt:
        text = self._render(body)
        is_cut = getattr(body, "truncate_prompt_tokens", None) is not None
        self._check_length(text, is_cut, "messages")
        return {"prompt": text, "prompt_token_ids": self._encode(text, body.add_special_tokens)}

    def decode(self, token_ids: list[int]) -> str:
        tokenizer = self._needed("detokenizing")
        most = None if self.max_tokens is None else self.max_tokens + 1
        if most is not None and len(token_ids) > most:
            text = f"tokens must be at most max_model_len={most}, got {len(token_ids)}"
            raise ApiError(400, text, param="tokens")
        if outside := [token for token in token_ids if not 0 <= token < len(tokenizer)]:
            raise ApiError(400, f"token id {outside[0]} is out of the vocabulary", param="tokens")
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    def has_special(self, texts: Iterable[str]) -> bool:
        """Whether any of them is a special token, which is not part of texts unless they are to show it."""
        return self.tokenizer is not None and not self.tokenizer.special_texts.isdisjoint(texts)

    def token_texts(self, token_ids: list[int]) -> list[str]:
        """Each token as it is in the vocabulary, pieces of characters included."""
        return self._needed("return_token_strs").hf.convert_ids_to_tokens(token_ids)

    def _check_length(self, text: str, is_cut: bool, param: str) -> None:
        if self.tokenizer is None or self.max_tokens is None or is_cut:
            return
        try:
            self.tokenizer.check_length(text, self.max_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._needed("a text")
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _render(self, body: ConversationFields) -> str:
        tokenizer = self._needed("a conversation")
        if body.chat_template is not None and not self.is_request_template_trusted:
            raise ApiError(
                400,
                "chat_template is refused: a template is a program, and this server runs without "
                "--trust-request-chat-template",
                param="chat_template",
            )
        if taken := self._reserved & body.chat_template_kwargs.keys():
            raise ApiError(
                400, f"chat_template_kwargs must not hold {min(taken)!r}", param="chat_template_kwargs"
            )
        options = {**self.default_template_kwargs, **body.chat_template_kwargs}
        if body.documents is not None:
            options["documents"] = body.documents
        try:
            return tokenizer.render_chat(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                tools=self._tools(body),
                chat_template=body.chat_template,
                **options,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except Exception as error:  # a template is a program: it may fail in any way
            text = f"the chat template does not take these messages: {error!r}"
            raise ApiError(400, text) from error

    def _tools(self, body: ConversationFields) -> list[dict[str, Any]] | None:
        """As the client wrote them, but for nulls."""
        is_unused = isinstance(body, ToolChoiceFields) and body.way == "none"
        if body.tools is None or (is_unused and self.are_unused_tools_hidden):
            return None
        return [tool.model_dump(exclude_unset=True) for tool in body.tools]

    def _needed(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ApiError(400, f"{what} needs a tokenizer, and this server runs without: send token ids")
        return self.tokenizer

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """Names that a template gets from us, or that are settings of the renderer, not of the template."""
        hf = inspect.signature(self._needed("a conversation").hf.apply_chat_template).parameters
        return frozenset({*hf, *inspect.signature(Tokenizer.render_chat).parameters})
