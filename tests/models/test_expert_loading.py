"""Filling parameters of experts, of layers that differ, and of packed numbers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjengine.models.checkpoint import Checkpoint
from pjengine.models.loader import load_params
from pjengine.models.weight_table import Leaf, Source, WeightTable

LAYERS, EXPERTS, HIDDEN, INNER = 3, 4, 6, 8
DENSE = (1,)
OTHERS = (0, 2)


def half(name: str) -> Source:
    return Source(
        name=f"layers.{{layer}}.experts.{{expert}}.{name}",
        reshape=(1, INNER, HIDDEN),
        transpose=(2, 0, 1),
    )


TABLE = WeightTable(
    leaves={
        "layers/gate_up": Leaf(sources=(half("gate"), half("up")), concat_axis=1),
        "layers/down": Leaf(sources=(Source(name="layers.{layer}.experts.{expert}.down", transpose=(1, 0)),)),
        "layers/norm": Leaf(sources=(Source(name="layers.{layer}.norm"),)),
        "dense_layers/norm": Leaf(sources=(Source(name="layers.{layer}.norm"),)),
        "dense_layers/up": Leaf(sources=(Source(name="layers.{layer}.up"),)),
    },
    stacks={"layers": OTHERS, "dense_layers": DENSE},
)


def make_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {f"layers.{layer}.norm": (HIDDEN,) for layer in range(LAYERS)}
    shapes |= {f"layers.{layer}.up": (HIDDEN, INNER) for layer in DENSE}
    for layer in OTHERS:
        for expert in range(EXPERTS):
            name = f"layers.{layer}.experts.{expert}"
            shapes |= {f"{name}.gate": (INNER, HIDDEN), f"{name}.up": (INNER, HIDDEN)}
            shapes |= {f"{name}.down": (HIDDEN, INNER)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_abstract() -> Any:
    shapes = {
        "layers": {
            "gate_up": (len(OTHERS), EXPERTS, HIDDEN, 2, INNER),
            "down": (len(OTHERS), EXPERTS, INNER, HIDDEN),
            "norm": (len(OTHERS), HIDDEN),
        },
        "dense_layers": {"norm": (len(DENSE), HIDDEN), "up": (len(DENSE), HIDDEN, INNER)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def load(tensors: dict[str, np.ndarray], table: WeightTable, abstract: Any, **options: Any) -> Any:
    checkpoint = Checkpoint(folder=Path("/ckpt"), tensors=tensors)
    return load_params(checkpoint, table, abstract, num_layers=LAYERS, **options)


def with_numpy(tensors: dict[str, np.ndarray]) -> Any:
    def experts(name: str) -> np.ndarray:
        return np.array(
            [[tensors[f"layers.{i}.experts.{j}.{name}"].T for j in range(EXPERTS)] for i in OTHERS]
        )

    def layers(numbers: tuple[int, ...], name: str) -> np.ndarray:
        return np.array([tensors[f"layers.{i}.{name}"] for i in numbers])

    return {
        "layers": {
            "gate_up": np.stack([experts("gate"), experts("up")], axis=3),
            "down": experts("down"),
            "norm": layers(OTHERS, "norm"),
        },
        "dense_layers": {"norm": layers(DENSE, "norm"), "up": layers(DENSE, "up")},
    }


def test_experts_and_layers_that_differ_are_stacked() -> None:
    tensors = make_tensors()
    params = load(tensors, TABLE, make_abstract())
    jax.tree.map(np.testing.assert_array_equal, params, with_numpy(tensors))


@pytest.mark.parametrize("spec", [(None, "x"), (None, None, "x"), (None, None, None, None, "x")])
def test_sharded_experts_equal_unsharded(spec: tuple[str | None, ...]) -> None:
    """Over the experts, over the rows of their weights, and over the columns."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    abstract, tensors = make_abstract(), make_tensors()
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    abstract["layers"]["gate_up"] = abstract["layers"]["gate_up"].update(sharding=sharding)
    params = load(tensors, TABLE, abstract, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.tree.map(np.testing.assert_array_equal, params, with_numpy(tensors))
    assert params["layers"]["gate_up"].sharding.is_equivalent_to(sharding, 5)


class Counting(np.ndarray):
    """Counts the bytes that are read of its kind."""

    num_bytes = 0

    def copy(self, order: Any = "C") -> "Counting":
        Counting.num_bytes += self.nbytes
        return super().copy(order)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_each_device_reads_only_its_own_experts(num_devices: int) -> None:
    mesh, tensors = Mesh(np.array(jax.devices()[:num_devices]), ("x",)), make_tensors()
    counted = {name: own.view(Counting) if ".experts." in name else own for name, own in tensors.items()}
    abstract, everywhere = make_abstract(), NamedSharding(mesh, PartitionSpec())
    for name in ("gate_up", "down"):
        sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
        abstract["layers"][name] = abstract["layers"][name].update(sharding=sharding)
    Counting.num_bytes = 0
    params = load(counted, TABLE, abstract, sharding=everywhere)
    assert Counting.num_bytes == sum(own.nbytes for name, own in tensors.items() if ".experts." in name)
    jax.tree.map(np.testing.assert_array_equal, params, with_numpy(tensors))


def test_what_is_wrong_with_one_expert_is_named() -> None:
    tensors = make_tensors()
    del tensors["layers.0.experts.3.up"]
    tensors["layers.1.experts.0.up"] = tensors["layers.2.experts.0.up"]
    tensors["layers.2.experts.1.down"] = tensors["layers.2.experts.1.down"].T
    with pytest.raises(ValueError) as caught:
        load(tensors, TABLE, make_abstract())
    for line in (
        "1 missing:\n  layers.0.experts.3.up (for layers/gate_up (6, 2, 8))",
        "1 unexpected:\n  layers.1.experts.0.up (8, 6)",
        "layers.2.experts.1.down: wanted (6, 8), got (8, 6)",
    ):
        assert line in str(caught.value), line


def add(parts: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
    low, high = (part.astype(dtype) for part in parts)
    return low + 256 * high


PACKED = WeightTable(
    leaves={
        "layers/w": Leaf(
            sources=tuple(Source(name=f"{{layer}}.{name}", reshape=(2, 3)) for name in ("low", "high")),
            unpack=add,
        )
    }
)


def packed_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = [f"{layer}.{name}" for layer in range(LAYERS) for name in ("low", "high")]
    return {name: rng.integers(0, 256, 6).astype(np.uint8) for name in names}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_packed_tensors_become_what_they_stand_for(num_devices: int) -> None:
    tensors = packed_tensors()
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    abstract = {"layers": {"w": jax.ShapeDtypeStruct((LAYERS, 2, 3), jnp.float32, sharding=sharding)}}
    Counting.num_bytes = 0
    counted: dict[str, np.ndarray] = {name: own.view(Counting) for name, own in tensors.items()}
    found = load(counted, PACKED, abstract)["layers"]["w"]
    assert Counting.num_bytes == sum(own.nbytes for own in tensors.values())  # each device its own
    wanted = [tensors[f"{i}.low"] + 256.0 * tensors[f"{i}.high"] for i in range(LAYERS)]
    np.testing.assert_array_equal(found, np.reshape(wanted, (LAYERS, 2, 3)))


def test_packed_tensors_of_another_dtype_or_shape_are_refused() -> None:
    tensors = packed_tensors()
    tensors["0.low"] = tensors["0.low"].astype(np.float32)
    tensors["1.high"] = tensors["1.high"][:5]
    abstract = {"layers": {"w": jax.ShapeDtypeStruct((LAYERS, 2, 3), jnp.float32)}}
    with pytest.raises(ValueError) as caught:
        load(tensors, PACKED, abstract)
    text = "wanted uint8 of a shape that splits into (2, 3), got"
    assert f"0.low: {text} float32 (6,)" in str(caught.value)
    assert f"1.high: {text} uint8 (5,)" in str(caught.value)
