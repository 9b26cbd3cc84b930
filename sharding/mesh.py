"""Devices -> Mesh. One axis for replicas, one for tensor parallelism."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "tensor")


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh whose `tensor` axis spans `devices`."""
    return Mesh(np.asarray(devices).reshape(1, len(devices)), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
