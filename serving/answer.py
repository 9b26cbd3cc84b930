"""The answer to one request of /v1/completions or /v1/chat/completions: whole, or as server-sent events."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.responses import Response

import pjengine
from pjengine.outputs import RequestOutput
from pjengine.serving.protocol import GenerationFields
from pjengine.serving.request_id import REQUEST_ID_HEADER
from pjengine.serving.service import Call, Service
from pjengine.serving.stream import EventStream, JsonAnswer, dumps

type Choice = dict[str, Any]


class Form(ABC):
    """How an endpoint writes what the engine gives."""

    @abstractmethod
    def choices(self, index: int, output: RequestOutput) -> list[Choice]:
        """What an output of the prompt at `index` adds to each choice: all of it, if it is not streamed."""

    @abstractmethod
    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """Fields that it adds beside the choices."""


@dataclass
class Usage:
    """Tokens of a request so far: each prompt once, whatever n is."""

    num_output_tokens: int = 0
    _prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> tokens, of them cached

    def add(self, index: int, output: RequestOutput) -> None:
        self._prompts[index] = len(output.prompt_token_ids), output.num_cached_tokens
        self.num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def as_dict(self) -> dict[str, Any]:
        num_prompt_tokens = sum(count for count, _ in self._prompts.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Runs a call when it is sent, and ends it when it no longer is."""

    service: Service
    body: GenerationFields
    call: Call
    form: Form
    kind: str  # OpenAI's "object"
    request_id: str  # as the client gave it, or would
    created: int = field(default_factory=lambda: int(time.time()))
    usage: Usage = field(default_factory=Usage)

    def send(self) -> Response:
        config = self.service.config
        headers = {REQUEST_ID_HEADER: self.request_id} if config.enable_request_id_headers else {}
        if self.body.stream:
            return EventStream(self.events(), timeout_s=config.request_timeout_s, headers=headers)
        return JsonAnswer(self.whole, timeout_s=config.request_timeout_s, headers=headers)

    async def whole(self) -> dict[str, Any]:
        choices: list[Choice] = []
        extras: dict[str, Any] = {}
        async with aclosing(self.service.outputs(self.call)) as outputs:
            async for index, output in outputs:
                choices += self.form.choices(index, output)
                extras |= self.form.extras(output)
                self.usage.add(index, output)
        choices.sort(key=lambda choice: choice["index"])
        return {**self._head, "choices": choices, "usage": self.usage.as_dict(), **extras}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields one part for each output: an event for each choice that it adds to."""
        options = self.body.stream_options
        usage: dict[str, Any] = {} if options is None or not options.include_usage else {"usage": None}
        async with aclosing(self.service.outputs(self.call)) as outputs:
            async for index, output in outputs:
                choices = self.form.choices(index, output)
                self.usage.add(index, output)
                if not choices:
                    continue
                if options is not None and options.continuous_usage_stats:
                    usage = {"usage": self.usage.as_dict()}
                first, *others = choices
                events = [self._event([first], **usage, **self.form.extras(output))]
                events += [self._event([choice], **usage) for choice in others]
                yield b"".join(events)
        if usage:
            yield self._event([], usage=self.usage.as_dict())

    def _event(self, choices: list[Choice], **more: Any) -> bytes:
        """A server-sent event; what is the same in all of them is written once."""
        return self._beginning + dumps({"choices": choices, **more})[1:] + b"\n\n"

    @cached_property
    def _beginning(self) -> bytes:
        return b"data: " + dumps(self._head)[:-1] + b","

    @cached_property
    def _head(self) -> dict[str, Any]:
        return {
            "id": self.call.request_id,
            "object": self.kind,
            "created": self.created,
            "model": self.body.model or self.service.model_names[0],
            "system_fingerprint": f"pjengine-{pjengine.__version__}",
        }
