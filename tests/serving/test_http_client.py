"""The HTTP client: whatever pieces an answer comes in, it is the same answer."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Name: a:b\r\n\r\n"
    b"5;x=y\r\nab\r\nc\r\nA\r\n0123456789\r\n0\r\n\r\n"
)
ANSWERS = {
    "chunked": (CHUNKED, b"ab\r\nc0123456789"),
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab\r\nc", b"ab\r\nc"),
    "empty": (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b""),
    "until the end": (b"HTTP/1.0 404 Not Found\r\n\r\nnothing", b"nothing"),
    "not yet": (b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED, b"ab\r\nc0123456789"),
}


@pytest.mark.parametrize(("answer", "body"), ANSWERS.values(), ids=ANSWERS)
@given(data=st.data())
def test_pieces_make_no_difference(answer: bytes, body: bytes, data: Any) -> None:
    from pjengine.serving.http_client import _AnswerParser

    cuts = sorted(data.draw(st.sets(st.integers(1, len(answer) - 1))))
    parser = _AnswerParser()
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    parts = [parser.feed(piece) for piece in pieces]
    if not parser.is_complete:
        parser.end()
    assert b"".join(parts) == body and parser.is_complete
    assert parser.status == int(answer.split()[1]) or parser.status == 200
    if b"X-Name" in answer:
        assert parser.headers["x-name"] == "a:b"


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"x" * 70000, CHUNKED[:-19] + b"zz\r\n"],
    ids=["another protocol", "no status", "no end of the head", "no size"],
)
def test_what_is_not_http_is_refused(answer: bytes) -> None:
    from pjengine.serving.http_client import _AnswerParser

    with pytest.raises(ValueError):
        _AnswerParser().feed(answer)


@pytest.mark.parametrize("length", [10, len(CHUNKED) - 1])
def test_an_answer_that_breaks_off_is_an_error(length: int) -> None:
    from pjengine.serving.http_client import _AnswerParser

    parser = _AnswerParser()
    parser.feed(CHUNKED[:length])
    with pytest.raises(ValueError, match="in the middle of the answer"):
        parser.end()


def test_events_are_found_across_pieces() -> None:
    from pjengine.serving.http_client import EventParser

    parser = EventParser()
    assert parser.feed(b'data: {"a"') == []
    assert parser.feed(b": 1}\n\n: a comment\r\n\r\ndata:2\r\n\r\nda") == [b'{"a": 1}', b"2"]
    assert parser.feed(b"ta: [DONE]\n\n") == [b"[DONE]"]


BAD_URLS = [
    "localhost:8000",
    "ftp://a/v1",
    "http://",
    "http://a:b/v1",
    "http://a:99999",
    "http://u:p@a/",
    "http://a b",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_url_is_refused(url: str) -> None:
    from pjengine.serving.http_client import Endpoint

    with pytest.raises(ValueError, match="a URL such as"):
        Endpoint(url)


def test_the_key_is_not_in_the_repr_and_no_header_can_be_smuggled_in_it() -> None:
    from pjengine.serving.http_client import Endpoint

    assert "sk-1" not in repr(Endpoint("http://a/v1", "sk-1"))
    with pytest.raises(ValueError, match="visible ASCII"):
        Endpoint("http://a/v1", "a\r\nX: y")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "ended in the middle"),
        (b"garbage\r\n\r\n", "does not answer as HTTP does"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", r"without \[DONE\]"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: x\n\n", "no JSON"),
        (
            b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "out of\\nluck"}}\n\n',
            "the answer ended: out of luck",
        ),
        (b"HTTP/1.1 500 Oh\r\n\r\n<html>", "the server answers 500: <html>"),
    ],
)
def test_servers_that_do_not_do_as_they_should_are_one_line(sent: bytes, message: str) -> None:
    from pjengine.serving.http_client import Endpoint, RemoteError, events

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Endpoint(f"http://127.0.0.1:{port}/v1").request("GET", "/models") as reply:
                [_ async for _ in events(reply)]

    with pytest.raises(RemoteError, match=message) as caught:
        asyncio.run(main())
    assert "\n" not in str(caught.value)
