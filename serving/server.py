"""The process: starts the engine and the HTTP server, watches both, and ends them in order."""

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from pjengine.async_llm import AsyncLLM
from pjengine.config import EngineConfig
from pjengine.serving.app import build_app
from pjengine.serving.open_files import allow_open_files
from pjengine.serving.server_config import ServerConfig
from pjengine.serving.service import Service
from pjengine.stats import log_stats, read_stats

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 10.0
_WATCH_INTERVAL_S = 0.5
_SAMPLE_INTERVAL_S = 1.0  # for the dashboard
_LAST_WORDS_S = 10  # after the last request was ended, for the ends of its stream
_LAST_HEALTH_S = 1.0  # for load balancers to read that the engine has failed
_CLOSE_S = 3.0  # after that, for the engine; a step, a prompt or a compilation may take longer


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serves until a signal comes or the engine fails; returns the exit status.

    Raises:
      ValueError, OSError: the model or a setting is not possible, or the address is taken.
    """
    # Before the model is loaded: a certificate that is none, or an address that is taken, is found at once.
    if config.ssl_certfile is not None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    allow_open_files()  # a connection is one
    with _listener(config) as listener:
        if config.is_open:
            logger.warning(
                "serving on %s without a key: whoever reaches it can use it. Give --api-key or "
                "--host 127.0.0.1",
                config.host,
            )
        llm = AsyncLLM(**vars(engine_config))
        service = Service(llm, config)
        server = _Server(_uvicorn_config(service), service)
        try:
            gc.collect()
            gc.freeze()  # what start-up has made stays, and need not be looked through again
            # uvicorn raises the signal again once all is done.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            server.run(sockets=[listener])
        finally:
            server.close()
    return _exit_status(llm)


def _exit_status(llm: AsyncLLM) -> int:
    return 1 if llm.errored else 0


@contextmanager
def _listener(config: ServerConfig) -> Iterator[socket.socket]:
    """Takes the address, on which nobody is answered before the engine is ready; gives it back at the end."""
    family, kind, address, shown = _address(config)
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(f"cannot serve on {shown}: {error.strerror}") from error
        if config.uds is None:
            yield listener
            return
        try:
            os.chmod(config.uds, 0o600)
            yield listener
        finally:
            Path(config.uds).unlink(missing_ok=True)


def _address(config: ServerConfig) -> tuple[socket.AddressFamily, socket.SocketKind, Any, str]:
    if config.uds is not None:
        return socket.AF_UNIX, socket.SOCK_STREAM, config.uds, config.uds
    shown = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"cannot serve on {shown}: {error.strerror}") from error
    family, kind, _, _, address = found[0]
    return family, kind, address, shown


def _uvicorn_config(service: Service) -> uvicorn.Config:
    config = service.config
    return uvicorn.Config(
        build_app(service),
        log_config=None,  # the command line has set logging up
        log_level=config.uvicorn_log_level,
        access_log=not config.disable_uvicorn_access_log,
        server_header=False,
        root_path=config.root_path,
        lifespan="off",
        ws="none",
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        timeout_graceful_shutdown=round(config.shutdown_timeout_s) + _LAST_WORDS_S,
    )


class _Server(uvicorn.Server):
    """uvicorn's; it watches the engine, and ends requests that take too long when it shuts down."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._leaving = threading.Timer(_CLOSE_S, self._leave)
        self._leaving.daemon = True
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        logger.info("serving %s on %s", ", ".join(self._service.model_names), self._address(sockets[0]))
        self._tasks.append(asyncio.create_task(self._watch()))

    def _address(self, listener: socket.socket) -> str:
        name: Any = listener.getsockname()
        if listener.family == socket.AF_UNIX:
            return str(name)
        host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
        return f"{'https' if self.config.ssl_certfile else 'http'}://{host}:{name[1]}"

    async def _watch(self) -> None:
        service, engine = self._service, self._service.llm.engine
        before, before_s = read_stats(engine), time.perf_counter()
        sample_s = before_s
        while service.llm.is_running:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            now_s = time.perf_counter()
            if now_s - sample_s >= _SAMPLE_INTERVAL_S:
                service.metrics.recent.sample(read_stats(engine))
                sample_s = now_s
            if now_s - before_s >= STATS_INTERVAL_S and not service.config.disable_log_stats:
                now = read_stats(engine)
                log_stats(before, now, now_s - before_s)
                before, before_s = now, now_s
        if service.llm.errored:
            logger.error("the engine has failed: the server ends")
            await asyncio.sleep(_LAST_HEALTH_S)
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))
        await super().shutdown(sockets)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._leaving.start()

    def close(self) -> None:
        """Closes the service; the process ends here and now if that takes too long."""
        self._service.close()
        self._leaving.cancel()

    def _leave(self) -> None:
        """Nothing interrupts XLA. The compile cache writes whole files or none; the driver frees memory."""
        logger.warning("a step, a prompt or a compilation has not ended: it is given up")
        if self._service.config.uds is not None:
            Path(self._service.config.uds).unlink(missing_ok=True)
        os._exit(_exit_status(self._service.llm))

    async def _drain(self) -> None:
        """Ends what is still running when the time is up: the streams then end with an error."""
        service = self._service
        if service.num_requests:
            logger.info(
                "%d requests may take %g s to end", service.num_requests, service.config.shutdown_timeout_s
            )
        await asyncio.sleep(service.config.shutdown_timeout_s)
        await asyncio.to_thread(service.llm.close)
