"""The HTTP application: the routes, what stands before them, and the service behind them."""

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import pjengine
from pjengine.serving import chat, completions, dashboard, embeddings, generate, operations, tokenization
from pjengine.serving.errors import add_error_handlers
from pjengine.serving.gates import KeyGate, SizeGate
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.service import Service


def build_app(service: Service) -> FastAPI:
    """The application over a service, which its routes find in `app.state`."""
    app = FastAPI(
        title="pjengine",
        version=pjengine.__version__,
        middleware=_gates(service.config),
        redoc_url=None,
    )
    app.state.service = service
    for module in (completions, chat, embeddings, generate, tokenization, operations, dashboard):
        app.include_router(module.router)
    add_error_handlers(app)
    return app


def _gates(config: ServerConfig) -> list[Middleware]:
    """In the order in which a request meets them. CORS comes first: browsers ask it without a key."""
    gates = []
    if config.allowed_origins:
        gates.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                allow_credentials=config.allow_credentials,
            )
        )
    if config.api_keys:
        gates.append(Middleware(KeyGate, keys=config.api_keys))
    gates.append(Middleware(SizeGate, max_bytes=config.max_request_bytes))
    return gates
