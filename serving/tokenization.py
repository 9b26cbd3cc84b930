"""POST /tokenize and /detokenize."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Request

from pjengine.serving.errors import ERRORS
from pjengine.serving.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from pjengine.serving.replies import DetokenizeReply, TokenizeReply
from pjengine.serving.service import service_of

router = APIRouter(responses=ERRORS)


@router.post("/tokenize")
async def tokenize(body: Annotated[TokenizeRequest, Body()], request: Request) -> TokenizeReply:
    """The token ids of a text, or of what the chat template makes of a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    if isinstance(body, TokenizeChatRequest):
        read = partial(service.prompts.read_chat, body)
    else:
        read = partial(service.prompts.read, body.prompt, add_special_tokens=body.add_special_tokens)
    tokens = (await service.read(read))["prompt_token_ids"]
    texts = service.prompts.token_texts(tokens) if body.return_token_strs else None
    return TokenizeReply(
        count=len(tokens), max_model_len=service.llm.engine.max_model_len, tokens=tokens, token_strs=texts
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeReply:
    """The text of token ids, special ones included."""
    service = service_of(request)
    service.check_model(body.model)
    return DetokenizeReply(prompt=await service.read(partial(service.prompts.decode, body.tokens)))
