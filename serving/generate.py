"""POST /generate, as the first servers of this kind had it: text in, prompt and text out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjengine.outputs import RequestOutput
from pjengine.sampling_params import RequestOutputKind
from pjengine.serving.errors import ERRORS
from pjengine.serving.protocol import GenerateRequest
from pjengine.serving.ranking import candidates, likeliest, summed_logprob
from pjengine.serving.replies import GenerateReply, generated
from pjengine.serving.request_id import request_id_of
from pjengine.serving.service import Call, Service, service_of
from pjengine.serving.stream import JsonAnswer, ObjectStream, dumps

router = APIRouter(responses=ERRORS)


@router.post("/generate", responses=generated(GenerateReply, "application/octet-stream"))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continues a prompt: `{"text": [prompt + output, ...]}`; streamed, such an object for each new token."""
    service = service_of(request)
    defaults = service.default_params
    max_tokens = defaults.max_tokens if body.max_tokens is None else body.max_tokens
    kind = RequestOutputKind.CUMULATIVE if body.stream else RequestOutputKind.FINAL_ONLY
    call = Call(
        request_id=request_id_of(request),
        prompts=[{"prompt": body.prompt}],
        params=body.sampling_params(
            defaults, max_tokens=max_tokens, output_kind=kind, **candidates(body, defaults)
        ),
    )
    timeout_s = service.config.request_timeout_s
    if body.stream:
        return ObjectStream(_objects(service, call), timeout_s=timeout_s)
    return JsonAnswer(partial(_whole, service, call, body.n or 1), timeout_s=timeout_s)


async def _objects(service: Service, call: Call) -> AsyncGenerator[bytes, None]:
    async with aclosing(service.outputs(call)) as outputs:
        async for _, output in outputs:
            yield dumps(_texts(output)) + b"\0"


async def _whole(service: Service, call: Call, n: int) -> dict[str, Any]:
    async with aclosing(service.outputs(call)) as outputs:
        [(_, output)] = [item async for item in outputs]
    output.outputs = likeliest(output.outputs, n, summed_logprob)
    return _texts(output)


def _texts(output: RequestOutput) -> dict[str, Any]:
    return {"text": [f"{output.prompt}{completion.text}" for completion in output.outputs]}
