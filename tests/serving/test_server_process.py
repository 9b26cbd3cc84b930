"""A server in a process of its own, as its users meet it: OpenAI's client, curl's bytes, signals, faults."""

import asyncio
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serving.client import parse_events
from tests.serving.process import RANDOM, SMALL, Server, Socket, start_server, wait_until

KEY = "sk-of-the-tests"
MESSAGES: list[Any] = [{"role": "user", "content": "Write a class"}]
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 12}
LONG = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The packaged model behind a key."""
    arguments = ("--model=demo", "--port=0", f"--api-key={KEY}", "--enable-log-requests", *SMALL)
    with start_server(tmp_path_factory.mktemp("server"), *arguments) as server:
        server.url  # noqa: B018 - waits
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def num_running(server: Server) -> float:
    request = server.request("GET", "/metrics", headers=WITH_KEY)
    request.read_all()
    found = re.search(rb"num_requests_running{.*} (\S+)", request.body)
    assert found
    return float(found[1])


def load(server: Server) -> int:
    request = server.request("GET", "/load")
    request.read_all()
    return json.loads(request.body)["server_load"]


class Colour(BaseModel):
    name: Literal["red", "green", "light blue"]
    share: int = Field(ge=0, le=100)
    mixed_of: list[Literal["red", "white"]] = Field(max_length=2)


def test_openai_parses_an_answer_that_has_the_form_of_a_class(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "temperature": 1.0, "seed": 3}
    whole = client.chat.completions.parse(**fields, response_format=Colour, n=2)
    for choice in whole.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Colour)
    with client.chat.completions.stream(**fields, response_format=Colour) as stream:
        last = stream.get_final_completion().choices[0].message
    assert last.parsed == whole.choices[0].message.parsed
    plain = client.chat.completions.create(**fields, max_tokens=30, response_format={"type": "json_object"})
    assert (plain.choices[0].message.content or "").startswith("{")
    with pytest.raises(openai.BadRequestError, match="Invalid type") as refused:
        schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
        client.chat.completions.create(**fields, response_format=schema)
    assert refused.value.param == "response_format"


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="import os\n", logprobs=2, **GREEDY)
    [choice] = whole.choices
    assert (
        choice.finish_reason == "length"
        and choice.logprobs is not None
        and choice.logprobs.tokens is not None
    )
    assert "".join(choice.logprobs.tokens) == choice.text and len(choice.logprobs.tokens) == 12
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    chunks = list(client.completions.create(prompt="import os\n", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text and len(chunks) > 5
    both = client.completions.create(
        model="demo", prompt=["a", "b"], n=2, temperature=1, max_tokens=4, seed=1
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    stop = choice.text[6:10]
    stopped = client.completions.create(prompt="import os\n", stop=[stop], **GREEDY).choices[0]
    assert (stopped.text, stopped.finish_reason) == (choice.text[: choice.text.index(stop)], "stop")


def test_openai_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    first, *chunks, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert (
        chunks[-1].choices[0].finish_reason == "length" and last.choices == [] and last.usage == whole.usage
    )
    again = [*MESSAGES, choice.message, {"role": "user", "content": "and another"}]
    assert client.chat.completions.create(messages=again, **GREEDY).choices[0].message.content


def test_openai_embeddings(client: openai.OpenAI) -> None:
    both = client.embeddings.create(model="demo", input=["import os", "import sys"])
    again = client.embeddings.create(model="demo", input="import sys", encoding_format="float")
    for found, wanted in zip(both.data[1].embedding, again.data[0].embedding, strict=True):
        assert found == pytest.approx(wanted, abs=1e-2)  # the client asked for base64
    assert both.usage.prompt_tokens == both.usage.total_tokens > 0


def test_openai_async(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            create: Any = partial(
                client.chat.completions.create, model="demo", messages=MESSAGES, max_tokens=16, temperature=1
            )

            async def stream(seed: int) -> str:
                chunks = await create(seed=seed, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            async def whole(seed: int) -> str | None:
                return (await create(seed=seed)).choices[0].message.content

            streamed = await asyncio.gather(*map(stream, range(12)))
            assert streamed == await asyncio.gather(*map(whole, range(12))) and len(set(streamed)) > 6
            assert [model.id async for model in client.models.list()] == ["demo"]
            assert (await client.models.retrieve("demo")).id == "demo"

    asyncio.run(main())


def test_openai_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be in") as caught:
        client.completions.create(model="demo", prompt="a", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="tools is empty"):
        client.chat.completions.create(messages=MESSAGES, tools=[], **GREEDY)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


def test_the_bytes_of_a_stream(server: Server) -> None:
    body = {"prompt": "import os\n", "max_tokens": 3, "temperature": 0, "stream": True}
    request = server.request("POST", "/v1/completions", body, {**WITH_KEY, "X-Request-Id": "bytes"})
    head, _, _ = request.read_all().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent-type: text/event-stream; charset=utf-8" in head
    assert b"\r\ncache-control: no-cache" in head and b"\r\ntransfer-encoding: chunked" in head.lower()
    created = re.search(rb'"created":(\d+)', request.body)
    assert created and abs(int(created[1]) - time.time()) < 60
    texts = [event["choices"][0]["text"] for event in parse_events(request.body)]
    import pjengine

    wanted = b"".join(
        b'data: {"id":"cmpl-bytes","object":"text_completion","created":%b,"model":"demo",'
        b'"system_fingerprint":"pjengine-%b","choices":[{"index":0,"text":%b,"logprobs":null,'
        b'"finish_reason":%b,"stop_reason":null}]}\n\n'
        % (
            created[1],
            pjengine.__version__.encode(),
            json.dumps(text).encode(),
            b'"length"' if text is texts[-1] else b"null",
        )
        for text in texts
    )
    assert request.body == wanted + b"data: [DONE]\n\n"


def test_curl_as_the_first_servers_were_called(server: Server) -> None:
    """Without a content type of JSON, as curl sends it."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")

    def call(**body: Any) -> Any:
        done = subprocess.run(
            [
                curl,
                "-s",
                f"{server.url}/generate",
                "-H",
                f"Authorization: Bearer {KEY}",
                "-d",
                json.dumps(body),
            ],
            capture_output=True,
            check=True,
        )
        return json.loads(done.stdout)

    answer = call(prompt="import os\n", n=2, temperature=1, seed=1, max_tokens=4)
    assert len(answer["text"]) == 2 and all(text.startswith("import os\n") for text in answer["text"])
    beams = call(prompt="San Francisco is a", use_beam_search=True, n=4, temperature=0)
    assert len(set(beams["text"])) == 4 and all(
        text.startswith("San Francisco is a") for text in beams["text"]
    )


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_socket_that_closes_frees_its_pages_within_a_second(server: Server, is_streamed: bool) -> None:
    request = server.request("POST", "/v1/completions", {**LONG, "stream": is_streamed}, WITH_KEY)
    if is_streamed:
        request.read_until(b"data: ")
    wait_until(lambda: num_running(server) == 1, "the request to run")
    request.connection.close()
    closed = time.monotonic()
    wait_until(lambda: num_running(server) == 0, "its end", 10)
    assert time.monotonic() - closed < 1


def test_no_key_is_ever_logged(server: Server) -> None:
    server.request("GET", "/v1/models", headers=WITH_KEY).read_all()
    server.request("GET", "/v1/models", headers={"Authorization": "Bearer sk-wrong"}).read_all()
    wait_until(lambda: "401" in server.log, "the log")
    assert KEY not in server.log and "sk-" not in server.log and "GET /v1/models" in server.log


def test_sigterm_lets_streams_end(tmp_path: Path) -> None:
    with start_server(tmp_path, "demo", "--port=0", *RANDOM, module="pjengine.serving.api_server") as server:
        address = server.address
        request = server.request("POST", "/v1/completions", {**LONG, "max_tokens": 300})
        request.read_until(b"data: ")
        server.terminate()
        wait_until(lambda: "1 requests may take 25 s to end" in server.log, "the signal to come")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        request.read_all()
        events = parse_events(request.body)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "Traceback" not in server.log and "ERROR" not in server.log


def test_what_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    with start_server(tmp_path, "--model=demo", "--port=0", "--shutdown-timeout=0", *RANDOM) as server:
        streamed = server.request("POST", "/v1/completions", LONG)
        whole = server.request("POST", "/v1/completions", {**LONG, "stream": False})
        streamed.read_until(b"data: ")
        wait_until(lambda: load(server) == 2, "both to run")
        server.terminate()
        *events, last = parse_events((streamed.read_all(), streamed.body)[1])
        assert events and last["error"]["code"] == 503 and "shutting down" in last["error"]["message"]
        assert whole.read_all().startswith(b"HTTP/1.1 503 ")
        assert server.wait() == 0
        assert "Traceback" not in server.log


FAULT = """
import sys
from pathlib import Path
from pjengine.runner import Runner
from pjengine.serving.cli import main

launch = Runner.launch

def fail(self, *rest):
    raise RuntimeError("the device has fallen off the bus")

def launch_or_fail(self, *step):
    return fail(self) if Path(sys.argv[1]).exists() else launch(self, *step)

Runner.launch, Runner.reset = launch_or_fail, fail
sys.exit(main(["serve", *sys.argv[2:]]))
"""


def test_an_engine_that_fails_ends_the_process_with_a_status(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with start_server(tmp_path, str(mark), "demo", "--port=0", *RANDOM, code=FAULT) as server:
        request = server.request("POST", "/v1/completions", LONG)
        request.read_until(b"data: ")
        mark.touch()
        *events, last = parse_events((request.read_all(), request.body)[1])
        assert events and last["error"]["code"] == 503 and "off the bus" in last["error"]["message"]
        assert server.wait() == 1
        assert "the engine has failed: the server ends" in server.log


ENDLESS = """
import sys, threading
from pjengine.draw import DrawLayout
from pjengine.serving.cli import main
from pjengine.step_compiler import StepCompiler

compile = StepCompiler.compile

def compile_or_hang(self, layout, lowered):
    if isinstance(layout, DrawLayout):
        print("compiles and compiles", flush=True)
        threading.Event().wait()
    return compile(self, layout, lowered)

StepCompiler.load = lambda self, layout: None
StepCompiler.compile = compile_or_hang
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_program_that_is_being_compiled_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    arguments = ("demo", f"--uds={path}", "--shutdown-timeout=0", *RANDOM)
    with start_server(tmp_path, *arguments, code=ENDLESS) as server:
        server.url  # noqa: B018 - waits
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            request = Socket(connection, "POST", "/v1/completions", {**LONG, "logit_bias": {"5": 1}}, {})
            wait_until(lambda: "compiles and compiles" in server.log, "the compilation")
            server.terminate()
            assert request.read_all().startswith(b"HTTP/1.1 503 ")
            assert server.wait(10) == 0
        assert "a compilation has not ended: it is given up" in server.log and not path.exists()


def test_a_unix_socket_is_this_users_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with start_server(tmp_path, "demo", f"--uds={path}", *RANDOM) as server:
        assert server.url == str(path) and path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        server.terminate()
        assert server.wait() == 0 and not path.exists()


def test_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost".split(),
        check=True,
        capture_output=True,
    )
    arguments = ("demo", "--port=0", f"--ssl-keyfile={key}", f"--ssl-certfile={certificate}", *RANDOM)
    with start_server(tmp_path, *arguments) as server:
        assert server.url.startswith("https://127.0.0.1:")
        port = int(server.url.rpartition(":")[2])
        context = ssl.create_default_context(cafile=certificate)
        with socket.create_connection(("127.0.0.1", port)) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_an_address_that_is_taken_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start_server(tmp_path, "./no-such-model", f"--port={port}") as server:
            assert server.wait() == 2
            assert server.log == f"pjengine: cannot serve on 127.0.0.1:{port}: Address already in use\n"
    path = tmp_path / "socket"
    path.touch()
    with start_server(tmp_path, "./no-such-model", f"--uds={path}") as server:
        assert server.wait() == 2
        assert server.log == f"pjengine: cannot serve on {path}: Address already in use\n"
    assert path.exists()  # whoever has it keeps it
    path.unlink()
    with start_server(tmp_path, "./no-such-model", f"--uds={path}") as server:
        assert server.wait() == 2 and "no such folder" in server.log
    assert not path.exists()


def test_an_open_address_without_a_key_is_warned_of(tmp_path: Path) -> None:
    with start_server(tmp_path, "./no-such-model", "--host=0.0.0.0", "--port=0") as server:
        assert server.wait() == 2
        assert "WARNING" in server.log and "without a key" in server.log
    with start_server(tmp_path, "./no-such-model", "--host=0.0.0.0", "--port=0", "--api-key=x") as server:
        assert server.wait() == 2
        assert "WARNING" not in server.log
