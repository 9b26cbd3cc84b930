"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.serving.answer import Answer, Choice, Form
from pjengine.serving.errors import ERRORS
from pjengine.serving.logprobs import Spelling, chat_logprobs, prompt_logprobs
from pjengine.serving.protocol import ChatRequest
from pjengine.serving.replies import ChatReply, generated
from pjengine.serving.request_id import request_id_of
from pjengine.serving.service import Call, Service, service_of

router = APIRouter(responses=ERRORS)


@router.post("/v1/chat/completions", responses=generated(ChatReply, "text/event-stream"))
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    request_id = request_id_of(request, body.request_id)
    return Answer(
        service=service,
        body=body,
        call=_call(body, service, f"chatcmpl-{request_id}"),
        form=_ChatForm(body, service),
        kind="chat.completion.chunk" if body.stream else "chat.completion",
        request_id=request_id,
    ).send()


def _call(body: ChatRequest, service: Service, request_id: str) -> Call:
    params = body.sampling_params(
        service.default_params,
        max_tokens=body.limit,  # none: as many as fit
        logprobs=body.top_logprobs or 0 if body.logprobs else None,
    )
    return Call(
        request_id=request_id,
        prompts=[partial(service.prompts.read_chat, body)],
        params=params,
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
    )


class _ChatForm(Form):
    """A message for each choice; streamed, first its role, then what it grows by."""

    def __init__(self, body: ChatRequest, service: Service) -> None:
        self._body = body
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
        if not self._body.stream:
            return [
                self._choice(completion, message=self._message(completion)) for completion in output.outputs
            ]
        begun = [] if self._has_begun else self._beginnings()
        self._has_begun = True
        return begun + [
            self._choice(completion, delta={"content": completion.text})
            for completion in output.outputs
            if self._has_news(completion)
        ]

    def _message(self, completion: CompletionOutput) -> dict[str, Any]:
        return {"role": self._role, "content": self._echoed + completion.text, "refusal": None}

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
        """Not while a character is incomplete, or the text may become a stop string."""
        is_shown = completion.text or completion.finish_reason is not None
        return bool(is_shown or self._body.logprobs or self._body.return_token_ids)

    def _choice(self, completion: CompletionOutput, **content: dict[str, Any]) -> Choice:
        choice: Choice = {
            "index": completion.index,
            **content,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
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
