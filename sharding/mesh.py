"""Devices -> Mesh. One axis for replicas, one for tensor parallelism."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, TENSOR = "data", "tensor"
AXES = (DATA, TENSOR)


def choose_devices(count: int) -> list[jax.Device]:
    """The first `count` devices of this process.

    Raises:
      ValueError: there are fewer.
    """
    devices = jax.local_devices()
    if len(devices) < count:
        raise ValueError(
            f"tensor_parallel_size={count} needs as many devices, found {len(devices)}: "
            f"{', '.join(str(device) for device in devices)}"
        )
    return devices[:count]


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh whose `tensor` axis spans `devices`."""
    return Mesh(np.asarray(devices).reshape(1, len(devices)), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
