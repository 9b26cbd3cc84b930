"""What operators and load balancers ask: models, health, version, load, metrics."""

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import pjengine
from pjengine.serving.errors import ERRORS, ApiError
from pjengine.serving.service import Service, service_of

router = APIRouter(responses=ERRORS)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The names under which the model is served."""
    service = service_of(request)
    return {"object": "list", "data": [_card(service, name) for name in service.model_names]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    service = service_of(request)
    service.check_model(model)
    return _card(service, model)


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pjengine",
        "root": service.llm.engine.config.model,
        "parent": None,
        "max_model_len": service.llm.engine.max_model_len,
        "vocab_size": service.llm.engine.model_config.vocab_size,  # for clients that make up token ids
    }


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken, 503 afterwards."""
    if not service_of(request).llm.is_running:
        raise ApiError(503, "the engine takes no requests any more")
    return Response()


@router.get("/ping")
@router.post("/ping")
async def ping(request: Request) -> Response:
    """The same, for SageMaker."""
    return await health(request)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": pjengine.__version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """How many requests are being answered."""
    return {"server_load": service_of(request).num_requests}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
