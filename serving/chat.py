"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.serving.answer import Answer, Choice, Form
from pjengine.serving.errors import ERRORS, ApiError
from pjengine.serving.logprobs import Spelling, chat_logprobs, prompt_logprobs
from pjengine.serving.message_reader import MessageForm, MessageReader, call_delta, call_of
from pjengine.serving.protocol import ChatRequest
from pjengine.serving.replies import ChatReply, generated
from pjengine.serving.request_id import request_id_of
from pjengine.serving.service import Call, Service, service_of
from pjengine.serving.text_parser import Parts

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", responses=generated(ChatReply, "text/event-stream"))
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    request_id = request_id_of(request, body.request_id)
    message_form = MessageForm(body, service.config)
    return Answer(
        service=service,
        body=body,
        call=_call(body, service, f"chatcmpl-{request_id}", message_form),
        form=_ChatForm(body, service, message_form),
        kind="chat.completion.chunk" if body.stream else "chat.completion",
        request_id=request_id,
    ).send()


def _call(body: ChatRequest, service: Service, request_id: str, message_form: MessageForm) -> Call:
    if body.use_beam_search and body.are_calls_formed:
        text = "beam search does not hold to the schemas of tools: leave it out, or the tools"
        raise ApiError(400, text, param="use_beam_search")
    params = body.sampling_params(
        service.default_params,
        max_tokens=body.limit,  # none: as many as fit
        logprobs=body.top_logprobs or 0 if body.logprobs else None,
    )
    return Call(
        request_id=request_id,
        prompts=[partial(service.prompts.read_chat, body)],
        params=message_form.sampling_params(params, service.prompts),
        form=message_form.form_after,
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        fields={
            "structured_outputs": body.form_field,
            "logprobs": "top_logprobs",
            "prompt": "messages",
        },
    )


class _ChatForm(Form):
    """A message for each choice; streamed, first its role, then what it grows by."""

    def __init__(self, body: ChatRequest, service: Service, message_form: MessageForm) -> None:
        self._body = body
        self._message_form = message_form
        self._readers: dict[int, MessageReader] = {}  # by index of the choice
        self._role = service.config.response_role
        self._spelling = Spelling(
            tokenizer=service.prompts.tokenizer,
            is_by_id=body.return_tokens_as_token_ids or service.config.return_tokens_as_token_ids,
        )
        final = body.messages[-1].for_template()
        self._echoed = final["content"] if body.echo and final["role"] == self._role else ""
        self._has_begun = self._is_prompt_shown = False

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._body.return_token_ids and not self._is_prompt_shown:
            self._is_prompt_shown = True
            fields["prompt_token_ids"] = output.prompt_token_ids
        if output.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return fields

    def choices(self, index: int, output: RequestOutput) -> list[Choice]:
        split = [(completion, self._split(completion, output)) for completion in output.outputs]
        if not self._body.stream:
            return [self._choice(own, message=self._message(parts)) for own, parts in split]
        begun = [] if self._has_begun else self._beginnings()
        self._has_begun = True
        deltas = [(own, self._delta(parts)) for own, parts in split]
        return begun + [
            self._choice(own, delta=delta or {"content": ""})
            for own, delta in deltas
            if delta or self._has_news(own)
        ]

    def _split(self, completion: CompletionOutput, output: RequestOutput) -> Parts:
        reader = self._readers.get(completion.index)
        if reader is None:
            reader = self._readers[completion.index] = self._message_form.reader(output.prompt or "")
        return reader.push(completion.text, is_last=completion.finish_reason is not None)

    def _message(self, parts: Parts) -> dict[str, Any]:
        content: str | None = self._echoed + parts.content
        message: dict[str, Any] = {"role": self._role, "content": content, "refusal": None}
        if self._message_form.shows_reasoning:
            message["reasoning"] = parts.reasoning or None
        if parts.calls:
            message |= {"content": content or None, "tool_calls": [call_of(call) for call in parts.calls]}
        return message

    def _delta(self, parts: Parts) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if parts.reasoning and self._message_form.shows_reasoning:
            delta["reasoning"] = parts.reasoning
        if parts.content:
            delta["content"] = parts.content
        if parts.calls:
            delta["tool_calls"] = [call_delta(call) for call in parts.calls]
        return delta

    def _beginnings(self) -> list[Choice]:
        deltas = [{"role": self._role, "content": ""}]
        if self._echoed:
            deltas.append({"content": self._echoed})
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._body.n or 1)
            for delta in deltas
        ]

    def _has_news(self, completion: CompletionOutput) -> bool:
        """Not while a character is incomplete, or the text may become a stop string or a mark."""
        has_ended = completion.finish_reason is not None
        return has_ended or self._body.logprobs or self._body.return_token_ids

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        """As OpenAI's API has it, an answer that was told what to call just stops."""
        has_called = self._readers[completion.index].has_called and self._body.way != "named"
        is_over = completion.finish_reason == "stop"
        return "tool_calls" if is_over and has_called else completion.finish_reason

    def _choice(self, completion: CompletionOutput, **content: dict[str, Any]) -> Choice:
        choice: Choice = {
            "index": completion.index,
            **content,
            "logprobs": None,
            "finish_reason": self._finish_reason(completion),
            "stop_reason": completion.stop_reason,
        }
        body = self._body
        if body.logprobs:
            assert completion.logprobs is not None
            choice["logprobs"] = chat_logprobs(
                self._spelling, completion.token_ids, completion.logprobs, body.top_logprobs or 0
            )
        if body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice
