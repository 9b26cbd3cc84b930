"""What a request passes before a route sees it: who sends it, and how much. Plain ASGI."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pjengine.serving.errors import ApiError

OPEN_PATHS = ("/health", "/ping")  # load balancers have no keys


class KeyGate:
    """Lets those in who send `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_request = scope["type"] == "http"
        if is_request and _route_path(scope) not in OPEN_PATHS and not self._is_known(scope):
            error = ApiError(
                401,
                "a key is needed: send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        """Looks at every key and the whole of each: how long it takes says nothing about them."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        own, is_known = _digest(key.strip()), False
        for digest in self._digests:
            is_known |= hmac.compare_digest(own, digest)
        return is_known and kind.lower() == b"bearer"


def _route_path(scope: Scope) -> str:
    """The path that routes know, without that under which a proxy shows the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class SizeGate:
    """Reads each body whole before anything is done with it, and none that is larger than it may be."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        is_too_large = length.isdigit() and int(length) > self._max_bytes
        parts, num_bytes, is_complete = [], 0, False
        while not is_too_large and not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            is_too_large = num_bytes > self._max_bytes
            is_complete = not message.get("more_body", False)
        if is_too_large:
            error = ApiError(413, f"the body has more than {self._max_bytes} bytes")
            await error.response()(scope, receive, send)
            return
        body: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            message, body = body, None
            return await receive() if message is None else message

        await self._app(scope, replay, send)
