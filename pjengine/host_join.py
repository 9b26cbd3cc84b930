"""How the processes of several hosts find each other: the head listens, and refuses workers unlike it.

Each side proves that it knows the secret of both, if there is one, without sending it: an HMAC of what the
other has drawn. That keeps strangers out, not listeners: the ports belong on a private network.
"""

import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

import pjengine
from pjengine.config import EngineConfig, hosts_secret
from pjengine.host_messages import Message, Wire

logger = logging.getLogger(__name__)

JOIN_S = 600.0  # how long hosts wait for each other at the start
PATIENCE_S = 10.0  # after which one who waits says for whom
HANDSHAKE_S = 10.0  # how long one may take to say who it is
MAX_HANDSHAKE_BYTES = 2**16
MAX_VISITORS = 32  # connections that say at one time who they are
_RETRY_S = 0.2
_LOOK_S = 0.5  # how often the head looks whether those that have joined are still there

# Of the settings, those by which every host must compute: they shape programs, or say what the weights are.
SHARED = (
    "nnodes", "tensor_parallel_size", "hf_overrides", "dtype", "load_format", "seed", "kv_cache_memory_bytes",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "decode_steps", "page_size",
    "speculative_config", "max_logprobs", "kernel_backend",
)  # fmt: skip


class RefusedError(ValueError):
    """The head does not take this host; the text is its reason."""


def shared_settings(config: EngineConfig) -> dict[str, str]:
    """What hosts compare."""
    return {name: json.dumps(getattr(config, name), sort_keys=True, default=repr) for name in SHARED}


def versions() -> dict[str, str]:
    return {"pjengine": pjengine.__version__, "jax": jax.__version__}


def address_of(coordinator: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 address stands in brackets."""
    host, _, port = coordinator.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def shown(said: object, max_size: int) -> str:
    """What a peer has said, as a part of one line: what does not print is escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(said)[:max_size])


class Door:
    """Where the head takes workers in: one of each rank. Those that come later are told so.

    Raises:
      OSError: the address is not of this machine, or taken.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.coordinator is not None
        self._config = config
        self._secret = hosts_secret()
        self._joined: dict[int, tuple[Wire, str]] = {}
        self._is_over = False  # all have joined, and are handed on
        self._failure: str | None = None  # why it is of no use to wait
        self._changed = threading.Condition()  # guards what has joined
        self._visitors = threading.Semaphore(MAX_VISITORS)
        host, port = address_of(config.coordinator)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise OSError(
                f"coordinator {config.coordinator}: the process of node_rank=0 cannot listen there: "
                f"{error.strerror or error}. It must be an address of its machine, and free"
            ) from error
        threading.Thread(target=self._listen, name="pjengine-door", daemon=True).start()

    def wait(self, timeout_s: float = JOIN_S) -> dict[int, tuple[Wire, str]]:
        """Once there is a worker of each rank: their connections and addresses.

        Raises:
          TimeoutError: some have not come.
          OSError: they will not come.
        """
        begun_s, has_said = time.monotonic(), False
        start = f"start it with --nnodes {self._config.nnodes} --coordinator {self._config.coordinator}"
        with self._changed:
            while True:
                self._drop_those_gone()
                missing = [rank for rank in range(1, self._config.nnodes) if rank not in self._joined]
                if not missing:
                    self._is_over = True
                    return dict(sorted(self._joined.items()))
                if self._failure is not None:
                    raise OSError(self._failure)
                waited_s = time.monotonic() - begun_s
                ranks = ", ".join(map(str, missing))
                if waited_s >= timeout_s:
                    raise TimeoutError(
                        f"no worker of node_rank {ranks} has joined within {timeout_s:g} s: {start}"
                    )
                if waited_s >= PATIENCE_S and not has_said:
                    has_said = True
                    logger.warning("waiting up to %g s for node_rank %s: %s", timeout_s, ranks, start)
                self._changed.wait(min(_LOOK_S, timeout_s - waited_s))

    def _drop_those_gone(self) -> None:
        """Frees the ranks of workers that have joined and left while others are awaited."""
        for rank, (wire, name) in list(self._joined.items()):
            if wire.has_ended():
                logger.warning("the worker at %s has left: node_rank=%d is awaited again", name, rank)
                wire.close()
                del self._joined[rank]

    def give_up(self, reason: str) -> None:
        """Ends the wait for workers, if there still is one."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def close(self) -> None:
        """Takes nobody any more, and hangs up on who has come if `wait` has not handed them on."""
        self._listener.close()
        with self._changed:
            if not self._is_over:
                for wire, _ in self._joined.values():
                    wire.close()
                self._joined.clear()

    def _listen(self) -> None:
        is_crowded = False
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed
                return
            if not self._visitors.acquire(blocking=False):
                if not is_crowded:
                    logger.warning(
                        "%d connections do not say who they are: more are hung up on, %s:%d first",
                        *(MAX_VISITORS, *address[:2]),
                    )
                is_crowded = True
                connection.close()
                continue
            is_crowded = False
            name = f"{address[0]}:{address[1]}"
            threading.Thread(target=self._meet, args=(connection, name), daemon=True).start()

    def _meet(self, connection: socket.socket, name: str) -> None:
        wire, begun_s = Wire(connection), time.monotonic()
        wire.set_patience(HANDSHAKE_S)
        watch = threading.Timer(HANDSHAKE_S, wire.close)  # who sends a byte now and then is not silent
        watch.daemon = True
        watch.start()
        is_in = False
        try:
            is_in = self._admit(wire, name)
        except (OSError, EOFError, ValueError) as error:
            is_late = time.monotonic() - begun_s >= HANDSHAKE_S  # and `watch` may have closed it
            reason = f"it did not say within {HANDSHAKE_S:g} s who it is" if is_late else error
            logger.warning("a connection from %s was no worker: %s", name, reason)
        finally:
            watch.cancel()
            self._visitors.release()
            if not is_in:
                wire.close()

    def _admit(self, wire: Wire, name: str) -> bool:
        """Hears who is there, and whether that may come in."""
        nonce = secrets.token_hex(32)
        wire.send("hello", nonce=nonce)
        said = _handshake(wire, "join")
        if not _is_proof(said, self._secret, "join", nonce):
            reason: str | None = "its secret is another: set PJENGINE_HOSTS_SECRET alike for all hosts"
        else:
            reason = self._objection(said.fields)
        rank: Any = said.fields.get("rank")
        with self._changed:
            if not self._is_over:
                self._drop_those_gone()
            if reason is None and rank in self._joined:
                other = self._joined[rank][1]
                is_full = len(self._joined) == self._config.nnodes - 1
                reason = (
                    f"it is late: all hosts had joined, of node_rank={rank} the one at {other}. Hosts cannot "
                    "come later or again: end all processes, and start them anew"
                    if is_full
                    else f"node_rank={rank} has joined already, from {other}: give each host its own"
                )
            if reason is None:
                wire.send("welcome", proof=_proof(self._secret, "welcome", str(said.fields.get("nonce"))))
                self._joined[rank] = wire, name
                self._changed.notify_all()
                return True
        logger.warning("a worker at %s was refused: %s", name, reason)
        wire.send("refused", reason=reason)
        return False

    def _objection(self, said: Mapping[str, Any]) -> str | None:
        """Why the head and this worker cannot compute together."""
        for name, own in versions().items():
            if said.get(name) != own:
                return (
                    f"it has {name} {shown(said.get(name), 40)}, and the head {own}: all hosts need the same"
                )
        theirs = said.get("settings")
        if not isinstance(theirs, dict):
            return "it says no settings"
        for name, own in shared_settings(self._config).items():
            if theirs.get(name) != own:
                return (
                    f"it has {name}={shown(theirs.get(name), 80)}, and the head {own:.80}: start both alike"
                )
        rank = said.get("rank")
        if type(rank) is not int or not 1 <= rank < self._config.nnodes:
            return f"node_rank must be from 1 to {self._config.nnodes - 1}, got {rank!r:.20}"
        return None


def join(config: EngineConfig, timeout_s: float = JOIN_S) -> tuple[Wire, str]:
    """A worker's connection to the head, and the head's address. Waits until there is a head.

    Raises:
      RefusedError: the head does not take this host.
      OSError: nobody answers, or who does is no head.
    """
    assert config.coordinator is not None
    logger.info("host %d joins the head at %s", config.node_rank, config.coordinator)
    secret, nonce = hosts_secret(), secrets.token_hex(32)
    wire, drawn = _find_head(config.coordinator, timeout_s)
    try:
        who: dict[str, Any] = {"rank": config.node_rank, "settings": shared_settings(config), **versions()}
        wire.send("join", proof=_proof(secret, "join", drawn), nonce=nonce, **who)
        said = _handshake(wire, "welcome", "refused")
        if said.kind == "refused":
            raise RefusedError(
                f"the head at {config.coordinator} refused this host (node_rank={config.node_rank}): "
                f"{shown(said.fields.get('reason'), 1000)}"
            )
        if not _is_proof(said, secret, "welcome", nonce):
            raise RefusedError(f"who answers at {config.coordinator} does not know the secret of the hosts")
    except BaseException as error:
        wire.close()
        if isinstance(error, RefusedError) or not isinstance(error, OSError | EOFError | ValueError):
            raise
        if isinstance(error, TimeoutError | ValueError):
            raise _no_head(config.coordinator, error) from error
        raise OSError(f"coordinator {config.coordinator}: the head has hung up ({error})") from error
    return wire, config.coordinator


def _find_head(coordinator: str, timeout_s: float) -> tuple[Wire, str]:
    """A connection to who has said hello, and the nonce that was drawn there."""
    begun_s, has_said = time.monotonic(), False
    while True:
        wire = None
        try:
            wire = Wire(socket.create_connection(address_of(coordinator), HANDSHAKE_S))
            wire.set_patience(HANDSHAKE_S)
            return wire, str(_handshake(wire, "hello").fields.get("nonce"))
        except (OSError, EOFError, ValueError) as error:
            if wire is not None:
                wire.close()
                if isinstance(error, TimeoutError | ValueError):
                    raise _no_head(coordinator, error) from error
            elif isinstance(error, socket.gaierror | UnicodeError):
                raise OSError(
                    f"coordinator {coordinator}: this machine does not know that name ({error}): give the "
                    "address of the machine of node_rank=0, or a name that all machines know"
                ) from error
            # A head that is not there yet refuses, or is crowded and hangs up.
            reason = getattr(error, "strerror", None) or error
            waited_s = time.monotonic() - begun_s
            if waited_s >= timeout_s:
                raise OSError(
                    f"coordinator {coordinator}: no answer within {timeout_s:g} s ({reason}): start the "
                    "process of node_rank=0 there"
                ) from error
            if waited_s >= PATIENCE_S and not has_said:
                has_said = True
                logger.warning(
                    "waiting up to %g s for the head at %s (%s): start the process of node_rank=0 there",
                    *(timeout_s, coordinator, reason),
                )
        time.sleep(_RETRY_S)


def _no_head(coordinator: str, error: Exception) -> OSError:
    return OSError(f"coordinator {coordinator}: what answers there is no pjengine head ({error})")


def _handshake(wire: Wire, *kinds: str) -> Message:
    said = wire.receive(max_object_bytes=MAX_HANDSHAKE_BYTES, max_vector_bytes=0)
    if said.kind not in kinds:
        raise ValueError(f"wanted {' or '.join(kinds)}, got {said.kind!r:.40}")
    return said


def _proof(secret: str, purpose: str, nonce: str) -> str:
    return hmac.digest(secret.encode(), f"{purpose} {nonce}".encode(), "sha256").hex()


def _is_proof(said: Message, secret: str, purpose: str, nonce: str) -> bool:
    proof = str(said.fields.get("proof")).encode(errors="replace")
    return hmac.compare_digest(proof, _proof(secret, purpose, nonce).encode())
