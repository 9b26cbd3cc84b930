"""Checkpoint tensors into the parameters of a model, by a table: nothing missing, nothing left over."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, UInt32

from pjengine.models.checkpoint import Checkpoint
from pjengine.models.parameters import by_path, from_paths
from pjengine.models.weight_table import Cut as Cut
from pjengine.models.weight_table import Leaf as Leaf
from pjengine.models.weight_table import Names, Target, check
from pjengine.models.weight_table import Source as Source
from pjengine.models.weight_table import WeightTable as WeightTable

# One parameter's tensors in one layer, turned nowhere: expert by expert, each in the order of its sources.
type Parts = tuple[tuple[Array, ...], ...]
# A parameter's own name, and what the checkpoint holds of it in one layer, to how it is stored.
type Widen = Callable[[str, Array], Array]
type Show = Callable[[int, int], None]  # is told how many layers are done, and how many there are


def load_params(
    checkpoint: Checkpoint,
    table: WeightTable,
    abstract: Mapping[str, Any],
    *,
    num_layers: int,
    sharding: Sharding | None = None,
    stored: Mapping[str, Any] | None = None,
    widen: Widen | None = None,
    show: Show = lambda num_done, num_layers: None,
) -> dict[str, Any]:
    """Fills the parameters described by `abstract` from a checkpoint, casting to their dtypes.

    Tensors travel to the devices as the checkpoint has them, each device reading its part of the mapped file,
    and are turned, joined and cast there: the host copies nothing. Stacked parameters are allocated once and
    filled in place, two layers at most under way.

    Args:
      abstract: nested dicts of jax.ShapeDtypeStruct: what the checkpoint holds.
      sharding: of those whose struct has none; None: the default device. Layers cannot be sharded.
      stored: with the shapes and shardings that the parameters are to have; None: `abstract`.
      widen: makes those of another shape, a layer at a time; of these every device reads all.
      show: is told how many layers are under way to the device, and how many there are.

    Raises:
      ValueError: tensors are missing, left over, of the wrong shape or not floating point; the text lists all
        of them. Nothing has been read by then but names, shapes and dtypes.
    """
    structs = by_path(abstract)
    if set(structs) != set(table.leaves):
        raise RuntimeError(f"the table and the model differ in {sorted(set(structs) ^ set(table.leaves))}")
    stored_structs = structs if stored is None else by_path(stored)
    targets = [
        _target(path, table, struct, stored_structs[path], num_layers, sharding)
        for path, struct in structs.items()
    ]
    names_of = Names(checkpoint, table.prefixes)
    check(checkpoint, table, targets, names_of, num_layers)

    fetch = partial(_fetch, checkpoint, names_of)
    params = {t.path: _assemble(fetch(t, 0), t, widen) for t in targets if not t.leaf.is_stacked}
    stacked = [t for t in targets if t.leaf.is_stacked]
    if stacked:
        shardings = {t.path: t.stored_sharding for t in stacked}
        stacks = _zeros({path: stored_structs[path] for path in shardings}, shardings)
        run = partial(_fill, targets=stacked, widen=widen)
        fill = jax.jit(run, donate_argnums=0, out_shardings=shardings)
        for layer in range(num_layers):
            own = [t for t in stacked if layer in t.layers]
            parts = {t.path: fetch(t, layer) for t in own}
            places = {t.path: np.int32(t.layers.index(layer)) for t in own}
            jax.block_until_ready(stacks)  # or the host would run ahead and fill the device with parts
            stacks = fill(stacks, parts, places)
            show(layer + 1, num_layers)
        params |= stacks
    return from_paths(abstract, params)


def dummy_params(abstract: Mapping[str, Any], seed: int, sharding: Sharding | None = None) -> dict[str, Any]:
    """Makes random parameters on the devices: close to normal(0, 0.02), norm weights 1.

    Each element is a hash of the seed, its parameter's path and its own index: one fused pass without
    temporaries, and the same numbers under every sharding and on every device.
    """
    structs = by_path(abstract)
    shardings = {path: _given_sharding(struct, sharding) for path, struct in structs.items()}

    def make(seed: UInt32[Array, ""]) -> dict[str, Array]:
        return {path: _dummy(path, struct, seed) for path, struct in structs.items()}

    params = jax.jit(make, out_shardings=shardings)(np.uint32(seed % 2**32))
    return from_paths(abstract, params)


def _dummy(path: str, struct: Any, seed: UInt32[Array, ""]) -> Array:
    if path.endswith("norm"):
        return jnp.ones(struct.shape, struct.dtype)

    def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        """Every input bit flips every output bit with probability near 1/2. Source: Wellons, lowbias32."""
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    state = jnp.broadcast_to(mix(seed ^ np.uint32(zlib.crc32(path.encode()))), struct.shape)
    for axis in range(len(struct.shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, struct.shape, axis)
        state = mix(state + (index + np.uint32(1)) * np.uint32(0x9E3779B9))
    # The sum of four bytes: mean 510, variance 4 × (256² − 1) / 12, and exact, so the same on every device.
    low, high = state & np.uint32(0x00FF00FF), (state >> np.uint32(8)) & np.uint32(0x00FF00FF)
    pairs = low + high  # two sums of two bytes, 16 bits apart
    total = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    scale = np.float32(0.02 / math.sqrt((256**2 - 1) / 3))
    return ((total.astype(jnp.float32) - np.float32(510)) * scale).astype(struct.dtype)


def _target(
    path: str, table: WeightTable, struct: Any, stored: Any, num_layers: int, sharding: Sharding | None
) -> Target:
    leaf, given = table.leaves[path], _given_sharding(stored, sharding)
    is_widened = stored.shape != struct.shape
    if not leaf.is_stacked:
        return Target(
            path=path,
            leaf=leaf,
            shape=struct.shape,
            dtype=struct.dtype,
            sharding=_on_every_device(given) if is_widened else given,
            stored_sharding=given,
            is_widened=is_widened,
        )
    layers, num_before = table.layers_of(path, num_layers), 1 + leaf.has_experts
    if struct.shape[0] != len(layers):
        raise ValueError(f"{path} must have {len(layers)} layers in front, got shape {struct.shape}")
    expert_axis, num_groups = None, 1
    if isinstance(given, NamedSharding):
        if given.spec and given.spec[0] is not None:
            raise NotImplementedError(f"{path}: the layer axis cannot be sharded, got {given.spec}")
        if leaf.has_experts and not is_widened and len(given.spec) > 1 and given.spec[1] is not None:
            expert_axis = given.spec[1]
            num_groups = given.mesh.shape[expert_axis]
        inner: Sharding = NamedSharding(given.mesh, PartitionSpec(*given.spec[num_before:]))
    elif isinstance(given, SingleDeviceSharding):
        inner = given
    else:
        raise NotImplementedError(f"{path}: wanted a NamedSharding or SingleDeviceSharding, got {given}")
    return Target(
        path=path,
        leaf=leaf,
        shape=struct.shape[num_before:],
        dtype=struct.dtype,
        sharding=_on_every_device(inner) if is_widened else inner,
        stored_sharding=given,
        is_widened=is_widened,
        layers=layers,
        num_experts=struct.shape[1] if leaf.has_experts else None,
        expert_axis=expert_axis,
        num_groups=num_groups,
    )


def _fetch(checkpoint: Checkpoint, names_of: Names, target: Target, layer: int) -> Parts:
    """Begins to send one parameter's tensors of a layer to the devices.

    Of experts in groups the first of every group go together, then the second, and so on.
    """
    names = target.names(names_of, layer)
    num_own = len(names) // target.num_groups
    return tuple(
        tuple(
            _put([checkpoint.tensor(own[i]) for own in names[place::num_own]], source, target)
            for i, source in enumerate(target.leaf.sources)
        )
        for place in range(num_own)
    )


def _zeros(structs: Mapping[str, Any], shardings: Mapping[str, Sharding]) -> dict[str, Array]:
    make = {path: partial(jnp.zeros, struct.shape, struct.dtype) for path, struct in structs.items()}
    return jax.jit(lambda: {path: zeros() for path, zeros in make.items()}, out_shardings=dict(shardings))()


def _on_every_device(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _given_sharding(struct: Any, sharding: Sharding | None) -> Sharding:
    return struct.sharding or sharding or jnp.zeros(()).sharding  # the last: the default device's


def _put(tensors: Sequence[np.ndarray], source: Source, target: Target) -> Array:
    """Sends a tensor to the devices, cut and reshaped but not yet transposed.

    Where there is one for each group of experts, their group is the first axis, and a device reads its own.
    """
    views = [_view(tensor, source) for tensor in tensors]
    shape, sharding, is_grouped = views[0].shape, target.sharding, target.num_groups > 1
    if isinstance(sharding, NamedSharding):
        spec = _source_spec(sharding.spec, source, target)
        if is_grouped:
            shape, spec = (len(views), *shape), PartitionSpec(target.expert_axis, *spec)
        sharding = NamedSharding(sharding.mesh, spec)
    # XLA on a CPU would use the mapped pages in place, and crash when somebody rewrites the file.
    devices: set[Any] = sharding.device_set
    must_copy = any(device.platform == "cpu" for device in devices)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        if is_grouped:
            assert index is not None
            group, *rest = index
            part = views[group.start][tuple(rest)][None]
        else:
            part = views[0] if index is None else views[0][index]
        if part.dtype == np.float64:  # JAX would round it to float32 first
            return part.astype(target.dtype)
        return part.copy() if must_copy else part

    return jax.make_array_from_callback(shape, sharding, read)


def _view(tensor: np.ndarray, source: Source) -> np.ndarray:
    if source.cut is not None:
        tensor = tensor[(slice(None),) * source.cut.axis + (slice(source.cut.start, source.cut.stop),)]
    return tensor if source.reshape is None else tensor.reshape(source.reshape)


def _source_spec(spec: PartitionSpec, source: Source, target: Target) -> PartitionSpec:
    """The target's partition seen from before the transpose: each device reads just what it will keep.

    Along the axis of a concatenation the parts' borders are not the shards', so there every device reads all.
    """
    if target.leaf.unpack is not None:
        return PartitionSpec(*spec[:1])
    rank = len(target.shape)
    axes = [*spec, *[None] * (rank - len(spec))]
    if len(target.leaf.sources) > 1:
        axes[target.leaf.concat_axis] = None
    order = source.transpose or range(rank)
    before: list[Any] = [None] * rank
    for to, come_from in enumerate(order):
        before[come_from] = axes[to]
    return PartitionSpec(*before)


def _stored(parts: Parts, target: Target, widen: Widen | None) -> Float[Array, "..."]:
    turned = _turned(parts, target)
    if not target.is_widened:
        return turned
    assert widen is not None, f"{target.path} is stored in another shape"
    return widen(target.path.rpartition("/")[2], turned)


def _turned(parts: Parts, target: Target) -> Float[Array, "..."]:
    if target.leaf.unpack is not None:
        [only] = parts
        return target.leaf.unpack(only, target.dtype)
    # Experts are put together before they are turned, all at once.
    num_before = 0 if target.num_experts is None else 1
    joined = [_stacked(same, target) if num_before else same[0] for same in zip(*parts, strict=True)]
    pairs = zip(joined, target.leaf.sources, strict=True)
    turned = [_turn(part, source, num_before).astype(target.dtype) for part, source in pairs]
    return jnp.concatenate(turned, target.leaf.concat_axis + num_before) if len(turned) > 1 else turned[0]


def _stacked(parts: tuple[Array, ...], target: Target) -> Float[Array, "experts ..."]:
    """Experts in their order, as `_fetch` has put them together."""
    if target.num_groups == 1:
        return jnp.stack(parts)
    whole = jnp.stack(parts, axis=1)
    return whole.reshape(-1, *whole.shape[2:])


def _turn(part: Array, source: Source, num_before: int) -> Float[Array, "..."]:
    if source.transpose is not None:
        before = range(num_before)
        part = part.transpose(*before, *(axis + num_before for axis in source.transpose))
    if source.num_paired:
        paired, rest = part[..., : source.num_paired], part[..., source.num_paired :]
        part = jnp.concatenate([paired[..., 0::2], paired[..., 1::2], rest], axis=-1)
    if source.has_unit_rows:
        wide = part.astype(jnp.float32)
        part = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return part


def _assemble(parts: Parts, target: Target, widen: Widen | None) -> Array:
    [(first, *others)] = parts
    is_plain = not others and target.leaf.sources[0].is_plain and not target.is_widened
    if is_plain and first.dtype == target.dtype:
        return first
    make = partial(_stored, target=target, widen=widen)
    return jax.jit(make, out_shardings=target.stored_sharding)(parts)


def _fill(
    stacks: dict[str, Array],
    parts: dict[str, Parts],
    places: dict[str, Array],
    *,
    targets: list[Target],
    widen: Widen | None,
) -> dict[str, Array]:
    """Writes one layer of the stacked parameters that it has, in place."""
    return stacks | {
        t.path: jax.lax.dynamic_update_index_in_dim(
            stacks[t.path], _stored(parts[t.path], t, widen), places[t.path], axis=0
        )
        for t in targets
        if t.path in parts
    }
