"""A worker: loads its part of the model, and launches what the head launches, until that says stop."""

import logging
import os
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Int

from pjengine.compile_cache import CompileCache, open_compile_cache
from pjengine.config import EngineConfig, compile_cache_folder
from pjengine.device_state import (
    EARLY_UPDATES,
    AnyLayout,
    Program,
    free,
    new_state,
    page_updater,
    replicate,
    run_draw,
    run_model,
)
from pjengine.draw import DrawLayout, Undrawn
from pjengine.host_messages import Message, read_layout
from pjengine.hosts import Hosts, enlist, telling_failure
from pjengine.loading import LoadedModel, load_model
from pjengine.programs import Programs
from pjengine.step_compiler import StepCompiler

logger = logging.getLogger(__name__)


def follow(config: EngineConfig) -> int:
    """Works for the head at `config.coordinator`; returns the exit status when that has said stop.

    If the head is lost, the process ends with status 1.

    Raises:
      RefusedError: the head does not take this host; the text says why.
      ValueError, OSError: the model or a setting is not possible, or there is no head.
    """
    hosts = enlist(config)
    with telling_failure(hosts):
        loaded = load_model(config, hosts)
        cache = open_compile_cache(compile_cache_folder(config.compile_cache_dir))
        follower = Follower(loaded, cache, hosts)
        hosts.begin(loaded.facts)
        logger.info("host %d works for %s", config.node_rank, config.coordinator)
        follower.run()
    hosts.close()
    follower.close()
    return 0


class Follower:
    """Holds this host's part of parameters, KV pages and row state, and does what the head says."""

    def __init__(self, loaded: LoadedModel, cache: CompileCache | None, hosts: Hosts) -> None:
        config, sharding = loaded.runner_config, loaded.sharding
        self.params = loaded.params
        self.cache, self.rows = new_state(loaded.model, config, sharding)
        self._enter_pages = page_updater(self.rows, sharding)
        self._compiler = StepCompiler(
            loaded.model, config, (self.params, self.cache, self.rows), sharding, cache
        )
        self._programs: Programs[AnyLayout, Program] = Programs(self._compiler, os.cpu_count() or 1)
        self.programs: Mapping[AnyLayout, Program] = self._programs.ready
        self._hosts = hosts
        self._undrawn: Undrawn | None = None
        self._last: Array | None = None  # of the program launched last, something small that it leaves

    def run(self) -> None:
        """Obeys until the head says stop."""
        while (order := self._hosts.next()).kind != "stop":
            self._obey(order)

    def _obey(self, order: Message) -> None:
        match order.kind:
            case "run":
                self._launch(read_layout(order.fields["layout"]), order.vector)
            case "pages":
                updates = order.vector.reshape(3, EARLY_UPDATES)
                self.rows = self._enter_pages(self.rows, replicate(updates, self._compiler.sharding))
            case "make":
                self._programs.start([read_layout(order.fields["layout"])])
            case "drop":
                self._programs.drop(read_layout(order.fields["layout"]))
            case "reset":
                free(self.cache, self.rows)
                self._undrawn = self._last = None
                compiler = self._compiler
                self.cache, self.rows = new_state(compiler.model, compiler.config, compiler.sharding)
            case _:
                raise ValueError(f"the head gave an order that is none: {order.kind!r:.40}")

    def _launch(self, layout: AnyLayout, numbers: Int[np.ndarray, " size"]) -> None:
        if layout not in self.programs:
            self._programs.wait([layout])
        vector = replicate(numbers, self._compiler.sharding)
        if isinstance(layout, DrawLayout):
            assert self._undrawn is not None, "the head draws before it has launched"
            last, *_ = run_draw(self, layout, self._undrawn, vector)
            self._undrawn = None
        else:
            first, *_ = run_model(self, layout, vector)
            self._undrawn = first if layout.ends_in_logits else None
            last = first.kv_lens if layout.ends_in_logits else first.tokens
        # An error of a device shows when it is waited for; the head is no further ahead than this.
        before, self._last = self._last, last
        jax.block_until_ready(before)

    def close(self) -> None:
        self._programs.close()
        free(self.params, self.cache, self.rows)
