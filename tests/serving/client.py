"""Calls the application in this process: no socket, and no server."""

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import Any

import httpx


def parse_events(body: bytes) -> list[Any]:
    """The objects of server-sent events, of which `[DONE]` is the last."""
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass(frozen=True)
class Client:
    app: Any
    service: Any
    root_path: str = ""  # under which a proxy shows the application

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=self.root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **request)

        return asyncio.run(asyncio.wait_for(main(), 120))

    def get(self, path: str, **request: Any) -> httpx.Response:
        return self.send("GET", path, **request)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.send("POST", path, json=body)

    def answer(self, path: str, **body: Any) -> Any:
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return parse_events(response.content)

    def error(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        return error_of(self.post(path, **body))

    def assert_idle(self) -> None:
        """Nothing runs, no page is held."""
        llm = self.service.llm
        is_done = threading.Event()
        llm._thread.inbox.put(is_done.set)
        assert is_done.wait(30)
        scheduler = llm.engine.scheduler
        assert not llm.engine.has_unfinished_requests() and not llm._thread._open
        assert scheduler.pool.num_free == scheduler.pool.num_usable
        scheduler.check_integrity()
        assert self.service.num_requests == self.service._num_sequences == 0


def error_of(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer in OpenAI's shape."""
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == response.status_code >= 400
    return response.status_code, body["error"]


def make_client(llm: Any, **settings: Any) -> Client:
    from pjengine.serving.app import build_app
    from pjengine.serving.server_config import ServerConfig
    from pjengine.serving.service import Service

    service = Service(llm, ServerConfig(**settings))
    return Client(build_app(service), service)
