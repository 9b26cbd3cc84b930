"""A small HTTP/1.1 client: one request on a connection of its own, its answer as it comes.

The standard library has none for asyncio, and none is among the dependencies. It is quick enough for a
load of hundreds of streams, each of whose events is a part of its own.
"""

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable
from urllib.parse import SplitResult, urlsplit

CONNECT_TIMEOUT_S = 30.0
_MAX_HEAD_BYTES = 65536
_READ_BYTES = 262144


class RemoteError(OSError):
    """A server cannot be reached, refuses, or does not speak as it should; the text is one line."""


@dataclass(frozen=True)
class Reply:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: Mapping[str, str]  # by lower-case name
    parts: AsyncGenerator[bytes, None]
    hint: str = ""  # what to change, where it was not answered

    async def read(self) -> bytes:
        return b"".join([part async for part in self.parts])

    async def check(self) -> "Reply":
        """Raises RemoteError unless the status is 200: the text is that of the server."""
        if self.status != 200:
            raise RemoteError(f"the server answers {self.status}: {error_text(await self.read())}{self.hint}")
        return self


@runtime_checkable
class Source(Protocol):
    """Whoever answers requests: a server, or an application in this process."""

    def request(self, method: str, path: str, content: bytes = b"") -> Any:
        """An asynchronous context manager that gives a Reply; leaving it gives the request up.

        `path` is that of OpenAI's API, without /v1; `content` is JSON.
        """


def error_text(body: bytes) -> str:
    """What the body of an error says, in one line."""
    try:
        told = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        told = body.decode(errors="replace") or "nothing more"
    return " ".join(str(told).split())[:2000]


@dataclass(frozen=True)
class Endpoint:
    """A server's base URL, such as http://localhost:8000/v1, and the key that it wants."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            is_good = self._parts.scheme in ("http", "https") and self._parts.hostname is not None
            is_good &= self._parts.port != 0 and self._parts.username is None
        except ValueError:  # the port
            is_good = False
        if not is_good or not self.url.isascii() or any(char <= " " for char in self.url):
            raise ValueError(f"a URL such as http://localhost:8000/v1 is needed, got {self.url!r}")
        key = self.api_key or ""
        if not key.isascii() or any(char < " " for char in key):
            raise ValueError("the key must be visible ASCII characters")

    @cached_property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)

    @cached_property
    def _tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self._parts.scheme == "https" else None

    @asynccontextmanager
    async def request(self, method: str, path: str, content: bytes = b"") -> AsyncIterator[Reply]:
        """See `Source`.

        Raises:
          RemoteError: the server cannot be reached, or its answer is not HTTP.
        """
        reader, writer = await self._connect()
        try:
            writer.write(self._head(method, path, content) + content)
            answer = _AnswerParser()
            body = _read_body(reader, answer, self.url)
            async with aclosing(body):
                first = await anext(body)  # empty, once the head is there
                assert first == b"" and answer.status is not None
                is_astray = answer.status == 404 and not self._parts.path.rstrip("/").endswith("/v1")
                hint = f"; the URL should end in /v1, got {self.url}" if is_astray else ""
                yield Reply(answer.status, answer.headers, body, hint)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts, tls = self._parts, self._tls
        port = parts.port or (80 if tls is None else 443)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(parts.hostname, port, ssl=tls, limit=_READ_BYTES)
        except TimeoutError as error:
            raise RemoteError(f"{self.url} does not answer within {CONNECT_TIMEOUT_S:g} s") from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
            raise RemoteError(f"{self.url} cannot be reached: {reason}") from error

    def _head(self, method: str, path: str, content: bytes) -> bytes:
        lines = [
            f"{method} {self._parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {self._parts.netloc}",
            "Connection: close",
            "Accept-Encoding: identity",
        ]
        if content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode()


async def _read_body(
    reader: asyncio.StreamReader, answer: "_AnswerParser", url: str
) -> AsyncGenerator[bytes, None]:
    """Yields nothing once the head is there, then what there is of the body."""
    is_head_told = False
    try:
        while not answer.is_complete:
            data = await reader.read(_READ_BYTES)
            part = answer.feed(data) if data else answer.end()
            if not is_head_told and answer.status is not None:
                is_head_told = True
                yield b""
            if part:
                yield part
    except OSError as error:
        if isinstance(error, RemoteError):
            raise
        raise RemoteError(f"the connection to {url} broke: {error.strerror or error}") from error
    except ValueError as error:
        raise RemoteError(f"{url} does not answer as HTTP does: {error}") from error


class _AnswerParser:
    """The bytes of one answer -> its status, its headers, and the bytes of its body."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self._unread = b""
        self._is_chunked = False
        self._num_left: int | None = None  # of the chunk, or of the body; None: until the connection ends
        self._is_end_due = False  # of a chunk: it is followed by an empty line

    def feed(self, data: bytes) -> bytes:
        """Takes what has come; returns what that adds to the body. Raises ValueError for what is not HTTP."""
        data = self._unread + data
        if self.status is None:
            data = self._read_heads(data)
        if self.status is None:
            self._unread = data
            return b""
        if self._is_chunked:
            return self._read_chunks(data)
        if self._num_left is not None:
            data = data[: self._num_left]
            self._num_left -= len(data)
            self.is_complete = self._num_left == 0
        self._unread = b""
        return data

    def end(self) -> bytes:
        """The connection has ended."""
        if self.status is None or self._is_chunked or self._num_left is not None:
            raise ValueError("the connection ended in the middle of the answer")
        self.is_complete = True
        return b""

    def _read_heads(self, data: bytes) -> bytes:
        """Reads up to the end of the head, if it is there; returns the rest."""
        while self.status is None:
            head, mark, rest = data.partition(b"\r\n\r\n")
            if len(head) > _MAX_HEAD_BYTES:
                raise ValueError("its head does not end")
            if not mark:
                return data
            data = rest
            first, *lines = head.decode("latin-1").split("\r\n")
            version, _, code = first.partition(" ")
            if not version.startswith("HTTP/1.") or not code[:3].isdecimal():
                raise ValueError(f"it begins with {first[:80]!r}")
            if code.startswith("1"):
                continue  # not the answer yet
            self.status = int(code[:3])
            pairs = (line.partition(":") for line in lines)
            self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._is_chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if self._is_chunked:
            self._num_left = 0
        elif (length := self.headers.get("content-length")) is not None:
            self._num_left = int(length)
            self.is_complete = self._num_left == 0
        return data

    def _read_chunks(self, data: bytes) -> bytes:
        parts, at = [], 0
        assert self._num_left is not None
        while not self.is_complete:
            if self._num_left:
                part = data[at : at + self._num_left]
                parts.append(part)
                at += len(part)
                self._num_left -= len(part)
                if self._num_left:
                    break
                self._is_end_due = True
            if self._is_end_due:
                if len(data) < at + 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ValueError("a chunk is longer than it says")
                at += 2
                self._is_end_due = False
            if (end := data.find(b"\r\n", at)) < 0:
                if len(data) > at + _MAX_HEAD_BYTES:
                    raise ValueError("a chunk has no size")
                break
            self._num_left = int(data[at:end].partition(b";")[0], 16)
            at = end + 2
            self.is_complete = self._num_left == 0
        self._unread = data[at:]
        return b"".join(parts)


class EventParser:
    """Parts of a stream of server-sent events -> the data of each event, which is one line here."""

    def __init__(self) -> None:
        self._unread = b""

    def feed(self, part: bytes) -> list[bytes]:
        *lines, self._unread = (self._unread + part).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


async def events(reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
    """The objects of a stream, until `[DONE]`.

    Raises:
      RemoteError: the answer is no stream, or ends with an error or without an end.
    """
    parser = EventParser()
    async for part in (await reply.check()).parts:
        for data in parser.feed(part):
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise RemoteError(f"the server sent an event that is no JSON: {data[:80]!r}") from error
            if "error" in event:
                raise RemoteError(f"the answer ended: {error_text(data)}")
            yield event
    raise RemoteError("the stream ended without [DONE]")
