"""Devices -> Mesh. One axis for replicas, one for tensor parallelism."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, TENSOR = "data", "tensor"
AXES = (DATA, TENSOR)


def choose_devices(count: int, num_hosts: int = 1) -> list[jax.Device]:
    """The first `count` devices of this process; of several hosts as many of each, host after host.

    Raises:
      ValueError: there are fewer.
    """
    if num_hosts > 1:
        return _of_each_host(count // num_hosts, num_hosts)
    devices = jax.local_devices()
    if len(devices) < count:
        raise ValueError(
            f"tensor_parallel_size={count} needs as many devices, found {len(devices)}: "
            f"{', '.join(str(device) for device in devices)}"
        )
    return devices[:count]


def _of_each_host(count: int, num_hosts: int) -> list[jax.Device]:
    chosen = []
    for host in range(num_hosts):
        own = [device for device in jax.devices() if device.process_index == host]
        if len(own) < count:
            raise ValueError(
                f"tensor_parallel_size={count * num_hosts} on {num_hosts} hosts needs {count} devices of "
                f"each; the one of node_rank={host} has {len(own)}"
            )
        chosen += own[:count]
    return chosen


def own_device(devices: Sequence[jax.Device]) -> jax.Device:
    """The first of `devices` that is of this process."""
    return next(device for device in devices if device.process_index == jax.process_index())


def choose_device_groups(num_groups: int, num_devices: int, num_hosts: int = 1) -> list[list[jax.Device]]:
    """The devices of each replica, `num_devices` for each: the first of this process, in their order.

    A single one may be of several hosts, as `choose_devices` says.

    Raises:
      ValueError: there are fewer.
    """
    if num_groups == 1:
        return [choose_devices(num_devices, num_hosts)]
    devices = jax.local_devices()
    if len(devices) < num_groups * num_devices:
        raise ValueError(
            f"data_parallel_size={num_groups} with tensor_parallel_size={num_devices} needs "
            f"{num_groups * num_devices} devices, found {len(devices)}: "
            f"{', '.join(str(device) for device in devices)}"
        )
    return [devices[i * num_devices : (i + 1) * num_devices] for i in range(num_groups)]


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh whose `tensor` axis spans `devices`."""
    return Mesh(np.asarray(devices).reshape(1, len(devices)), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
