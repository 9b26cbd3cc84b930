"""Which axis of a parameter is divided among the devices of the `tensor` axis: one table for all models."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pjengine.sharding.mesh import TENSOR

# By a parameter's own name, the axis that is divided, counted from the last; what is not named is on every
# device. Products that read the residual stream are divided by their outputs, those that add to it by their
# inputs.
DIVIDED = {
    "embed": -2,
    "head": -2,
    "head_bias": -1,
    "qkv": -3,
    "qkv_bias": -3,
    "sinks": -1,
    "out": -4,
    "gate_up": -1,
    "gate_up_bias": -1,
    "up": -1,
    "up_bias": -1,
    "down": -2,
    "expert_gate_up": -1,
    "expert_gate_up_bias": -1,
    "expert_down": -2,
}
# The same where each device has whole experts.
WHOLE_EXPERTS = {
    "expert_gate_up": -4,
    "expert_gate_up_bias": -3,
    "expert_down": -3,
    "expert_down_bias": -2,
}
_NORMS_OF_HEADS = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")

KV_PAGES = PartitionSpec(None, TENSOR)  # [pages, kv_heads, ...]


def partition(path: str, num_axes: int, *, has_whole_experts: bool = False) -> PartitionSpec:
    """How a parameter is divided.

    Args:
      path: such as "layers/qkv"; one with a slash has an axis for layers in front.
      has_whole_experts: whether a device has some experts whole, and not a part of each.
    """
    stack, _, name = path.rpartition("/")
    if name in _NORMS_OF_HEADS:  # [head_dim] for all heads together, or heads and more in front
        num_own = num_axes - bool(stack)
        axis = None if num_own == 1 else -num_own
    else:
        axis = ({**DIVIDED, **WHOLE_EXPERTS} if has_whole_experts else DIVIDED).get(name)
    return PartitionSpec(*(TENSOR if i - num_axes == axis else None for i in range(num_axes)))


def copied(params: Any, mesh: Mesh) -> Any:
    """The same parameters on other devices, divided alike; each part goes from device to device."""

    def copy(leaf: jax.Array) -> jax.Array:
        assert isinstance(leaf.sharding, NamedSharding)
        target = dict(zip(leaf.sharding.mesh.devices.flat, mesh.devices.flat, strict=True))
        parts = [jax.device_put(shard.data, target[shard.device]) for shard in leaf.addressable_shards]
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(copy, params)


def placed(params: Any, mesh: Mesh | AbstractMesh, *, has_whole_experts: bool = False) -> Any:
    """Shapes and dtypes of parameters, and with them how they are divided."""

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name, num_axes = jax.tree_util.keystr(path, simple=True, separator="/"), len(leaf.shape)
        spec = partition(name, num_axes, has_whole_experts=has_whole_experts)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)
