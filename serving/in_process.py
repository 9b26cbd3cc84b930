"""The application, called in this process as a server would be, without a socket."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

from pjengine.async_llm import AsyncLLM
from pjengine.config import EngineConfig
from pjengine.serving.app import build_app
from pjengine.serving.http_client import Reply
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.service import Service


@dataclass(frozen=True)
class InProcess:
    """Calls an application; see `http_client.Source`."""

    app: ASGIApp
    headers: Mapping[str, str] = field(default_factory=dict)  # of each request

    @asynccontextmanager
    async def request(self, method: str, path: str, content: bytes = b"") -> AsyncIterator[Reply]:
        messages: asyncio.Queue[Message | None] = asyncio.Queue()  # None: the application has returned
        has_left = asyncio.Event()
        request: Message | None = {"type": "http.request", "body": content, "more_body": False}

        async def receive() -> Message:
            nonlocal request
            message, request = request, None
            if message is not None:
                return message
            await has_left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(self._scope(method, path), receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            if (start := await messages.get()) is None:
                task.result()  # raises what the application raised
                raise RuntimeError(f"the application did not answer {method} {path}")
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
            async with aclosing(_parts(messages)) as parts:
                yield Reply(start["status"], headers, parts)
        finally:
            has_left.set()
            await asyncio.gather(task, return_exceptions=True)  # an error has been answered with 500

    def _scope(self, method: str, path: str) -> dict[str, Any]:
        headers = {"content-type": "application/json", **self.headers}
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": f"/v1{path}",
            "raw_path": f"/v1{path}".encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
        }


async def _parts(messages: asyncio.Queue[Message | None]) -> AsyncGenerator[bytes, None]:
    while (message := await messages.get()) is not None:
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


@contextmanager
def local_service(engine_config: EngineConfig, config: ServerConfig) -> Iterator[tuple[Service, ASGIApp]]:
    """Loads a model under the routes of a server; ends the engine afterwards.

    Raises:
      ValueError, OSError: the model or a setting is not possible.
    """
    service = Service(AsyncLLM(**vars(engine_config)), config)
    try:
        yield service, build_app(service)
    finally:
        service.close()
