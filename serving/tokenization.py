"""POST /tokenize and /detokenize."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from pjengine.serving.errors import ERRORS
from pjengine.serving.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from pjengine.serving.service import service_of

router = APIRouter()


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: Annotated[TokenizeRequest, Body()], request: Request) -> dict[str, Any]:
    """The token ids of a text, or of what the chat template makes of a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    if isinstance(body, TokenizeChatRequest):
        read = partial(service.prompts.read_chat, body)
    else:
        read = partial(service.prompts.read, body.prompt, add_special_tokens=body.add_special_tokens)
    tokens = (await service.read(read))["prompt_token_ids"]
    texts = service.prompts.token_texts(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": service.llm.engine.max_model_len,
        "tokens": tokens,
        "token_strs": texts,
    }


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids, special ones included."""
    service = service_of(request)
    service.check_model(body.model)
    return {"prompt": await service.read(partial(service.prompts.decode, body.tokens))}
