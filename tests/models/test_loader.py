"""Filling parameters: what is wrong is listed at once, what is right equals numpy, sharded or not."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, HIDDEN, KV, GROUP, DIM, MLP, VOCAB = 3, 16, 2, 2, 4, 24, 10


def checkpoint_of(tensors: dict[str, np.ndarray]) -> Any:
    from pjengine.models.checkpoint import Checkpoint

    return Checkpoint(folder=Path("/ckpt"), tensors=tensors)


def make_tensors(dtype: Any = np.float32, prefix: str = "model.") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"{prefix}embed.weight": (VOCAB, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"{prefix}layers.{layer}.q.weight": (KV * GROUP * DIM, HIDDEN),
            f"{prefix}layers.{layer}.k.weight": (KV * DIM, HIDDEN),
            f"{prefix}layers.{layer}.v.weight": (KV * DIM, HIDDEN),
            f"{prefix}layers.{layer}.o.weight": (HIDDEN, KV * GROUP * DIM),
            f"{prefix}layers.{layer}.down.weight": (HIDDEN, MLP),
            f"{prefix}layers.{layer}.norm.weight": (HIDDEN,),
        }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make_table(**fields: Any) -> Any:
    from pjengine.models.loader import Leaf, Source, WeightTable

    def plain(name: str, **view: Any) -> Leaf:
        return Leaf(sources=(Source(name=name, **view),))

    qkv = Leaf(
        sources=tuple(
            Source(
                name=f"model.layers.{{layer}}.{name}.weight",
                reshape=(KV, width, DIM, HIDDEN),
                transpose=(3, 0, 1, 2),
            )
            for name, width in (("q", GROUP), ("k", 1), ("v", 1))
        ),
        concat_axis=2,
    )
    leaves = {
        "embed": plain("model.embed.weight"),
        "final_norm": plain("model.norm.weight"),
        "layers/attn/qkv": qkv,
        "layers/attn/out": plain(
            "model.layers.{layer}.o.weight", reshape=(HIDDEN, KV, GROUP, DIM), transpose=(1, 2, 3, 0)
        ),
        "layers/down": plain("model.layers.{layer}.down.weight", transpose=(1, 0)),
        "layers/norm": plain("model.layers.{layer}.norm.weight"),
    }
    return WeightTable(leaves=leaves, ignored=("*.inv_freq",), **fields)


def make_abstract(dtype: Any = jnp.float32) -> dict[str, Any]:
    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return {
        "embed": leaf(VOCAB, HIDDEN),
        "final_norm": leaf(HIDDEN),
        "layers": {
            "attn": {
                "qkv": leaf(LAYERS, HIDDEN, KV, GROUP + 2, DIM),
                "out": leaf(LAYERS, KV, GROUP, DIM, HIDDEN),
            },
            "down": leaf(LAYERS, MLP, HIDDEN),
            "norm": leaf(LAYERS, HIDDEN),
        },
    }


def with_numpy(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same parameters, written out."""

    def layer(i: int, name: str) -> np.ndarray:
        return tensors[f"model.layers.{i}.{name}.weight"]

    def qkv(i: int) -> np.ndarray:
        parts = [layer(i, name).reshape(KV, -1, DIM, HIDDEN) for name in "qkv"]
        return np.concatenate(parts, axis=1).transpose(3, 0, 1, 2)

    return {
        "embed": tensors["model.embed.weight"],
        "final_norm": tensors["model.norm.weight"],
        "layers": {
            "attn": {
                "qkv": np.stack([qkv(i) for i in range(LAYERS)]),
                "out": np.stack([layer(i, "o").T.reshape(KV, GROUP, DIM, HIDDEN) for i in range(LAYERS)]),
            },
            "down": np.stack([layer(i, "down").T for i in range(LAYERS)]),
            "norm": np.stack([layer(i, "norm") for i in range(LAYERS)]),
        },
    }


def load(tensors: dict[str, np.ndarray], abstract: dict[str, Any] | None = None, **options: Any) -> Any:
    from pjengine.models.loader import load_params

    table = options.pop("table", None) or make_table()
    return load_params(
        checkpoint_of(tensors), table, abstract or make_abstract(), num_layers=LAYERS, **options
    )


def assert_equal(got: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, wanted)  # raises where the structures differ too


def test_stacked_and_joined_parameters_equal_numpy() -> None:
    tensors = make_tensors()
    assert_equal(load(tensors), with_numpy(tensors))


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_casts_round_to_nearest_even(source: Any, target: Any) -> None:
    tensors = make_tensors(source)
    params = load(tensors, make_abstract(target))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(target)}
    assert_equal(params, jax.tree.map(lambda array: array.astype(target), with_numpy(tensors)))
    # Exactly between two bfloat16 numbers: to the even one, below and above.
    tensors["model.norm.weight"] = np.full(HIDDEN, 1 + 2.0**-8).astype(source)
    tensors["model.norm.weight"][1] = 1 + 3 * 2.0**-8
    if target == jnp.bfloat16 and source != ml_dtypes.bfloat16:
        norm = load(tensors, make_abstract(target))["final_norm"].astype(jnp.float32)
        assert norm[0] == 1 and norm[1] == 1 + 2.0**-6


def test_all_faults_are_listed_in_one_error_and_nothing_is_read() -> None:
    tensors = make_tensors()
    del tensors["model.layers.1.k.weight"], tensors["model.norm.weight"]
    tensors["model.layers.3.norm.weight"] = tensors["model.layers.0.norm.weight"]
    tensors["lm_head.weight"] = tensors["model.embed.weight"]
    tensors["model.layers.0.inv_freq"] = np.zeros(4)  # ignored
    tensors["model.embed.weight"] = tensors["model.embed.weight"][:-1]
    tensors["model.layers.2.down.weight"] = tensors["model.layers.2.down.weight"].T
    tensors["model.layers.2.o.weight"] = tensors["model.layers.2.o.weight"].reshape(8, 32)
    tensors["model.layers.2.q.weight"] = tensors["model.layers.2.q.weight"][:8]
    tensors["model.layers.2.norm.weight"] = tensors["model.layers.2.norm.weight"].astype(np.int32)
    with pytest.raises(ValueError) as caught:
        load(tensors)
    text = str(caught.value)
    for line in (
        "2 missing:",
        "model.layers.1.k.weight (for layers/attn/qkv (16, 2, 4, 4))",
        "model.norm.weight (for final_norm (16,))",
        "2 unexpected:",
        "model.layers.3.norm.weight (16,)",
        "lm_head.weight (10, 16)",
        "5 of the wrong shape or dtype:",
        "model.embed.weight: wanted (10, 16), got (9, 16)",
        "model.layers.2.down.weight: wanted (16, 24), got (24, 16)",
        "model.layers.2.o.weight: wanted a shape that splits into (16, 2, 2, 4), got (8, 32)",
        "model.layers.2.q.weight: wanted a shape that splits into (2, 2, 4, 16), got (8, 16)",
        "model.layers.2.norm.weight: wanted float64, float32, float16 or bfloat16, got int32",
    ):
        assert line in text, line
    assert "inv_freq" not in text


def test_joined_parts_must_add_up() -> None:
    from pjengine.models.loader import Leaf, Source, WeightTable, load_params

    leaf = Leaf(sources=(Source(name="a"), Source(name="b")))
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones((4, 3), np.float32)}
    table = WeightTable(leaves={"w": leaf})
    for rows in (6, 7):
        abstract = {"w": jax.ShapeDtypeStruct((rows, 3), jnp.float32)}
        if rows == 6:
            assert load_params(checkpoint_of(tensors), table, abstract, num_layers=1)["w"].shape == (6, 3)
            continue
        with pytest.raises(
            ValueError, match=r"a \+ b: wanted \(7, 3\) once joined along axis 0, got \(2, 3\) \+ \(4, 3\)"
        ):
            load_params(checkpoint_of(tensors), table, abstract, num_layers=1)


def test_table_that_differs_from_the_model_is_our_own_fault() -> None:
    abstract = make_abstract()
    abstract["head"] = abstract["embed"]
    with pytest.raises(RuntimeError, match="head"):
        load(make_tensors(), abstract)


@pytest.mark.parametrize("prefix", ["", "model.", "transformer.model."])
def test_prefixes_may_lack_or_be_there(prefix: str) -> None:
    table = make_table(prefixes=("model.", "transformer."))
    assert_equal(load(make_tensors(prefix=prefix), table=table), with_numpy(make_tensors()))


def test_sharded_parameters_equal_unsharded_and_each_device_holds_its_part() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    specs = {
        "embed": PartitionSpec("tensor"),
        "final_norm": PartitionSpec(),
        "layers": {
            "attn": {
                "qkv": PartitionSpec(None, None, "tensor"),
                "out": PartitionSpec(None, "tensor"),
            },
            "down": PartitionSpec(None, "tensor", None),
            "norm": PartitionSpec(),
        },
    }
    abstract = jax.tree.map(
        lambda struct, spec: struct.update(sharding=NamedSharding(mesh, spec)), make_abstract(), specs
    )
    tensors = make_tensors()
    params = load(tensors, abstract)
    assert_equal(params, with_numpy(tensors))
    for leaf, struct in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(struct.sharding, leaf.ndim)
    assert params["layers"]["attn"]["qkv"].addressable_shards[0].data.shape == (LAYERS, HIDDEN, 1, 4, DIM)


def test_shards_read_only_their_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine.models import loader

    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    read: list[tuple[int, ...]] = []
    original = jax.make_array_from_callback

    def recording(shape: Any, sharding: Any, callback: Any) -> Any:
        def read_and_record(index: Any) -> Any:
            part = callback(index)
            read.append(part.shape)
            return part

        return original(shape, sharding, read_and_record)

    monkeypatch.setattr(jax, "make_array_from_callback", recording)
    abstract = {
        "w": jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    }
    table = loader.WeightTable(
        leaves={"w": loader.Leaf(sources=(loader.Source(name="w", transpose=(1, 0)),))}
    )
    tensors = {"w": np.arange(24, dtype=np.float32).reshape(4, 6)}
    params = loader.load_params(checkpoint_of(tensors), table, abstract, num_layers=1)
    assert read == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(params["w"], tensors["w"].T)


def test_sharding_over_the_joined_axis_is_right_too() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    abstract = make_abstract()
    qkv = abstract["layers"]["attn"]["qkv"]
    spec = PartitionSpec(None, None, None, "tensor")
    abstract["layers"]["attn"]["qkv"] = qkv.update(sharding=NamedSharding(mesh, spec))
    replicated = NamedSharding(mesh, PartitionSpec())
    tensors = make_tensors()
    params = load(tensors, abstract, sharding=replicated)
    assert_equal(params, with_numpy(tensors))
    assert params["embed"].sharding.is_equivalent_to(replicated, 2)


def test_sharded_layer_axis_is_refused() -> None:
    mesh = Mesh(np.array(jax.devices()[:3]), ("layers",))
    abstract = make_abstract()
    norm = abstract["layers"]["norm"]
    abstract["layers"]["norm"] = norm.update(sharding=NamedSharding(mesh, PartitionSpec("layers")))
    with pytest.raises(NotImplementedError, match="layers/norm: the layer axis cannot be sharded"):
        load(make_tensors(), abstract, sharding=NamedSharding(mesh, PartitionSpec()))


def test_parameters_survive_the_rewriting_of_their_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from pjengine.models.checkpoint import open_checkpoint
    from pjengine.models.loader import load_params

    tensors = make_tensors()
    path = tmp_path / "model.safetensors"
    for padding in range(0, 64, 8):  # until XLA could use the mapped pages as they are
        save_file(tensors, path, metadata={"padding": " " * padding})
        checkpoint = open_checkpoint(tmp_path)
        if checkpoint.tensor("model.embed.weight").ctypes.data % 64 == 0:
            break
    params = load_params(checkpoint, make_table(), make_abstract(), num_layers=LAYERS)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal(params, with_numpy(tensors))


def test_dummy_parameters_look_normal_and_follow_the_seed() -> None:
    from pjengine.models.loader import dummy_params

    abstract = {
        "a": jax.ShapeDtypeStruct((64, 300), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((64, 300), jnp.float32),
        "layers": {"attn_norm": jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)},
    }
    params = dummy_params(abstract, 7)
    b = np.asarray(params["b"])
    assert abs(b.mean()) < 5e-4 and abs(b.std() - 0.02) < 5e-4 and np.abs(b).max() < 0.08
    assert abs(np.corrcoef(b[:-1].ravel(), b[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(b[:, :-1].ravel(), b[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(b.ravel(), np.asarray(params["a"], np.float32).ravel())[0, 1]) < 0.03
    assert (np.asarray(params["layers"]["attn_norm"]) == 1).all()
    assert_equal(params, dummy_params(abstract, 7))
    assert not np.array_equal(b, dummy_params(abstract, 8)["b"])
    assert dummy_params(abstract, -1)["b"].shape == b.shape


def test_dummy_parameters_do_not_depend_on_the_sharding() -> None:
    from pjengine.models.loader import dummy_params

    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    plain = {"w": jax.ShapeDtypeStruct((4, 6, 8), jnp.bfloat16)}
    spec = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    sharded = {"w": jax.ShapeDtypeStruct((4, 6, 8), jnp.bfloat16, sharding=spec)}
    assert_equal(dummy_params(plain, 3), dummy_params(sharded, 3))
    assert dummy_params(sharded, 3)["w"].sharding.is_equivalent_to(spec, 3)


def test_dummy_parameters_need_no_temporaries() -> None:
    from pjengine.models import loader

    struct = jax.ShapeDtypeStruct((8, 256, 256), jnp.bfloat16)
    compiled = jax.jit(lambda seed: loader._dummy("w", struct, seed)).lower(np.uint32(0)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < struct.size * 2 / 8


def load_one(leaf: Any, tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    from pjengine.models.loader import WeightTable, load_params

    abstract = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    table = WeightTable(leaves={"w": leaf})
    return np.asarray(load_params(checkpoint_of(tensors), table, abstract, num_layers=1)["w"])


def grid(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def fused_config(**fields: Any) -> Any:
    from dataclasses import replace

    from pjengine.models.shapes import SHAPES

    sizes: Any = {"hidden_size": HIDDEN, "num_heads": KV * GROUP, "num_kv_heads": KV, "head_dim": DIM}
    return replace(SHAPES["tiny"], rope=None, qkv_bias=True, **sizes, **fields)


@pytest.mark.parametrize("is_conv", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "groups"])
def test_fused_queries_keys_and_values_are_taken_apart(layout: Any, is_conv: bool) -> None:
    from pjengine.models import layouts

    rows = (KV * GROUP + 2 * KV) * DIM
    leaves = layouts.fused_qkv(fused_config(), "qkv", layout, is_conv=is_conv)
    weight, bias = grid(rows, HIDDEN), grid(rows)
    if layout == "groups":
        wanted = weight.reshape(KV, GROUP + 2, DIM, HIDDEN)
        wanted_bias = bias.reshape(KV, GROUP + 2, DIM)
    else:
        ends = [0, KV * GROUP * DIM, KV * (GROUP + 1) * DIM, rows]
        parts = [slice(*ends[i : i + 2]) for i in range(3)]
        wanted = np.concatenate([weight[part].reshape(KV, -1, DIM, HIDDEN) for part in parts], axis=1)
        wanted_bias = np.concatenate([bias[part].reshape(KV, -1, DIM) for part in parts], axis=1)
    tensors = {"qkv.weight": weight.T if is_conv else weight}
    found = load_one(leaves["layers/qkv"], tensors, (HIDDEN, KV, GROUP + 2, DIM))
    np.testing.assert_array_equal(found, wanted.transpose(3, 0, 1, 2))
    found = load_one(leaves["layers/qkv_bias"], {"qkv.bias": bias}, (KV, GROUP + 2, DIM))
    np.testing.assert_array_equal(found, wanted_bias)


def test_a_fused_tensor_of_another_size_is_refused() -> None:
    from pjengine.models import layouts

    leaf = layouts.fused_qkv(fused_config(), "qkv", "blocks")["layers/qkv"]
    with pytest.raises(ValueError, match=r"qkv.weight: wanted 32 along axis 0, got \(48, 16\)"):
        load_one(leaf, {"qkv.weight": grid(48, HIDDEN)}, (HIDDEN, KV, GROUP + 2, DIM))


def test_gates_and_ups_in_one_tensor_are_taken_apart() -> None:
    from pjengine.models import layouts

    config = fused_config(intermediate_size=MLP, mlp_bias=True)
    leaves = layouts.fused_gated_mlp(config, "gate_up", "down")
    weight, bias = grid(2 * MLP, HIDDEN), grid(2 * MLP)
    found = load_one(leaves["layers/gate_up"], {"gate_up.weight": weight}, (HIDDEN, 2, MLP))
    np.testing.assert_array_equal(found[:, 1], weight[MLP:].T)
    found = load_one(leaves["layers/gate_up_bias"], {"gate_up.bias": bias}, (2, MLP))
    np.testing.assert_array_equal(found[0], bias[:MLP])


@pytest.mark.parametrize("num_paired", [DIM, DIM - 2])
def test_paired_heads_are_rotated_as_if_in_pairs(num_paired: int) -> None:
    """GPT-J rotates dimensions 2i and 2i + 1: the same scores as ours, once the rows are in order."""
    from pjengine.models import layouts
    from pjengine.pallas_kernels.rope_kv_write import rotate

    rng = np.random.default_rng(0)
    tensors = {
        f"attn.{name}.{kind}": rng.standard_normal((heads * DIM, *tail)).astype(np.float32)
        for name, heads in (("q", KV * GROUP), ("k", KV), ("v", KV))
        for kind, tail in (("weight", (HIDDEN,)), ("bias", ()))
    }
    leaves = layouts.separate_qkv(fused_config(), "attn", ("q", "k", "v"), num_paired)
    weights = {name: array for name, array in tensors.items() if name.endswith("weight")}
    biases = {name: array for name, array in tensors.items() if name.endswith("bias")}
    qkv = load_one(leaves["layers/qkv"], weights, (HIDDEN, KV, GROUP + 2, DIM))
    bias = load_one(leaves["layers/qkv_bias"], biases, (KV, GROUP + 2, DIM))

    x = rng.standard_normal((5, HIDDEN)).astype(np.float32)
    angle = (
        np.arange(5, dtype=np.float32)[:, None] * np.array([1.0, 0.1], np.float32)[None, : num_paired // 2]
    )
    cos, sin = np.cos(angle), np.sin(angle)
    ours = np.einsum("te,ehgd->thgd", x, qkv) + bias
    table = jnp.asarray(cos), jnp.asarray(sin)
    q = np.asarray(rotate(jnp.asarray(ours[:, :, :GROUP].reshape(5, -1, DIM)), *table))
    k = np.asarray(rotate(jnp.asarray(ours[:, :, GROUP]), *table))

    def paired(name: str) -> np.ndarray:
        out = (x @ tensors[f"attn.{name}.weight"].T + tensors[f"attn.{name}.bias"]).reshape(5, -1, DIM)
        even, odd = out[..., 0:num_paired:2], out[..., 1:num_paired:2]
        c, s = cos[:, None], sin[:, None]
        turned = np.stack([even * c - odd * s, odd * c + even * s], axis=-1).reshape(5, -1, num_paired)
        return np.concatenate([turned, out[..., num_paired:]], axis=-1)

    wanted = np.einsum("qhgd,khd->hgqk", paired("q").reshape(5, KV, GROUP, DIM), paired("k"))
    found = np.einsum("qhgd,khd->hgqk", q.reshape(5, KV, GROUP, DIM), k)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    value = x @ tensors["attn.v.weight"].T + tensors["attn.v.bias"]
    np.testing.assert_allclose(ours[:, :, GROUP + 1], value.reshape(5, KV, DIM), rtol=1e-5, atol=1e-5)


def test_rows_are_brought_to_unit_length() -> None:
    from pjengine.models.loader import Leaf, Source

    table = np.random.default_rng(0).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    found = load_one(Leaf(sources=(Source(name="head", has_unit_rows=True),)), {"head": table}, table.shape)
    wanted = table / np.linalg.norm(table, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
