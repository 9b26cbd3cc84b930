"""POST /v1/completions."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjengine.outputs import CompletionOutput, RequestOutput
from pjengine.serving.answer import Answer, Choice, Form
from pjengine.serving.errors import ERRORS, ApiError
from pjengine.serving.infill import Infill, find_infill
from pjengine.serving.logprobs import CompletionLogprobs, Spelling, prompt_logprobs
from pjengine.serving.prompt_reader import GivenPrompt
from pjengine.serving.protocol import CompletionRequest
from pjengine.serving.ranking import candidates, likeliest, mean_logprob
from pjengine.serving.replies import CompletionReply, generated
from pjengine.serving.request_id import request_id_of
from pjengine.serving.service import Call, Service, service_of
from pjengine.token_logprobs import LogprobsList

router = APIRouter(responses=ERRORS)


@router.post("/v1/completions", responses=generated(CompletionReply, "text/event-stream"))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues each prompt."""
    service = service_of(request)
    service.check_model(body.model)
    request_id = request_id_of(request, body.request_id)
    return Answer(
        service=service,
        body=body,
        call=_call(body, service, f"cmpl-{request_id}"),
        form=_CompletionForm(body, service),
        kind="text_completion",
        request_id=request_id,
    ).send()


def _call(body: CompletionRequest, service: Service, request_id: str) -> Call:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0 shows nothing without echo", param="max_tokens")
    if body.max_tokens == 0 and (body.use_beam_search or body.best_of not in (None, body.n or 1)):
        raise ApiError(400, "best_of chooses among answers, and max_tokens=0 asks for none", param="best_of")
    # The engine generates at least one token; `_CompletionForm` hides it.
    max_tokens = service.default_params.max_tokens if body.max_tokens is None else body.max_tokens or 1
    more = {"max_tokens": max_tokens, **candidates(body, service.default_params)}
    if body.logprobs is not None:
        more["logprobs"] = body.logprobs
    params = body.sampling_params(service.default_params, **more)
    infill = None if body.suffix is None else _infill(body, service)
    if infill is not None:
        params = infill.ended(params)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params = dataclasses.replace(params, prompt_logprobs=body.logprobs)
    return Call(
        request_id=request_id,
        prompts=[_prompt(body, service, prompt, infill) for prompt in body.prompts],
        params=params,
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        fields={"structured_outputs": body.form_field},
    )


def _infill(body: CompletionRequest, service: Service) -> Infill:
    """Raises ApiError for what does not go with a suffix."""
    if not all(isinstance(prompt, str) for prompt in body.prompts):
        raise ApiError(
            400, "suffix needs a prompt that is text: token ids are sent as they are", param="suffix"
        )
    for name in ("echo", "truncate_prompt_tokens"):
        if getattr(body, name):
            reason = "it is for a prompt that the answer follows, and here a suffix stands between"
            raise ApiError(400, f"{name} with suffix is refused: {reason}", param=name)
    return find_infill(service.prompts.tokenizer, service.prompts.max_tokens)


def _prompt(
    body: CompletionRequest, service: Service, prompt: str | list[int], infill: Infill | None
) -> GivenPrompt | Callable[[], GivenPrompt]:
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    if infill is not None:
        assert body.suffix is not None
        return partial(infill.read, prompt, body.suffix, add_special_tokens=body.add_special_tokens)
    if body.add_special_tokens:  # as the engine does by itself
        return {"prompt": prompt}
    is_cut = body.truncate_prompt_tokens is not None
    return partial(service.prompts.read, prompt, add_special_tokens=False, is_cut=is_cut)


class _CompletionForm(Form):
    """Choices of all prompts, in the order of the prompts."""

    def __init__(self, body: CompletionRequest, service: Service) -> None:
        self._body = body
        self._spelling = Spelling(
            tokenizer=service.prompts.tokenizer,
            is_by_id=body.return_tokens_as_token_ids or service.config.return_tokens_as_token_ids,
        )
        self._begun: dict[int, CompletionLogprobs] = {}  # by index of the choice
        self._prompt_logprobs: dict[int, LogprobsList] = {}  # by index of the prompt

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        return {}

    def choices(self, index: int, output: RequestOutput) -> list[Choice]:
        if self._body.max_tokens == 0:
            for completion in output.outputs:
                completion.text, completion.token_ids, completion.logprobs = "", [], []
                completion.finish_reason, completion.stop_reason = "length", None
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs
        chosen = likeliest(output.outputs, self._body.n or 1, mean_logprob)
        choices = [self._choice(index, output, completion) for completion in chosen]
        return [choice for choice in choices if choice is not None]

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Choice | None:
        body = self._body
        text, token_ids, positions = completion.text, completion.token_ids, completion.logprobs or []
        choice_index = index * (body.n or 1) + completion.index
        is_first = choice_index not in self._begun
        if is_first:
            is_shown = body.skip_special_tokens is False
            self._begun[choice_index] = CompletionLogprobs(self._spelling, has_special=is_shown)
            if body.echo:
                text = self._prompt_text(output) + text
                token_ids = output.prompt_token_ids + token_ids
                positions = [*self._prompt_logprobs.get(index, ()), *positions]
        if (
            not text
            and completion.finish_reason is None
            and body.logprobs is None
            and not body.return_token_ids
        ):
            return None  # a character that is not complete, or what may become a stop string
        choice: Choice = {
            "index": choice_index,
            "text": text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.logprobs is not None:
            choice["logprobs"] = self._begun[choice_index].chunk(token_ids, positions)
        if body.return_token_ids:
            choice["token_ids"] = completion.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs[index])
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None and self._body.truncate_prompt_tokens is None:
            return output.prompt
        tokenizer = self._spelling.tokenizer
        return (
            "" if tokenizer is None else tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        )
