"""A model's parameters by path: what they must be, and in what a given tree differs from it."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from pjengine.models.decoder import Decoder, Params
from pjengine.sharding.partition import placed

MAX_NAMED = 12  # differences of one kind that an error lists


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, such as "layers/qkv".

    Raises:
      ValueError: two leaves have one path, as where a key holds a "/".
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in found:
            raise ValueError(f"two leaves of the tree are called {name!r}: wanted each path once")
        found[name] = leaf
    return found


def from_paths(like: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree in the form of `like`, its leaves taken by their paths."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in by_path(like)])


def placed_shapes(model: Decoder, mesh: Mesh | AbstractMesh) -> Params:
    """Shapes and dtypes of the parameters, and how they are divided; padding and repeated heads included."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params: Params = placed(shapes, mesh, has_whole_experts=model.config.has_whole_experts)
    return params


def refuse_differences(wanted: Params, given: Any, *, shapes_only: bool = False) -> None:
    """Compares a tree with what it must be: paths and shapes of arrays that are there, and unless
    `shapes_only` all else that the compiled programs go by.

    Containers may be of another kind: leaves are known by their paths.

    Raises:
      ValueError: they differ; the text lists how, of each kind at most MAX_NAMED.
    """
    own, others = by_path(wanted), by_path(given)
    both = [path for path in own if path in others]
    faults = {
        "missing": [f"{path} {_about(own[path])}" for path in own if path not in others],
        "unexpected": [path for path in others if path not in own],
        "of another shape": list(_unequal("shape", own, others, both)),
    }
    arrays = [path for path in both if _is_array(others[path])]
    alive = [path for path in arrays if not others[path].is_deleted()]
    faults["deleted"] = [path for path in arrays if path not in alive]
    if not shapes_only:
        faults |= {
            "no jax.Array (jax.device_put makes one)": [
                f"{path}: got a {type(others[path]).__name__}" for path in both if path not in arrays
            ],
            "of another dtype": list(_unequal("dtype", own, others, arrays)),
            "of another sharding": list(_misplaced(own, others, alive)),
            "not row-major (see jax.experimental.layout)": [
                f"{path}: {others[path].format.layout}" for path in alive if not _is_row_major(others[path])
            ],
        }
    if any(faults.values()):
        raise ValueError(
            f"the parameters given are not this model's: wanted {len(own)} arrays, got {len(others)}"
            + "".join(_listed(kind, lines) for kind, lines in faults.items() if lines)
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _is_row_major(leaf: Any) -> bool:
    layout = leaf.format.layout
    return layout is None or layout.major_to_minor == tuple(range(leaf.ndim))


def _about(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _unequal(
    field: str, own: Mapping[str, Any], others: Mapping[str, Any], paths: list[str]
) -> Iterator[str]:
    for path in paths:
        wanted, got = getattr(own[path], field), getattr(others[path], field, None)
        if got != wanted:
            yield f"{path}: wanted {wanted}, got {reprlib.repr(others[path]) if got is None else got}"


def _misplaced(own: Mapping[str, Any], others: Mapping[str, Any], paths: list[str]) -> Iterator[str]:
    for path in paths:
        wanted, got = own[path].sharding, others[path].sharding
        if own[path].shape == others[path].shape and not got.is_equivalent_to(wanted, len(own[path].shape)):
            yield f"{path}: wanted {_where(wanted)}, got {_where(got)}"


def _where(sharding: Any) -> str:
    spec = getattr(sharding, "spec", None)
    devices = ", ".join(str(device) for device in sorted(sharding.device_set, key=lambda own: own.id))
    kind = sharding.memory_kind
    return f"{'' if spec is None else f'{spec} '}on {devices}{'' if kind is None else f' ({kind})'}"


def _listed(kind: str, lines: list[str]) -> str:
    more = f"\n  and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else ""
    return f"\n{len(lines)} {kind}:" + "".join(f"\n  {line}" for line in lines[:MAX_NAMED]) + more
