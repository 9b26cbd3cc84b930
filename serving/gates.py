"""What a request passes before a route sees it: who sends it, and how much. Plain ASGI."""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pjengine.serving.errors import ApiError

OPEN_PATHS = ("/health", "/ping")  # load balancers have no keys
_PAGES = ("/dashboard", "/docs", "/openapi.json")  # that browsers open
BODY_TIMEOUT_S = 60.0


class KeyGate:
    """Lets those in who send one of the keys: as `Authorization: Bearer KEY`, or as the password of Basic.

    Browsers ask for a password when they are told to, and from then on send it by themselves: so the
    dashboard gets its key, and no page or URL has to hold one. They would send it for any page on the web,
    too. What changes something is therefore refused if it comes from a page of another origin.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_request = scope["type"] == "http"
        if is_request and _route_path(scope) not in OPEN_PATHS and not self._is_known(scope):
            error = ApiError(
                401,
                "a key is needed: send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": _challenge(_route_path(scope))},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        """Looks at every key and the whole of each: how long it takes says nothing about them."""
        kind, _, key = _header(scope, b"authorization").partition(b" ")
        kind, key = kind.lower(), key.strip()
        own, is_known = _digest(_password(key) if kind == b"basic" else key), False
        for digest in self._digests:
            is_known |= hmac.compare_digest(own, digest)
        return is_known and (kind == b"bearer" or (kind == b"basic" and not _is_forged(scope)))


def _challenge(path: str) -> str:
    is_page = path in _PAGES or path.startswith("/dashboard/")
    return 'Basic realm="pjengine", charset="UTF-8"' if is_page else "Bearer"


def _password(credentials: bytes) -> bytes:
    """Of Basic, behind any user name; empty, which no key is, if there is none."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _is_forged(scope: Scope) -> bool:
    """Whether a browser may send its password for a page of another origin, and to change something."""
    if scope["method"] in ("GET", "HEAD"):  # these change nothing, and other pages cannot read what they give
        return False
    if site := _header(scope, b"sec-fetch-site"):  # sent over TLS, and on this machine
        return site not in (b"same-origin", b"none")
    origin = _header(scope, b"origin")
    return bool(origin) and origin.partition(b"://")[2] != _header(scope, b"host")


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _route_path(scope: Scope) -> str:
    """The path that routes know, without that under which a proxy shows the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class SizeGate:
    """Reads each body whole before anything is done with it; none may be too large, or take too long."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                whole = await self._read(scope, receive)
        except TimeoutError:
            told = f"the body has not come whole within {self._timeout_s:g} s"
            error = ApiError(408, told, headers={"Connection": "close"})
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if whole is None:
            return
        body: Message | None = {"type": "http.request", "body": whole, "more_body": False}

        async def replay() -> Message:
            nonlocal body
            message, body = body, None
            return await receive() if message is None else message

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if its client has left. Raises ApiError for one that is too large."""
        length = _header(scope, b"content-length")
        is_too_large = length.isdigit() and int(length) > self._max_bytes
        parts, num_bytes, is_complete = [], 0, False
        while not is_too_large and not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            is_too_large = num_bytes > self._max_bytes
            is_complete = not message.get("more_body", False)
        if is_too_large:
            raise ApiError(413, f"the body has more than {self._max_bytes} bytes")
        return b"".join(parts)
