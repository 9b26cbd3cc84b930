"""A server in a process of its own, and plain sockets to talk to it."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = ("--max-num-seqs=4", "--max-num-batched-tokens=64", "--decode-steps=1", "--dtype=float32")
# One layer of random weights: quick to compile.
RANDOM = ("--load-format=dummy", '--hf-overrides={"num_hidden_layers": 1}', *SMALL, "--no-warm-up")


def wait_until[T](read: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    """Asks again and again until there is an answer."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := read():
            return value
        time.sleep(0.01)
    raise TimeoutError(f"waited {timeout_s} s for {what}")


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        """Where it serves; waits until it does."""

        def find() -> str | None:
            assert self.process.poll() is None, self.log
            found = re.search(r"serving \S+ on (\S+)\n", self.log)
            return found[1] if found else None

        return wait_until(find, "the server")

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> "Socket":
        return Socket(socket.create_connection(self.address, timeout=60), method, path, body, headers or {})

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)


class Socket:
    """One request on a connection of its own; what comes back is read byte by byte."""

    def __init__(
        self, connection: socket.socket, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> None:
        self.connection = connection
        self.received = b""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: server", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            part = self.connection.recv(65536)
            assert part, self.received
            self.received += part
        return self.received

    def read_all(self) -> bytes:
        while part := self.connection.recv(65536):
            self.received += part
        self.connection.close()
        return self.received

    @property
    def body(self) -> bytes:
        """What was sent in chunks, or in one piece, put together."""
        head, _, rest = self.received.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return rest
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return b"".join(parts)


@contextmanager
def start_server(
    folder: Path, *arguments: str, module: str = "pjengine.serving.openai.api_server", code: str | None = None
) -> Iterator[Server]:
    """Starts a server, which is ended if it still runs afterwards; `code` starts it in place of `module`."""
    log_file = folder / "log"
    run = ["-m", module] if code is None else ["-c", code]
    with open(log_file, "wb") as log:
        process = subprocess.Popen([sys.executable, *run, *arguments], cwd=ROOT, stdout=log, stderr=log)
    try:
        yield Server(process, log_file)
    finally:
        process.kill()
        process.wait()
