"""The other hosts of an engine: what is told to them, and what happens when one is lost.

Each process is joined with the head by a connection of our own, beside those of `jax.distributed`. Over it
the head names each program that it launches, with the numbers that go to the device; workers launch the same.
A device waits for ever in a sum of which another host has no part. So both sides say every HEARTBEAT_S
seconds that they live, the head's steps run on a thread that can be left waiting, and a process that has lost
another ends itself: nothing else can end what hangs in a device.
"""

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from pjengine.batching import Layout
from pjengine.config import EngineConfig
from pjengine.draw import DrawLayout
from pjengine.host_join import JOIN_S, Door, address_of, join, shown
from pjengine.host_messages import Message, Wire, layout_fields

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
SILENCE_S = 10.0  # after which a host is taken for lost
LOADING_SILENCE_S = 60.0  # the same while weights are read, which may hold the interpreter's lock
EXIT_S = 12.0  # for requests to be told of a loss and streams to end, before the process does
_LOOK_S = 0.5
_INITIALIZE_S = 120
_SHUTDOWN_S = 10
_NOTHING = np.empty(0, np.int32)
_MENDABLE = (ValueError, OSError, NotImplementedError)  # by the caller, if they come before the first step


class HostLostError(RuntimeError):
    """Another host is gone, or silent. The engine cannot go on, and its process is about to end."""


@dataclass(eq=False)
class Peer:
    """A host at the other end of a connection."""

    name: str
    wire: Wire
    heard_s: float = 0.0  # when it spoke last, on the monotonic clock
    inbox: SimpleQueue[Message | None] = field(default_factory=SimpleQueue)  # None: it is lost


class Hosts:
    """The head's workers, or a worker's head.

    `lost` says which of them is lost, once one is. Then the process ends with status 1, or 2 if one could not
    start for a reason that the caller can mend: a worker's at once, the head's when it exits by itself, or
    after EXIT_S.
    """

    def __init__(self, rank: int, peers: Mapping[int, tuple[Wire, str]], door: Door | None = None) -> None:
        self.lost: HostLostError | None = None
        self._rank = rank
        self._peers = [
            Peer(f"host {rank} ({name})" if rank else f"the head ({name})", wire)
            for rank, (wire, name) in peers.items()
        ]
        self._door = door
        self._is_closing = self._has_begun = False
        self._status = 1  # of this process's end, if something is lost
        self._lock = threading.Lock()  # of `lost`, `_running` and `_when_lost`
        self._running: Future[Any] | None = None
        self._steps: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._when_lost: list[Callable[[HostLostError], None]] = []
        self._is_lost, self._ended = threading.Event(), threading.Event()
        self.be_patient(JOIN_S if rank else LOADING_SILENCE_S)
        for peer in self._peers:
            peer.wire.set_patience(None)  # its silence is watched from outside
            threading.Thread(target=self._listen, args=(peer,), name="pjengine-host", daemon=True).start()
        threading.Thread(target=self._beat, name="pjengine-heartbeat", daemon=True).start()
        threading.Thread(target=self._watch, name="pjengine-silence", daemon=True).start()
        if rank == 0:
            threading.Thread(target=self._run_steps, name="pjengine-steps", daemon=True).start()
        atexit.register(self._exit_if_lost)

    def be_patient(self, seconds: float) -> None:
        """How long a peer may be silent from now on."""
        for peer in self._peers:
            peer.heard_s = time.monotonic()
        self._patience_s = seconds

    def tell(self, kind: str, vector: Int[np.ndarray, "..."] = _NOTHING, **values: Any) -> None:
        """Sends a message to every peer.

        Raises:
          HostLostError: one is gone.
          ValueError: it is too large.
        """
        for peer in self._peers:
            try:
                peer.wire.send(kind, vector.reshape(-1), **values)
            except OSError as error:
                self._lose(peer, f"its connection has ended ({error})")
        if self.lost is not None:
            raise self.lost

    def tell_layout(
        self, kind: str, layout: Layout | DrawLayout, vector: Int[np.ndarray, "..."] = _NOTHING
    ) -> None:
        """As `tell`, of a program."""
        self.tell(kind, vector, layout=layout_fields(layout))

    def next(self) -> Message:
        """A worker's next order. Waits for it."""
        [head] = self._peers
        return self._next(head)

    def _next(self, peer: Peer) -> Message:
        message = peer.inbox.get()
        if message is None:
            assert self.lost is not None
            raise self.lost
        return message

    def expect(self, kind: str) -> list[Mapping[str, Any]]:
        """What each peer's next message holds, which must be of that kind.

        Raises:
          HostLostError: something else came, or nothing.
        """
        messages = [self._next(peer) for peer in self._peers]
        for peer, message in zip(self._peers, messages, strict=True):
            if message.kind != kind:
                raise HostLostError(f"{peer.name} said {message.kind!r}, where {kind!r} was wanted")
        return [message.fields for message in messages]

    def least(self, *own: int | None) -> tuple[int | None, ...]:
        """Of each number the least that any host has; None where the others have None, too."""
        if self._rank:
            self.tell("least", values=own)
            [agreed] = self.expect("least")
            return tuple(agreed["values"])
        rows = [own, *(theirs["values"] for theirs in self.expect("least"))]
        least = [
            min((value for value in column if value is not None), default=None)
            for column in zip(*rows, strict=True)
        ]
        self.tell("least", values=least)
        return tuple(least)

    def begin(self, facts: Mapping[str, str]) -> None:
        """Returns once all hosts are ready to launch steps.

        Args:
          facts: that must be the same for all, by name.

        Raises:
          ValueError: they are not; the text says which.
        """
        if self._rank:
            self.tell("ready", facts=facts)
            self.expect("go")
        else:
            for peer, said in zip(self._peers, self.expect("ready"), strict=True):
                for name, own in facts.items():
                    if (theirs := said["facts"].get(name)) != own:
                        raise ValueError(
                            f"{peer.name} has {name}={shown(theirs, 200)}, and the head {own:.200}: "
                            "give all hosts the same model and options"
                        )
            self.tell("go")
        self._has_begun = True
        self.be_patient(SILENCE_S)

    def run[T](self, function: Callable[[], T]) -> T:
        """Calls a function that may wait for devices, on a thread of its own.

        Raises:
          HostLostError: a host is lost; the function may then wait for ever, and nobody waits for it.
        """
        call: Future[T] = Future()
        with self._lock:
            if self.lost is not None:
                raise self.lost
            self._running = call
        self._steps.put((call, function))
        try:
            return call.result()
        except jax.errors.JaxRuntimeError as error:
            # Where a host is lost the devices may say so first, but not which.
            if self._is_lost.wait(SILENCE_S + HEARTBEAT_S) and self.lost is not None:
                raise self.lost from error
            raise
        except BaseException:
            wait([call])  # Ctrl-C comes to this thread, and the step goes on
            raise

    def call_when_lost(self, call: Callable[[HostLostError], None]) -> None:
        """Has something called when a host is lost, on another thread; at once if one is."""
        with self._lock:
            self._when_lost.append(call)
            lost = self.lost
        if lost is not None:
            call(lost)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this host cannot go on: they end."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Perhaps of a host that is lost. The next heartbeat shows that at the latest, and ends a worker.
            self._is_lost.wait(2 * HEARTBEAT_S)
        with self._lock:
            if self.lost is not None or self._is_closing:
                return
            self.lost = HostLostError(f"this host has failed: {error!r:.2000}")
            if isinstance(error, _MENDABLE) and not self._has_begun:
                self._status = 2
        for peer in self._peers:
            try:
                peer.wire.send("failed", reason=f"{error!r:.2000}", status=self._status)
            except OSError:
                pass  # it knows already
        self._ended.set()

    def close(self) -> None:
        """The head ends its workers; a worker leaves. Safe to call twice."""
        with self._lock:
            if self.lost is not None or (self._is_closing and self._rank == 0):
                return
            self._is_closing = True
        if self._rank == 0:
            self.tell("stop")
        try:
            jax.distributed.shutdown()  # which waits for the other hosts
        except RuntimeError as error:
            logger.warning("the hosts have not left together: %s", error)
        self._close()

    def _close(self) -> None:
        with self._lock:
            self._is_closing = True  # so that what ends now is not lost
        self._ended.set()
        if self._door is not None:
            self._door.close()
        for peer in self._peers:
            peer.wire.close()
        atexit.unregister(self._exit_if_lost)

    def _listen(self, peer: Peer) -> None:
        """Takes what a peer says, until it says nothing more."""
        while True:
            try:
                message = peer.wire.receive()
            except (OSError, EOFError, ValueError) as error:
                return self._lose(peer, f"its connection has ended ({error})")
            peer.heard_s = time.monotonic()
            if message.kind == "failed":
                if self.lost is None and message.fields.get("status") == 2:
                    self._status = 2
                return self._lose(peer, f"it has failed: {shown(message.fields.get('reason'), 2000)}")
            if message.kind == "stop":
                self._is_closing = True
            if message.kind != "alive":
                peer.inbox.put(message)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for peer in self._peers:
                try:
                    peer.wire.send("alive")
                except OSError as error:
                    return self._lose(peer, f"its connection has ended ({error})")

    def _watch(self) -> None:
        """Not in the thread of the heartbeats: a peer that is stopped takes none in the end."""
        while not self._ended.wait(_LOOK_S):
            for peer in self._peers:
                if time.monotonic() - peer.heard_s > self._patience_s:
                    return self._lose(peer, f"it has said nothing for {self._patience_s:g} s")

    def _lose(self, peer: Peer, reason: str) -> None:
        with self._lock:
            if self.lost is not None or self._is_closing:
                return
            self.lost = HostLostError(f"{peer.name} is lost: {reason}")
            running, calls = self._running, list(self._when_lost)
        logger.error("%s. This process ends", self.lost)
        self._is_lost.set()
        if self._rank:
            _end(self._status)
        watchdog = threading.Timer(EXIT_S, _end, (self._status,))
        watchdog.daemon = True
        watchdog.start()
        for own in self._peers:
            own.inbox.put(None)
        if running is not None:
            _settle(running, error=self.lost)
        for call in calls:
            call(self.lost)

    def _run_steps(self) -> None:
        while True:
            call, function = self._steps.get()
            try:
                result = function()
            except BaseException as error:
                _settle(call, error=error)
            else:
                _settle(call, result)
            del call, function

    def _exit_if_lost(self) -> None:
        """Before JAX takes its backend down, which would wait for the devices."""
        if self.lost is not None:
            _end(self._status)


def _settle(call: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    try:
        if error is None:
            call.set_result(result)
        else:
            call.set_exception(error)
    except InvalidStateError:  # the step has ended, and a host is lost, at the same time
        pass


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)


@contextmanager
def telling_failure(hosts: Hosts | None) -> Iterator[None]:
    """Has the other hosts know what ends this one."""
    try:
        yield
    except BaseException as error:
        if hosts is not None:
            hosts.fail(error)
        raise


def gather(
    config: EngineConfig, start_workers: Callable[[Callable[[str], None]], None] | None = None
) -> Hosts | None:
    """The head's start: waits for the workers, and joins all devices to one system; None where it is alone.

    `start_workers` is called once workers can join, with what it may tell why they will not.

    Raises:
      OSError: the address cannot be had, or workers are missing.
      RuntimeError: JAX has started its backend already.
    """
    if config.nnodes == 1:
        return None
    assert config.coordinator is not None
    door = Door(config)
    try:
        if start_workers is not None:
            start_workers(door.give_up)
        logger.info("%d other hosts are to join at %s", config.nnodes - 1, config.coordinator)
        peers = door.wait()
    except BaseException:
        door.close()
        raise
    hosts = Hosts(0, peers, door)
    with telling_failure(hosts):
        host, _ = address_of(config.coordinator)
        with socket.create_server((host, 0), family=_family(host)) as probe:
            port = probe.getsockname()[1]
        hosts.tell("start", port=port)
        _initialize(config, host, port)
    return hosts


def enlist(config: EngineConfig) -> Hosts:
    """A worker's start. Raises as `join` does."""
    assert config.coordinator is not None
    hosts = Hosts(config.node_rank, {0: join(config)})
    with telling_failure(hosts):
        [start] = hosts.expect("start")
        hosts.be_patient(LOADING_SILENCE_S)
        _initialize(config, address_of(config.coordinator)[0], start["port"])
    return hosts


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _initialize(config: EngineConfig, host: str, port: int) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    jax.distributed.initialize(
        shown,
        config.nnodes,
        config.node_rank,
        cluster_detection_method="deactivate",
        coordinator_bind_address=shown,
        initialization_timeout=_INITIALIZE_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )
