"""Who is let in, and how much of a body."""

import base64
from typing import Any

import httpx
import pytest

from tests.serving.client import Client, error_of, make_client

KEYS = ("first key", "second")


@pytest.fixture
def guarded(llm: Any) -> Client:
    return make_client(llm, api_keys=KEYS)


def with_key(key: str, kind: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{kind} {key}"}


def test_every_route_but_health_needs_a_key(guarded: Client) -> None:
    paths = [*guarded.app.openapi()["paths"], "/docs", "/openapi.json", "/nothing", "/health/", "//health"]
    assert "/v1/completions" in paths and "/metrics" in paths and "/generate" in paths
    for path in paths:
        for method in ("GET", "POST", "OPTIONS"):
            response = guarded.send(method, path)
            if path in ("/health", "/ping"):
                assert response.status_code in (200, 405)
                continue
            status, error = error_of(response)
            assert (status, error["type"]) == (401, "AuthenticationError")
            is_page = path.startswith("/dashboard") or path in ("/docs", "/openapi.json")
            scheme = "Basic" if is_page else "Bearer"
            assert response.headers["www-authenticate"].split()[0] == scheme


def password(key: str, user: str = "any") -> dict[str, str]:
    """As browsers send it."""
    return with_key(base64.b64encode(f"{user}:{key}".encode()).decode(), "Basic")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_a_password_under_any_name(guarded: Client, key: str) -> None:
    for user in ("any", "", "pjengine", "é"):
        for path in ("/dashboard", "/dashboard/stats", "/v1/models"):
            assert guarded.get(path, headers=password(key, user)).status_code == 200


def test_a_key_may_hold_what_basic_separates_and_any_letter(llm: Any) -> None:
    client = make_client(llm, api_keys=("a:b", "schlüssel"))
    for key in ("a:b", "schlüssel"):
        assert client.get("/version", headers=password(key)).status_code == 200
    assert client.get("/version", headers=password("b")).status_code == 401


def test_a_browser_is_asked_for_the_password_of_pages_alone(guarded: Client) -> None:
    for path in ("/dashboard", "/dashboard/", "/dashboard/stats", "/llm/dashboard", "/docs", "/openapi.json"):
        client = Client(guarded.app, guarded.service, root_path="/llm")
        assert client.get(path).headers["www-authenticate"] == 'Basic realm="pjengine", charset="UTF-8"'
    for path in ("/", "/dashboards", "/v1/dashboard"):
        assert guarded.get(path).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),  # let in, and the body is none
        ({"origin": "http://server"}, 400),
        ({"sec-fetch-site": "same-origin", "origin": "https://shown.example"}, 400),  # behind a proxy
        ({"origin": "http://other"}, 401),
        ({"origin": "null"}, 401),
        ({"sec-fetch-site": "cross-site"}, 401),
        ({"sec-fetch-site": "same-site", "origin": "http://server"}, 401),
    ],
)
def test_pages_of_other_origins_cannot_use_a_browsers_password(
    guarded: Client, headers: dict[str, str], status: int
) -> None:
    for path in ("/v1/completions", "/generate"):
        sent = {**headers, **password(KEYS[1])}
        assert guarded.send("POST", path, content=b"?", headers=sent).status_code == status
        assert (
            guarded.send("POST", path, content=b"?", headers={**sent, **with_key(KEYS[1])}).status_code == 400
        )
    assert guarded.get("/dashboard", headers={**headers, **password(KEYS[1])}).status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded: Client, key: str) -> None:
    assert guarded.get("/v1/models", headers=with_key(key)).status_code == 200
    assert guarded.get("/v1/models", headers=with_key(key, "bearer")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        with_key("first"),
        with_key("first key "[:-2]),
        with_key("first key and more"),
        with_key(""),
        with_key("second", "Basic"),
        with_key("c2Vjb25k", "Basic"),  # without a user name
        with_key("OnNlY29uZA", "Basic"),  # not padded
        with_key("OnNlY29uZA==", "Bearer"),
        {"authorization": "Basic"},
        password("secon"),
        password(""),
        password("any:second"),
        {"authorization": "second"},
        {"authorization": ""},
        {"x-api-key": "second"},
        with_key("FIRST KEY"),
    ],
)
def test_nothing_else_does(guarded: Client, headers: dict[str, str]) -> None:
    assert guarded.get("/v1/models", headers=headers).status_code == 401
    assert guarded.get("/v1/models", params={"api_key": "second"}).status_code == 401


def test_a_body_without_a_key_is_not_read(guarded: Client) -> None:
    async def body() -> Any:
        raise AssertionError("it was read")
        yield b""

    assert guarded.send("POST", "/v1/completions", content=body()).status_code == 401


def test_open_paths_are_open_under_the_proxys_path_too(guarded: Client) -> None:
    client = Client(guarded.app, guarded.service, root_path="/llm")
    for path in ("/health", "/llm/health"):
        assert client.get(path).status_code == 200
    for path in ("/v1/models", "/llm/v1/models", "/llm/llm/health"):
        assert client.get(path).status_code == 401
    assert client.get("/llm/v1/models", headers=with_key(KEYS[0])).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_before_it_is_parsed(llm: Any, is_chunked: bool) -> None:
    client = make_client(llm, max_request_bytes=1000)

    async def chunks(size: int) -> Any:
        for _ in range(size // 100):
            yield b" " * 100

    def send(size: int) -> httpx.Response:
        content = chunks(size) if is_chunked else b" " * size
        return client.send(
            "POST", "/v1/completions", content=content, headers={"content-type": "application/json"}
        )

    status, error = error_of(send(1100))
    assert (status, error["type"]) == (413, "RequestTooLargeError") and "1000 bytes" in error["message"]
    assert error_of(send(1000))[0] == 400  # no JSON, but read


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    import asyncio
    import json

    from pjengine.serving.gates import SizeGate

    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop() if pieces else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("it was passed on")

    gate = SizeGate(app, max_bytes=1000, timeout_s=0.01)
    asyncio.run(asyncio.wait_for(gate({"type": "http", "headers": []}, receive, send), 10))
    start, body = sent
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert "within 0.01 s" in json.loads(body["body"])["error"]["message"]


def test_a_body_in_pieces_is_put_together(client: Client) -> None:
    async def pieces() -> Any:
        for piece in (b'{"prompt": "a", ', b'"max_tokens"', b": 1}"):
            yield piece

    headers = {"content-type": "application/json"}
    assert client.send("POST", "/v1/completions", content=pieces(), headers=headers).status_code == 200


def test_pages_of_other_origins_are_let_in_by_name_only(llm: Any) -> None:
    origin = {"origin": "https://chat.example"}
    asking = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    closed = make_client(llm)
    assert "access-control-allow-origin" not in closed.get("/version", headers=origin).headers
    assert closed.send("OPTIONS", "/v1/completions", headers=asking).status_code == 405
    open_one = make_client(llm, allowed_origins=("https://chat.example",), api_keys=KEYS)
    response = open_one.send("OPTIONS", "/v1/completions", headers=asking)  # browsers ask without the key
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    response = open_one.get("/version", headers=origin)
    assert response.status_code == 401  # which the page may read
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    response = open_one.get("/version", headers={"origin": "https://other.example", **with_key(KEYS[0])})
    assert "access-control-allow-origin" not in response.headers
