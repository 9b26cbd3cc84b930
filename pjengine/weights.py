"""New parameters for an engine that runs: checked, and put in the place of those that it has."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from pjengine.models.pair import Pair, target_params
from pjengine.models.parameters import by_path, from_paths, refuse_differences
from pjengine.runner import Runner
from pjengine.sharding.partition import copied

_MIX = 2654435761  # odd, and far from any size: places of different rows differ


def replace_params(runner: Runner, tree: Any, *, donate: bool) -> None:
    """Has all steps from the next one on compute with `tree`; of a pair, its target.

    Raises:
      ValueError: it is not what the programs were compiled for; nothing has changed then.
    """
    given = _checked(runner, tree)
    params = {**runner.params, "target": given} if isinstance(runner.model, Pair) else given
    runner.owned.exchange(params, given, is_donated=donate)
    runner.params = params


def copies_for(runners: Sequence[Runner], tree: Any) -> list[Any]:
    """What each of several engines needs to have the parameters in `tree`: the first itself, others a copy.

    Raises:
      ValueError: as `replace_params`, for the first one.
    """
    first, *others = runners
    given, wanted = _checked(first, tree), _wanted(first)
    seen = jax.tree.map(_seen_as, given, wanted)
    meshes = [runner.compiler.sharding.mesh for runner in others]
    return [given, *(copied(seen, mesh) for mesh in meshes if isinstance(mesh, Mesh))]


def params_digest(params: Any) -> str:
    """Tells parameters apart from others of the same shapes: a single other bit of one array shows."""
    return hashlib.sha256(np.asarray(jax.tree.leaves(_hashes(params))).tobytes()).hexdigest()[:16]


@jax.jit
def _hashes(params: Any) -> Any:
    return jax.tree.map(_hash, params)


def _hash(array: Array) -> UInt32[Array, ""]:
    """The sum of what the values are in bits, each times an odd number that tells its place."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        place = place * jnp.uint32(_MIX) + lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    return jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def _wanted(runner: Runner) -> Any:
    return target_params(runner.model, runner.compiler.state[0])


def _checked(runner: Runner, tree: Any) -> Any:
    wanted = _wanted(runner)
    refuse_differences(wanted, tree)
    return from_paths(wanted, by_path(tree))


def _seen_as(given: Array, wanted: jax.ShapeDtypeStruct) -> Array:
    """The same parts under a sharding that is spelled otherwise and means the same."""
    parts = [shard.data for shard in given.addressable_shards]
    return jax.make_array_from_single_device_arrays(given.shape, wanted.sharding, parts)
