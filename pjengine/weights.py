"""New parameters for an engine that runs: checked, and put in the place of those that it has."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from pjengine.models.pair import Pair, target_params
from pjengine.models.parameters import by_path, from_paths, refuse_differences
from pjengine.runner import Runner
from pjengine.sharding.partition import copied


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


def sample_digest(params: Any) -> str:
    """Tells parameters apart from others of the same shapes, by the first and the last row of each array."""
    digest = hashlib.sha256()
    for row in jax.tree.leaves(_ends(params)):
        digest.update(np.asarray(row).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _ends(params: Any) -> Any:
    return jax.tree.map(lambda leaf: [leaf[(end,) * (leaf.ndim - 1)] for end in (0, -1)], params)


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
