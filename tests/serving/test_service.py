"""Requests that end before their time: too many, too slow, failed, or left by their client."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from tests.serving.client import Client, error_of, make_client, parse_events

PATH = "/v1/completions"


def long(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "temperature": 0, **fields}


class Connection:
    """One request, whose client may leave whenever it likes."""

    def __init__(self, client: Client, path: str = PATH, *, reads: int | None = None, **body: Any) -> None:
        self.messages: list[Any] = []
        self._reads = reads  # messages, then no more; None: all
        self.has_left = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self._arrived = asyncio.Condition()
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
        }
        self.task = asyncio.create_task(client.app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)
        async with self._arrived:
            self._arrived.notify_all()
        if len(self.messages) == self._reads:
            await asyncio.Event().wait()

    async def wait_for(self, num_messages: int) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.messages) >= num_messages)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def content(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


def run(main: Any) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def until(is_true: Callable[[], bool]) -> None:
    """Yields to the event loop until it is so; `run` has the deadline."""
    while not is_true():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_pages(client: Client, is_streamed: bool) -> None:
    engine = client.service.llm.engine

    async def main() -> None:
        other = Connection(client, **long(max_tokens=40))
        connection = Connection(client, **long(prompt=["a", "b"], n=1, stream=is_streamed))
        await (connection.wait_for(3) if is_streamed else until(lambda: engine.scheduler.rows.num_free == 1))
        assert client.service.num_requests == 2
        connection.has_left.set()
        await connection.task
        assert len(connection.messages) >= 3 if is_streamed else not connection.messages
        await until(lambda: engine.scheduler.rows.num_free == 3)  # the other runs on
        await other.task
        assert other.status == 200 and json.loads(other.content)["usage"]["completion_tokens"] == 40

    run(main())


def test_a_client_that_leaves_while_its_prompt_is_read_is_not_run(client: Client) -> None:
    import threading

    async def main() -> None:
        is_released = threading.Event()
        client.service._tokenizing.submit(is_released.wait)
        connection = Connection(client, **long(add_special_tokens=False))
        await until(lambda: client.service.num_requests == 1)
        connection.has_left.set()
        await connection.task
        is_released.set()
        assert not connection.messages and client.service.num_requests == 0

    run(main())


def test_a_request_takes_as_many_continuations_as_the_operator_says(llm: Any) -> None:
    client = make_client(llm, max_sequences_per_request=6)
    fields = long(prompt=["a", "b"], max_tokens=1, temperature=1)
    assert client.post(PATH, **fields, n=3).status_code == 200
    status, error = client.error(PATH, **fields, n=4)
    assert (status, error["param"]) == (400, "n") and "prompts x n is 8" in error["message"]
    status, error = client.error(PATH, **fields, best_of=4)
    assert (status, error["param"]) == (400, "best_of") and "prompts x best_of is 8" in error["message"]
    client.assert_idle()


def test_what_waits_too_long_in_line_is_turned_away(llm: Any) -> None:
    client = make_client(llm, max_waiting=2)  # and four run

    async def main() -> None:
        first = Connection(client, **long(prompt=["a"] * 5))
        await first.wait_for(0)
        await until(lambda: client.service.num_requests == 1)
        refused = Connection(client, **long(prompt=["a", "b"]))
        await refused.task
        assert refused.status == 503 and (b"retry-after", b"1") in refused.messages[0]["headers"]
        assert json.loads(refused.content)["error"]["type"] == "ServiceUnavailableError"
        taken = Connection(client, **long())
        await until(lambda: client.service.num_requests == 2)
        for connection in (first, taken):
            connection.has_left.set()
            await connection.task

    run(main())
    client.assert_idle()
    assert client.post(PATH, **long(prompt=["a"] * 6, max_tokens=1)).status_code == 200
    assert client.post(PATH, **long(prompt=["a"] * 7, max_tokens=1)).status_code == 503


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_client_that_does_not_read_keeps_nobody_out(llm: Any, num_prompts: int) -> None:
    client = make_client(llm, max_waiting=0)  # and four run
    body = long(prompt=["a"] * num_prompts, n=4 // num_prompts, max_tokens=20, temperature=1, stream=True)

    async def main() -> None:
        connection = Connection(client, reads=2, **body)
        await connection.wait_for(2)
        await until(lambda: llm.num_unread >= 4 // num_prompts)
        other = Connection(client, **long(max_tokens=2))
        await other.task
        assert other.status == 200 and not connection.task.done()
        connection.has_left.set()
        await connection.task

    run(main())
    client.assert_idle()


def test_a_stream_whose_client_stops_reading_is_ended(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pjengine.serving.stream._SEND_S", 0.01)
    monkeypatch.setattr("pjengine.serving.stream._LAST_WORDS_S", 0.01)
    scheduler = client.service.llm.engine.scheduler

    async def main() -> None:
        connection = Connection(client, reads=2, **long(stream=True))
        await connection.task
        assert not connection.has_left.is_set() and b"[DONE]" not in connection.messages[1]["body"]
        await until(lambda: scheduler.rows.num_free == 4)

    run(main())


def test_a_request_that_takes_too_long_is_ended(llm: Any) -> None:
    client = make_client(llm, request_timeout_s=0.3)
    status, error = client.error(PATH, **long(n=1, prompt=["a"] * 4))
    assert (status, error["type"]) == (504, "TimeoutError")
    *events, last = client.events(PATH, **long(prompt=["a"] * 4))
    assert events and all("choices" in event for event in events)
    assert last["error"]["code"] == 504
    client.assert_idle()


def fail_once(monkeypatch: pytest.MonkeyPatch, runner: Any, *, after: int) -> None:
    """The step after so many others fails."""
    launch, left = runner.launch, [after]

    def launch_or_fail(*step: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            monkeypatch.setattr(runner, "launch", launch)
            raise MemoryError("the device is full")
        return launch(*step)

    monkeypatch.setattr(runner, "launch", launch_or_fail)


def test_a_step_that_fails_ends_its_requests_and_no_others(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = client.service.llm.engine.runner
    fail_once(monkeypatch, runner, after=0)
    status, error = client.error(PATH, **long())
    assert status == 500 and "the device is full" in error["message"]
    fail_once(monkeypatch, runner, after=5)
    *events, last = client.events(PATH, **long())
    assert events and last["error"]["code"] == 500 and last["error"]["type"] == "InternalServerError"
    assert client.get("/health").status_code == 200
    assert client.post(PATH, **long(max_tokens=2)).status_code == 200


@pytest.mark.parametrize("kind", [ValueError, OSError])
@pytest.mark.parametrize("fields", [{}, {"stop": ["never"]}], ids=["read by its task", "read by the engine"])
def test_a_tokenizer_that_fails_on_an_answer_ends_that_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], kind: type[Exception]
) -> None:
    from pjengine.tokenizer import IncrementalDetokenizer

    push, bad = IncrementalDetokenizer.push, 5
    begun: list[Connection] = []

    def push_or_fail(self: Any, token_ids: Any) -> str:
        if bad in token_ids and len(begun[0].messages) >= 2:  # the first parts have been sent
            raise kind("the secret")
        return push(self, token_ids)

    monkeypatch.setattr(IncrementalDetokenizer, "push", push_or_fail)

    async def main() -> None:
        other = Connection(client, **long(max_tokens=60, allowed_token_ids=[6], **fields))
        parts = Connection(client, **long(allowed_token_ids=[bad], stream=True, **fields))
        begun.append(parts)
        await parts.task
        early = Connection(client, **long(allowed_token_ids=[bad], stream=True, **fields))
        again = Connection(client, **long(allowed_token_ids=[bad], max_tokens=40, **fields))
        await asyncio.gather(early.task, again.task, other.task)
        *events, last = parse_events(parts.content)
        assert parts.status == 200 and events and last["error"]["code"] == 500
        assert early.status == again.status == 500 and b"secret" not in early.content + parts.content
        assert json.loads(other.content)["usage"]["completion_tokens"] == 60

    run(main())


@pytest.mark.parametrize("fields", [{}, {"add_special_tokens": False}], ids=["the engine's", "the server's"])
def test_a_tokenizer_that_fails_on_a_prompt_ends_that_request_alone(
    client: Client, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    from pjengine.tokenizer import Tokenizer

    encode = Tokenizer.encode

    def encode_or_fail(self: Any, text: str, **options: Any) -> Any:
        if "bad" in text:
            raise OSError("the secret")
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode_or_fail)

    async def main() -> None:
        other = Connection(client, **long(max_tokens=40))
        failed = [
            Connection(client, **long(prompt="bad", stream=is_streamed, **fields))
            for is_streamed in (False, True)
        ]
        both = Connection(client, **long(prompt=["a", "bad"], **fields))
        await asyncio.gather(*(connection.task for connection in (*failed, both, other)))
        for connection in (*failed, both):
            assert connection.status == 500 and b"secret" not in connection.content
        assert json.loads(other.content)["usage"]["completion_tokens"] == 40

    run(main())


def test_logits_that_are_no_number_end_the_request_with_an_error(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine.generation import Completion

    push = Completion.push
    monkeypatch.setattr(
        Completion,
        "push",
        lambda self, token, *rest: push(self, token if self.request.num_known < 3 else -1, *rest),
    )
    body = long(prompt="a", stop_token_ids=[5])  # so that each token is looked at
    status, error = client.error(PATH, **body)
    assert status == 500 and "not a number" in error["message"]
    assert client.events(PATH, **body)[-1]["error"]["code"] == 500


def test_a_request_that_nothing_fulfils_is_the_callers_mistake(client: Client) -> None:
    body = long(allowed_token_ids=[5], structured_outputs={"choice": ["self", "import"]})
    status, error = client.error(PATH, **body)
    assert status == 400 and "no token is left: allowed_token_ids" in error["message"]
    status, error = client.error(PATH, **body, stream=True)
    assert status == 400 and error["type"] == "BadRequestError"


def test_what_nobody_foresaw_is_logged_and_kept_from_the_client(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pjengine.serving import completions

    def fail(*_: Any) -> None:
        raise KeyError("the secret")

    monkeypatch.setattr(completions._CompletionForm, "choices", fail)
    for is_streamed in (False, True):
        status, error = client.error(PATH, **long(max_tokens=1, stream=is_streamed))
        assert status == 500 and "secret" not in error["message"]
    assert caplog.text.count("KeyError: 'the secret'") == 2


def test_an_engine_that_is_dead_takes_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import AsyncLLM
    from tests.serving.conftest import TINY

    def fail(*_: Any) -> None:
        raise RuntimeError("the device has fallen off the bus")

    llm = AsyncLLM("demo", **TINY)
    client = make_client(llm)
    runner = llm.engine.runner
    fail_once(monkeypatch, runner, after=4)
    monkeypatch.setattr(runner, "reset", fail)
    assert client.get("/health").status_code == 200
    *events, last = client.events(PATH, **long())
    assert events and last["error"]["code"] == 503 and "off the bus" in last["error"]["message"]
    for path in ("/health", "/ping"):
        assert error_of(client.get(path))[0] == 503
    assert client.error(PATH, **long())[0] == 503
    assert client.get("/metrics").status_code == 200
    assert client.get("/dashboard/stats").json()["state"] == "failed"
    client.service.close()


@pytest.mark.parametrize("count", [1, 3])
def test_streams_are_merged_and_the_first_error_ends_them_all(count: int) -> None:
    from pjengine.serving.service import merge

    ended = []

    async def stream(index: int, length: int, error: Exception | None = None) -> AsyncGenerator[str, None]:
        try:
            for i in range(length):
                await asyncio.sleep(0)
                yield f"{index}.{i}"
            if error is not None:
                raise error
        finally:
            ended.append(index)

    async def main() -> None:
        items = [item async for item in merge([stream(i, 3) for i in range(count)])]
        for index in range(count):
            assert [item for i, item in items if i == index] == [f"{index}.{i}" for i in range(3)]
        assert sorted(ended) == list(range(count))
        ended.clear()
        with pytest.raises(KeyError):
            async for _ in merge([stream(i, 10**6) for i in range(count - 1)] + [stream(9, 3, KeyError())]):
                pass
        assert sorted(ended) == [*range(count - 1), 9]
        ended.clear()
        merged = merge([stream(i, 10**6) for i in range(count)])
        await anext(merged)
        await merged.aclose()
        assert set(ended) <= set(range(count)) and ended
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_requests_are_logged_without_what_they_say(llm: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = make_client(llm, enable_log_requests=True)
    with caplog.at_level("INFO", logger="pjengine.serving.service"):
        client.events(
            PATH, **long(prompt=["private one", "private two"], max_tokens=3, user="me", request_id="mine")
        )
        client.error(PATH, **long(prompt=[5000]))
    begun, ended, _, refused = [record.message for record in caplog.records]
    assert begun.startswith("request cmpl-mine user='me' prompts=2 params={") and "'max_tokens': 3" in begun
    assert ended.startswith("request cmpl-mine finished after") and ended.endswith("output_tokens=6")
    assert "refused with 400" in refused
    assert "private" not in caplog.text


def test_parts_of_a_stream_are_sent_as_they_come(client: Client) -> None:
    async def main() -> None:
        connection = Connection(client, **long(stream=True))
        await connection.wait_for(8)
        assert connection.status == 200 and client.service.num_requests == 1
        assert connection.content.startswith(b"data: {") and b"[DONE]" not in connection.content
        connection.has_left.set()
        await connection.task

    run(main())
