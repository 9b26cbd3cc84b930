"""Hosts that Ray starts: an actor on each other node of its cluster. Steps do not go through Ray."""

import logging
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from pjengine.config import EngineConfig, hosts_secret, set_hosts_secret
from pjengine.follower import follow
from pjengine.hosts import Hosts, gather

logger = logging.getLogger(__name__)


class RayCluster:
    """The nodes of the cluster that this machine is of; this process becomes the head.

    Of a cluster with GPUs the nodes that have some take part, else all nodes.

    Raises:
      ValueError: Ray is not installed, or the devices do not divide among the nodes.
      OSError: there is no cluster.
    """

    def __init__(self, config: EngineConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "distributed_executor_backend='ray' needs Ray: pip install 'pjengine[ray]'"
            ) from error
        if not ray.is_initialized():
            try:
                ray.init(address="auto", logging_level=logging.WARNING)
            except ConnectionError as error:
                raise OSError(
                    "distributed_executor_backend='ray' found no cluster: run `ray start --head` on this "
                    "machine, and `ray start --address=...` on the others"
                ) from error
        alive = [node for node in ray.nodes() if node["Alive"]]
        self._num_gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in alive}
        has_gpus = any(self._num_gpus.values())
        nodes = [node for node, count in self._num_gpus.items() if count or not has_gpus]
        own = ray.get_runtime_context().get_node_id()
        if own not in nodes:
            raise ValueError(
                "this machine has no GPU that Ray knows of, and others have: start the head there"
            )
        self._others = [node for node in nodes if node != own]
        address = next(node["NodeManagerAddress"] for node in alive if node["NodeID"] == own)
        with socket.create_server((address, 0), family=socket.getaddrinfo(address, None)[0][0]) as probe:
            port = probe.getsockname()[1]
        shown = f"[{address}]" if ":" in address else address
        self.config = replace(config, distributed_executor_backend=None)
        if self._others:
            self.config = replace(self.config, nnodes=len(nodes), coordinator=f"{shown}:{port}")
        if not hosts_secret():
            set_hosts_secret(secrets.token_hex(32))  # nobody but these processes has to know it
        self._devices_of_each = config.tensor_parallel_size // len(nodes)
        for node in nodes if has_gpus else ():
            if self._num_gpus[node] < self._devices_of_each:
                raise ValueError(
                    f"tensor_parallel_size={config.tensor_parallel_size} on {len(nodes)} nodes needs "
                    f"{self._devices_of_each} GPUs of each; one has {self._num_gpus[node]}"
                )

    def start_workers(self, give_up: Callable[[str], None]) -> None:
        """Starts an actor on each other node, and returns; `give_up` is told why one has ended."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        settings = {own.name: getattr(self.config, own.name) for own in fields(self.config)}
        for rank, node in enumerate(self._others, 1):
            actor = ray.remote(_Worker).options(
                num_cpus=0,
                num_gpus=self._devices_of_each if self._num_gpus[node] else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            worker = actor.remote()
            call = worker.follow.remote({**settings, "node_rank": rank}, hosts_secret())
            watch = threading.Thread(
                target=_watch, args=(worker, call, rank, give_up), name="pjengine-ray", daemon=True
            )
            watch.start()


class _Worker:
    """What runs in an actor."""

    def follow(self, settings: dict[str, Any], secret: str) -> None:
        set_hosts_secret(secret)
        follow(EngineConfig(**settings))


def _watch(worker: Any, call: Any, rank: int, give_up: Callable[[str], None]) -> None:
    """Waits for a worker's end; `worker` is named so that the actor lives until then."""
    import ray

    try:
        ray.get(call)
    except Exception as error:  # of the worker, or of Ray
        reason = str(error).strip().splitlines()[-1]
        logger.warning("the worker of node_rank=%d has ended: %s", rank, reason)
        give_up(f"the worker that Ray started as node_rank={rank} has ended: {reason}")


def gather_hosts(config: EngineConfig) -> tuple[EngineConfig, Hosts | None]:
    """The settings, completed by Ray if it shall start the other hosts; and these, if there are others."""
    if config.distributed_executor_backend is None:
        return config, gather(config)
    cluster = RayCluster(config)
    return cluster.config, gather(cluster.config, cluster.start_workers)
