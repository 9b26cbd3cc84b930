"""POST /v1/embeddings."""

import base64
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from pjengine.embeddings import EmbeddingOutput, embedding_of, embedding_params
from pjengine.serving.errors import ERRORS, ApiError, bad_request
from pjengine.serving.prompt_reader import GivenPrompt
from pjengine.serving.protocol import EmbeddingRequest
from pjengine.serving.replies import EmbeddingReply
from pjengine.serving.request_id import REQUEST_ID_HEADER, request_id_of
from pjengine.serving.service import Call, Service, service_of
from pjengine.serving.stream import JsonAnswer

router = APIRouter(responses=ERRORS)


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingReply}})
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """A vector for each text: a hidden state of the model."""
    service = service_of(request)
    service.check_model(body.model)
    request_id = request_id_of(request, body.request_id)
    call = _call(body, service, f"embd-{request_id}")
    config = service.config
    headers = {REQUEST_ID_HEADER: request_id} if config.enable_request_id_headers else {}
    return JsonAnswer(
        partial(_whole, body, service, call), timeout_s=config.request_timeout_s, headers=headers
    )


def _call(body: EmbeddingRequest, service: Service, request_id: str) -> Call:
    if not body.inputs:
        raise ApiError(400, "input is empty: at least one text is needed", param="input")
    try:
        params = embedding_params(
            pooling=body.pooling, layer=body.layer, truncate_prompt_tokens=body.truncate_prompt_tokens
        )
    except ValueError as error:
        raise bad_request(error, EmbeddingRequest.model_fields) from error
    return Call(
        request_id=request_id,
        prompts=[_prompt(body, service, prompt) for prompt in body.inputs],
        params=params,
        priority=body.priority,
        cache_salt=body.cache_salt,
        user=body.user,
        fields={"prompt": "input"},
    )


def _prompt(
    body: EmbeddingRequest, service: Service, prompt: str | list[int]
) -> GivenPrompt | Callable[[], GivenPrompt]:
    if not isinstance(prompt, str):
        return {"prompt_token_ids": prompt}
    if body.add_special_tokens:  # as the engine does by itself
        return {"prompt": prompt}
    is_cut = body.truncate_prompt_tokens is not None
    return partial(service.prompts.read, prompt, add_special_tokens=False, is_cut=is_cut)


async def _whole(body: EmbeddingRequest, service: Service, call: Call) -> dict[str, Any]:
    found: dict[int, EmbeddingOutput] = {}
    async with aclosing(service.outputs(call)) as outputs:
        async for index, output in outputs:
            if output.finished:
                found[index] = embedding_of(output, normalize=body.normalize)
    num_tokens = sum(len(own.prompt_token_ids) for own in found.values())
    return {
        "id": call.request_id,
        "object": "list",
        "created": int(time.time()),
        "model": body.model or service.model_names[0],
        "data": [
            {"index": index, "object": "embedding", "embedding": _written(body, found[index].embedding)}
            for index in sorted(found)
        ],
        "usage": {
            "prompt_tokens": num_tokens,
            "completion_tokens": 0,
            "total_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(own.num_cached_tokens for own in found.values())},
        },
    }


def _written(body: EmbeddingRequest, embedding: np.ndarray) -> list[float] | str:
    if body.encoding_format == "float":
        return embedding.tolist()
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
