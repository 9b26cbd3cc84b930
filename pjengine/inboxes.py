"""The memory that GPUs of one process lend each other, to sum through it (`pallas_kernels.peer_sum`)."""

import ctypes
import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from pjengine.config import RunnerConfig
from pjengine.pallas_kernels.peer_sum import inbox_bytes
from pjengine.sharding.mesh import TENSOR

logger = logging.getLogger(__name__)

_CAPABILITY = "9.0"  # the kernel is one of Pallas's Mosaic backend, for Hopper


class Inboxes:
    """Owns an inbox on each device of a mesh, if its GPUs see each other's memory.

    Programs know the inboxes by their addresses alone, and write to them without JAX's knowledge. So they
    stay where they are as long as a program runs that was given their table: until `free`, which waits, or
    until nobody holds this object, which must not be while a step runs.
    """

    def __init__(self, sharding: NamedSharding, config: RunnerConfig) -> None:
        is_wanted = not config.disable_custom_all_reduce and config.kernel_backend != "reference"
        self._devices = list(sharding.mesh.devices.flat)
        self._sharding = NamedSharding(sharding.mesh, PartitionSpec(TENSOR))
        self._memory: Array | None = None
        self._is_usable = is_wanted and sharding.is_fully_addressable and can_lend(self._devices)

    def renew(self) -> UInt32[Array, "gpus words 2"] | None:
        """Empty inboxes in place of those before, and their tables, one for each device; None: no inboxes."""
        if not self._is_usable:
            return None
        before, self._memory = self._memory, self._zeros(inbox_bytes(len(self._devices)) // 4)
        if before is not None:
            before.delete()
        shards = {shard.device: shard.data for shard in self._memory.addressable_shards}
        return jax.device_put(tables_of([shards[device] for device in self._devices]), self._sharding)

    def free(self) -> None:
        """Gives the memory back, once no program runs any more."""
        memory, self._memory = self._memory, None
        if memory is not None:
            try:
                self._zeros(1)
            except jax.errors.JaxRuntimeError as error:  # a device that has failed runs nothing either
                logger.warning("inboxes are freed without waiting for the devices: %s", error)
            memory.delete()

    def _zeros(self, num_words: int) -> Array:
        """New memory on each device. It is there when all has run that was launched before."""
        make = functools.partial(jnp.zeros, (len(self._devices), num_words), jnp.uint32)
        return jax.jit(make, out_shardings=self._sharding)().block_until_ready()


def can_lend(devices: Sequence[jax.Device]) -> bool:
    """Whether these are Hopper GPUs of this process, several, each of which sees the memory of the others."""
    if len(devices) == 1 or any(device.platform != "gpu" for device in devices):
        return False
    if any(getattr(device, "compute_capability", None) != _CAPABILITY for device in devices):
        return False
    numbers = [device.local_hardware_id for device in devices]
    pairs = [(one, other) for one in numbers for other in numbers if one != other]
    return all(_sees(one, other) for one, other in pairs)


def _sees(device: int | None, peer: int | None) -> bool:
    """Whether the CUDA driver lets a device read and write a peer's memory; XLA then has it enabled."""
    driver, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    return driver.cuDeviceCanAccessPeer(ctypes.byref(answer), device, peer) == 0 and answer.value == 1


def tables_of(inboxes: Sequence[Array]) -> UInt32[np.ndarray, "gpus words 2"]:
    """Of each GPU what `peer_sum` takes, for inboxes in the order of the mesh."""
    addresses = np.array([inbox.unsafe_buffer_pointer() for inbox in inboxes], np.uint64)
    tables = np.zeros((len(inboxes), len(inboxes) + 2), np.uint64)
    tables[:, :-2] = addresses
    tables[:, -2] = addresses
    tables[:, -1] = np.arange(len(inboxes))
    return tables.view(np.uint32).reshape(*tables.shape, 2)  # low half first
