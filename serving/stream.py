"""Answers that take their time: sent while they are made, and given up when their client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pjengine.serving.errors import ApiError, as_api_error

_SEND_S = 60.0  # for one part of a stream: a client that does not read holds pages no longer
_LAST_WORDS_S = 5.0  # for the end of a stream, where its client may have ceased to read
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> bytes:
    return _JSON.encode(value).encode()


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


class _Answer(Response):
    """Runs `_answer` until it ends or the client leaves; then no part of it is left running."""

    def __init__(self, *, timeout_s: float | None, headers: Mapping[str, str] | None) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.timeout_s = timeout_s

    async def _answer(self, send: Send) -> None:
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = None

        async def answer() -> None:
            nonlocal error
            try:
                await self._answer(send)
            except Exception as failure:  # nothing has been sent yet
                error = as_api_error(failure)

        await _while_connected(receive, answer())
        if error is not None:
            await error.response()(scope, receive, send)

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


class JsonAnswer(_Answer):
    """An object that takes its time."""

    media_type = "application/json"

    def __init__(
        self,
        result: Callable[[], Awaitable[Mapping[str, Any]]],
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(timeout_s=timeout_s, headers=headers)
        self._result = result

    async def _answer(self, send: Send) -> None:
        async with asyncio.timeout(self.timeout_s):
            body = dumps(await self._result())
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await send({"type": "http.response.body", "body": body})


class StreamAnswer(_Answer):
    """Parts that are sent as they come. The status waits for the first: what fails before it is no stream."""

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(timeout_s=timeout_s, headers={"cache-control": "no-cache", **(headers or {})})
        self._parts = parts

    def _end(self, error: ApiError | None) -> bytes:
        """What is sent after the last part."""
        raise NotImplementedError

    async def _answer(self, send: Send) -> None:
        is_started, error = False, None
        try:
            async with asyncio.timeout(self.timeout_s), aclosing(self._parts) as parts:
                async for part in parts:
                    if not is_started:
                        await self._start(send)
                        is_started = True
                    async with asyncio.timeout(_SEND_S):
                        await send({"type": "http.response.body", "body": part, "more_body": True})
        except Exception as failure:
            if not is_started:
                raise
            error = as_api_error(failure)
        with suppress(TimeoutError):  # uvicorn then closes the connection, and the client sees no end
            async with asyncio.timeout(_LAST_WORDS_S):
                await send({"type": "http.response.body", "body": self._end(error)})


class EventStream(StreamAnswer):
    """Server-sent events; `[DONE]` ends them, whatever has happened."""

    media_type = "text/event-stream"

    def _end(self, error: ApiError | None) -> bytes:
        return (b"" if error is None else event(error.body())) + b"data: [DONE]\n\n"


class ObjectStream(StreamAnswer):
    """JSON objects, each ended by a zero byte, as the first servers of this kind sent them."""

    media_type = "application/octet-stream"

    def _end(self, error: ApiError | None) -> bytes:
        return b"" if error is None else dumps(error.body()) + b"\0"


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; if the client leaves, ends it at once and returns when it has ended."""
    limit = asyncio.timeout(None)

    async def end_when_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        limit.reschedule(0)

    try:
        async with limit:
            watcher = asyncio.create_task(end_when_left())
            try:
                await work
            finally:
                watcher.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
