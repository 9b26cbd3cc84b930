"""What hosts say to each other: JSON and int32 numbers in a frame of bounded size. No pickle, no code.

A frame is two little-endian uint32, the bytes of the object and those of the numbers; then the object as
UTF-8, then the numbers, little-endian.
"""

import json
import select
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Int

from pjengine.batching import Layout
from pjengine.draw import DrawLayout
from pjengine.edit_sizes import EditSizes

MAX_OBJECT_BYTES = 2**20
MAX_VECTOR_BYTES = 2**28  # of a step: masks of its grammars are most of it
_SIZES = struct.Struct("<II")
_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class Message:
    kind: str
    vector: Int[np.ndarray, " size"] = field(default_factory=lambda: _NOTHING)
    fields: Mapping[str, Any] = field(default_factory=dict)


class Wire:
    """One connection. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._sending = threading.Lock()

    def set_patience(self, seconds: float | None) -> None:
        """How long the next `send` and `receive` wait for the peer before TimeoutError is raised."""
        self._socket.settimeout(seconds)

    def send(self, kind: str, vector: Int[np.ndarray, " size"] = _NOTHING, **values: Any) -> None:
        """Sends a message whole.

        Raises:
          ValueError: it is larger than a peer takes.
          OSError: the peer is gone, or takes nothing.
        """
        head = json.dumps({"kind": kind, **values}).encode()
        body = np.ascontiguousarray(vector, "<i4").tobytes()
        _check_sizes(len(head), len(body), MAX_OBJECT_BYTES, MAX_VECTOR_BYTES)
        with self._sending:
            self._socket.sendall(_SIZES.pack(len(head), len(body)) + head + body)

    def receive(
        self, *, max_object_bytes: int = MAX_OBJECT_BYTES, max_vector_bytes: int = MAX_VECTOR_BYTES
    ) -> Message:
        """The next message.

        Raises:
          EOFError: the peer has closed the connection.
          ValueError: what came is no message, or too large.
          OSError: the peer is gone, or silent.
        """
        head_bytes, body_bytes = _SIZES.unpack(self._read(_SIZES.size))
        _check_sizes(head_bytes, body_bytes, max_object_bytes, max_vector_bytes)
        head, body = self._read(head_bytes), self._read(body_bytes)
        try:
            values = json.loads(head)
        except RecursionError as error:
            raise ValueError("a message is nested too deeply") from error
        if not isinstance(values, dict) or not isinstance(kind := values.pop("kind", None), str):
            raise ValueError(f"wanted a JSON object with a kind, got {head!r:.80}")
        return Message(kind, np.frombuffer(body, "<i4"), values)

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            num_read = self._socket.recv_into(view)
            if num_read == 0:
                raise EOFError("the connection was closed")
            view = view[num_read:]
        return content

    def has_ended(self) -> bool:
        """Whether this side or the peer has closed it, even if the peer has said more before."""
        if self._socket.fileno() < 0:
            return True
        look = select.poll()
        # Of Linux, and not shown by a peek at what comes next; elsewhere what was said before hides the end.
        look.register(self._socket, getattr(select, "POLLRDHUP", select.POLLHUP))
        return bool(look.poll(0))

    def close(self) -> None:
        """Wakes whoever sends or receives. Safe to call twice."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer was faster
            pass
        self._socket.close()


def _check_sizes(head: int, body: int, max_head: int, max_body: int) -> None:
    if head > max_head or body > max_body or body % 4:
        raise ValueError(
            f"a message has at most {max_head} bytes of JSON and {max_body} of int32, got {head} and {body}"
        )


def layout_fields(layout: Layout | DrawLayout) -> dict[str, Any]:
    """A program's layout as JSON has it.

    Raises:
      ValueError: it holds functions, which no message does.
    """
    values = asdict(layout)
    if isinstance(layout, DrawLayout) and values["edits"].pop("chains"):
        raise ValueError("a program with logits processors cannot be named to other hosts")
    if isinstance(layout, Layout) and values.pop("edit_room"):
        raise ValueError("a program with activation edits cannot be named to other hosts")
    return values


def read_layout(values: Any) -> Layout | DrawLayout:
    """The layout that `layout_fields` wrote.

    Raises:
      ValueError: it wrote no such thing.
    """
    if isinstance(values, dict) and isinstance(edits := values.get("edits"), dict):
        own = _checked(EditSizes, {**edits, "chains": ()}, chains=())
        return DrawLayout(**_checked(DrawLayout, values, edits=EditSizes(**own)))
    own = {**values, "edit_room": None} if isinstance(values, dict) else values
    return Layout(**_checked(Layout, own))


def _checked(kind: type[Any], values: Any, **known: Any) -> dict[str, Any]:
    """`known` over `values`, which must name the fields of `kind`, and be numbers."""
    names = {own.name for own in fields(kind)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"wanted the fields of {kind.__name__}, got {values!r:.200}")
    for name in names - set(known):
        if not isinstance(values[name], int | None):
            raise ValueError(f"{kind.__name__}.{name} must be a number, got {values[name]!r:.80}")
    return {**values, **known}
