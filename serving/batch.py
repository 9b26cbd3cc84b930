"""Batches: a file of requests in OpenAI's format -> a file of answers, which a later run continues.

A line of the output is written at once when its request has been answered; it names the request by
`custom_id`, or by the number of its line where that could not be read. What has a line there is not run
again. A line that a crash has cut off is dropped.
"""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from pjengine.config import EngineConfig
from pjengine.line_file import LineFile, open_line_file
from pjengine.progress import progress_bar
from pjengine.serving.in_process import InProcess, local_service
from pjengine.serving.request_id import REQUEST_ID_HEADER
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.service import Service
from pjengine.serving.stream import dumps

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
_KEYS = ("custom_id", "method", "url", "body")


class EngineFailed(RuntimeError):
    """The engine cannot go on."""


class LineError(ValueError):
    """A line of the input is no request; the text says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the input."""

    number: int  # of the line, from 1
    custom_id: str | None  # None: it could not be read
    text: bytes

    @property
    def name(self) -> str:
        """The id of its line in the output."""
        return f"line-{self.number}"


@dataclass
class Counts:
    num_answered: int = 0
    num_failed: int = 0  # of these: with another status than 200, or no requests at all
    num_output_tokens: int = 0


def read_items(path: Path) -> Iterator[Item]:
    """The lines of the input that hold something."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if text := line.strip():
                yield Item(number=number, custom_id=_custom_id(text), text=text)


def _custom_id(text: bytes) -> str | None:
    try:
        custom_id = json.loads(text)["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return custom_id if isinstance(custom_id, str) else None


def check_items(path: Path) -> tuple[set[str], int]:
    """The custom_ids of the input, and how many lines it has, with those that have none.

    Raises:
      ValueError: a custom_id occurs twice, or there are no lines.
      OSError: the file cannot be read.
    """
    numbers: dict[str, int] = {}
    num_items = 0
    for item in read_items(path):
        num_items += 1
        if item.custom_id is None:
            continue
        if (first := numbers.setdefault(item.custom_id, item.number)) != item.number:
            raise ValueError(
                f"{path}: custom_id {item.custom_id!r:.200} is on line {first} and again on line "
                f"{item.number}: each request needs its own"
            )
    if num_items == 0:
        raise ValueError(f"{path} holds no requests")
    return set(numbers), num_items


class Output:
    """The file of answers, which this process alone writes. See `open_output`."""

    def __init__(self, file: LineFile, done: set[tuple[str | None, str]], num_failed: int) -> None:
        self.num_failed = num_failed  # of the answers of earlier runs
        self._file = file
        self._custom_ids = {custom_id for custom_id, _ in done if custom_id is not None}
        self._names = {name for custom_id, name in done if custom_id is None}

    def has(self, item: Item) -> bool:
        return item.name in self._names if item.custom_id is None else item.custom_id in self._custom_ids

    @property
    def custom_ids(self) -> set[str]:
        return self._custom_ids

    def append(self, line: dict[str, Any]) -> None:
        self._file.append(dumps(line) + b"\n")


@contextmanager
def open_output(path: Path) -> Iterator[Output]:
    """Opens the file of answers, or makes it; drops a last line that has no end.

    Raises:
      ValueError: it holds something else, or another run is writing it.
      OSError: it cannot be written.
    """
    with open_line_file(path) as file:
        done, num_failed = _read_done(file)
        file.drop_torn_line()
        yield Output(file, done, num_failed)


def _read_done(file: LineFile) -> tuple[set[tuple[str | None, str]], int]:
    """What has been answered, and how much of it failed."""
    done, num_failed = set(), 0
    for number, (_, line) in enumerate(file.lines(), start=1):
        try:
            answer = json.loads(line)
            done.add((answer["custom_id"], str(answer["id"])))
            response, error = answer["response"], answer["error"]
            num_failed += error is not None or response is None or response["status_code"] != 200
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{file.path}: line {number} is no answer of a batch: give another file, or remove this one"
            ) from error
    return done, num_failed


def parse_item(item: Item) -> tuple[str, bytes]:
    """The path and the body of a request.

    Raises:
      LineError: it is none.
    """
    try:
        line = json.loads(item.text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"it is not valid JSON: {error}") from error
    if not isinstance(line, dict):
        raise LineError(f"a JSON object is needed, got {type(line).__name__}")
    if unknown := line.keys() - set(_KEYS):
        raise LineError(f"{min(unknown)!r:.80} is no part of a request; there are {', '.join(_KEYS)}")
    if missing := [key for key in _KEYS if key not in line]:
        raise LineError(f"{missing[0]} is missing")
    if item.custom_id is None:
        raise LineError(f"custom_id must be a string, got {line['custom_id']!r:.80}")
    if line["method"] != "POST":
        raise LineError(f"method must be POST, got {line['method']!r:.80}")
    if line["url"] not in URLS:
        raise LineError(f"url must be {' or '.join(URLS)}, got {line['url']!r:.80}")
    body = line["body"]
    if not isinstance(body, dict):
        raise LineError(f"body must be an object, got {type(body).__name__}")
    if body.get("stream"):
        raise LineError("stream is not for batches: leave it out")
    return line["url"].removeprefix("/v1"), json.dumps(body).encode()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Runs what is left of a batch through the routes of the server."""

    service: Service
    app: ASGIApp
    output: Output
    max_in_flight: int
    counts: Counts = field(default_factory=Counts)

    async def run(self, items: Iterator[Item], total: int) -> None:
        """Answers items, `max_in_flight` at once, in whatever order they end.

        Raises:
          EngineFailed: what it has not answered is left for a later run.
          OSError: the output cannot be written.
        """
        left = (item for item in items if not self.output.has(item))

        async def work() -> None:
            for item in left:  # shared by all who work
                await self._answer(item)
                show(self.counts.num_answered, total)

        try:
            with progress_bar("Answered requests", unit=" requests", is_shown=sys.stderr.isatty()) as show:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.max_in_flight):
                        group.create_task(work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _answer(self, item: Item) -> None:
        response, error, is_good = None, None, False
        try:
            path, content = parse_item(item)
        except LineError as refused:
            error = {"code": "invalid_line", "message": f"line {item.number}: {refused}"}
        else:
            response = await self._request(path, content)
            is_good = response["status_code"] == 200
        self.output.append(
            {"id": item.name, "custom_id": item.custom_id, "response": response, "error": error}
        )
        counts = self.counts
        counts.num_answered += 1
        counts.num_failed += not is_good
        if is_good and response is not None:
            counts.num_output_tokens += response["body"]["usage"]["completion_tokens"]

    async def _request(self, path: str, content: bytes) -> dict[str, Any]:
        request_id = uuid.uuid4().hex
        source = InProcess(self.app, {REQUEST_ID_HEADER: request_id})
        async with source.request("POST", path, content) as reply:
            body = await reply.read()
        if self.service.llm.errored:
            raise EngineFailed("the engine has failed, and answers no more")
        return {"status_code": reply.status, "request_id": request_id, "body": json.loads(body)}


def run_batch(
    engine_config: EngineConfig,
    config: ServerConfig,
    source: Path,
    path: Path,
    *,
    max_in_flight: int | None = None,
) -> int:
    """Answers what of `source` has no answer in the file at `path`; returns the exit status.

    `max_in_flight` requests are with the engine at once; None: twice as many as it runs at once.

    Raises:
      ValueError, OSError: the model, a setting or a file is not possible. Nothing has been run then.
    """
    custom_ids, num_items = check_items(source)
    with open_output(path) as output:
        if strange := output.custom_ids - custom_ids:
            raise ValueError(
                f"{path} answers {min(strange)!r:.200}, which is not in {source}: give another output"
            )
        num_left = sum(not output.has(item) for item in read_items(source))
        if num_left == 0:
            print(
                f"all {num_items} requests have been answered already, in {path}, "
                f"{output.num_failed} of them with an error",
                file=sys.stderr,
            )
            return int(output.num_failed > 0)
        with local_service(engine_config, config) as (service, app):
            most = max_in_flight or 2 * service.num_rows
            batch = Batch(service=service, app=app, output=output, max_in_flight=most)
            return _run(batch, source, num_left, num_before=num_items - num_left)


def _run(batch: Batch, source: Path, num_left: int, *, num_before: int) -> int:
    begun, status = time.perf_counter(), 0
    try:
        asyncio.run(batch.run(read_items(source), num_left))
    except KeyboardInterrupt:
        status = 130
    except EngineFailed as error:
        print(f"pjengine: {error}", file=sys.stderr)
        status = 1
    counts, elapsed = batch.counts, time.perf_counter() - begun
    before = f" ({num_before} more before)" if num_before else ""
    print(
        f"{counts.num_answered} requests answered{before}, {counts.num_failed} of them with an error, "
        f"in {elapsed:.2f} s: {counts.num_output_tokens} output tokens, "
        f"{counts.num_output_tokens / elapsed:.1f} tokens/s",
        file=sys.stderr,
    )
    if status:
        print("the same command goes on with the rest", file=sys.stderr)
    return status or int(counts.num_failed + batch.output.num_failed > 0)
