"""What operators and load balancers ask: models, health, version, load, metrics."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import pjengine
from pjengine.serving.errors import ERRORS, ApiError
from pjengine.serving.replies import LoadReply, ModelCard, ModelList, VersionReply
from pjengine.serving.service import Service, service_of

router = APIRouter(responses=ERRORS)


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """The names under which the model is served."""
    service = service_of(request)
    return ModelList(data=[_card(service, name) for name in service.model_names])


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> ModelCard:
    service = service_of(request)
    service.check_model(model)
    return _card(service, model)


def _card(service: Service, name: str) -> ModelCard:
    engine = service.llm.engine
    return ModelCard(
        id=name,
        created=service.created,
        root=engine.config.model,
        max_model_len=engine.max_model_len,
        vocab_size=engine.model_config.vocab_size,
    )


@router.get("/health", response_class=Response)
async def health(request: Request) -> Response:
    """200 while requests are taken, 503 afterwards."""
    if not service_of(request).llm.is_running:
        raise ApiError(503, "the engine takes no requests any more")
    return Response()


@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def ping(request: Request) -> Response:
    """The same, for SageMaker."""
    return await health(request)


@router.get("/version")
async def version() -> VersionReply:
    return VersionReply(version=pjengine.__version__)


@router.get("/load")
async def load(request: Request) -> LoadReply:
    """How many requests are being answered."""
    return LoadReply(server_load=service_of(request).num_requests)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
