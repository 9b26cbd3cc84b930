"""Parameters under Hugging Face's names, and back: every architecture, whole and divided among devices."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.hf_names import from_hf, to_hf
from pjengine.models.llama import Llama
from pjengine.models.parameters import by_path
from pjengine.models.registry import build_model, parse_config
from pjengine.models.weight_table import Cut, Leaf, Source, WeightTable
from pjengine.sharding.mesh import make_mesh
from tests.golden import golden as goldens
from tests.models.test_architectures import CASES, FLOAT32
from tests.models.test_mxfp4 import make_checkpoints
from tests.models.test_share import EACH, ODD

# One of each layout: tensors fused, by blocks or by heads, or apart; Conv1D; pairs; norms of heads; experts.
LAYOUTS = (
    "mha bloom gpt2 gpt_bigcode gptj mpt opt_post_norm phi3 stablelm olmo2 qwen3_moe_dense_layers gpt_oss"
)
# Of divided models: KV heads that are repeated, padded, or have uneven queries; norms of heads; experts.
DIVIDED = ["mqa", "bloom_6_heads", "cohere_qk_norm", "mpt_qk_ln", "mixtral", "gpt_oss"]
UNIT_ROWS = "baichuan2"  # whose output layer has rows of length one: equal but for rounding


def assert_same(found: Any, wanted: Any, name: str) -> None:
    one, other = by_path(found), by_path(wanted)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        check: Any = np.testing.assert_array_equal
        if path == "head" and name.startswith(UNIT_ROWS):
            check = partial(np.testing.assert_allclose, rtol=1e-6)
        check(np.asarray(leaf, np.float32), np.asarray(other[path], np.float32), err_msg=path)


def some(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """The others are more of the same: CI has one case of each architecture, and those that do not divide."""

    def mark(name: str) -> pytest.MarkDecorator:
        return pytest.mark.slow if name in (*EACH, *ODD) else pytest.mark.sweep

    return [name if name in quick else pytest.param(name, marks=mark(name)) for name in names]


def assert_tensors(found: Any, golden: goldens.Golden) -> None:
    """Those of the golden checkpoint, bit for bit; but for the rows of Baichuan 2's output layer."""
    weights = golden.weights()
    assert {key: array.shape for key, array in found.items()} == golden.shapes
    for key, array in found.items():
        wanted = weights[key]
        if key == "lm_head.weight" and golden.name.startswith(UNIT_ROWS):
            wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
            np.testing.assert_allclose(array, wanted, rtol=1e-5)
        else:
            np.testing.assert_array_equal(array, wanted, err_msg=key)


@pytest.mark.parametrize("name", some(CASES, [*LAYOUTS.split(), "baichuan2_7b"]))
def test_a_checkpoints_tensors_come_back_as_they_were(name: str) -> None:
    golden = goldens.load(name)
    model = build_model(parse_config(golden.config), FLOAT32)
    params = from_hf(model, golden.weights())
    found = to_hf(model, params)
    assert_tensors(found, golden)
    if name.startswith(UNIT_ROWS):
        assert_same(from_hf(model, found), params, name)


@pytest.mark.parametrize("name", some([*EACH, *ODD], DIVIDED))
def test_padding_and_repeated_heads_are_left_out(name: str) -> None:
    golden = goldens.load(name)
    model, mesh = build_model(parse_config(golden.config), FLOAT32, 4), make_mesh(jax.devices()[:4])
    assert_tensors(to_hf(model, from_hf(model, golden.weights(), mesh=mesh)), golden)


def test_whole_experts_of_several_devices_are_written_without_padding() -> None:
    golden = goldens.load("mixtral")
    config = parse_config(golden.config)
    assert config.experts is not None
    experts = dataclasses.replace(config.experts, is_whole=True)
    model = build_model(dataclasses.replace(config, experts=experts), FLOAT32, 4)
    params = from_hf(model, golden.weights(), mesh=make_mesh(jax.devices()[:4]))
    assert params["layers"]["expert_down"].shape[1] > config.experts.num_experts
    for key, array in to_hf(model, params).items():
        np.testing.assert_array_equal(array, golden.weights()[key], err_msg=key)


def test_packed_experts_are_written_unpacked_and_read_again(tmp_path: Path) -> None:
    _, config = make_checkpoints(tmp_path)
    model = build_model(parse_config(config), FLOAT32)
    params = from_hf(model, open_checkpoint(tmp_path / "packed").tensors)
    found, wanted = to_hf(model, params), open_checkpoint(tmp_path / "plain").tensors
    assert found.keys() == wanted.keys()
    for key, array in found.items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
    assert_same(from_hf(model, found), params, "gpt_oss")


def test_bfloat16_stays_bfloat16_and_arrays_of_jax_are_taken() -> None:
    golden = goldens.load("gqa")
    model = build_model(parse_config(golden.config), jnp.dtype("bfloat16"))
    params = from_hf(model, {key: jnp.asarray(array) for key, array in golden.weights().items()})
    found = to_hf(model, params)
    assert {array.dtype for array in found.values()} == {np.dtype(jnp.bfloat16)}
    assert_same(from_hf(model, found), params, "gqa")


class OneMatrix(Llama):
    """Llama whose gate, up and norm lie in one tensor: several parameters are cut from it."""

    def weight_table(self) -> WeightTable:
        c, table = self.config, super().weight_table()
        e, i, name = c.hidden_size, c.intermediate_size, "model.layers.{layer}.all"
        halves = tuple(
            Source(
                name=name,
                shape=(2 * i + 1, e),
                cut=Cut(start=k * i, stop=(k + 1) * i, size=2 * i + 1),
                reshape=(1, i, e),
                transpose=(2, 0, 1),
            )
            for k in (0, 1)
        )
        norm = Source(
            name=name,
            shape=(2 * i + 1, e),
            cut=Cut(start=2 * i, stop=2 * i + 1, size=2 * i + 1),
            reshape=(e,),
        )
        own = {
            "layers/gate_up": Leaf(sources=halves, concat_axis=1),
            "layers/mlp_norm": Leaf(sources=(norm,)),
        }
        return dataclasses.replace(table, leaves={**table.leaves, **own})


class NoShape(Llama):
    def weight_table(self) -> WeightTable:
        table = super().weight_table()
        [source] = table.leaves["layers/out"].sources
        bare = Leaf(sources=(dataclasses.replace(source, shape=None),))
        return dataclasses.replace(table, leaves={**table.leaves, "layers/out": bare})


def llama_params() -> tuple[Any, Any]:
    model = build_model(parse_config(goldens.load("gqa").config), FLOAT32)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def test_several_parameters_of_one_tensor_are_put_together() -> None:
    llama, params = llama_params()
    model = OneMatrix(llama.config, FLOAT32)
    found, plain = to_hf(model, params), to_hf(llama, params)
    mlp = "model.layers.1.mlp"
    norm = plain["model.layers.1.post_attention_layernorm.weight"]
    wanted = [plain[f"{mlp}.gate_proj.weight"], plain[f"{mlp}.up_proj.weight"], norm[None]]
    np.testing.assert_array_equal(found["model.layers.1.all"], np.concatenate(wanted))


def test_a_table_that_does_not_say_a_shape_is_refused_by_name() -> None:
    llama, params = llama_params()
    with pytest.raises(NotImplementedError, match=r"o_proj.weight and does not say .* give Source\(shape="):
        to_hf(NoShape(llama.config, FLOAT32), params)


def test_a_tensor_of_which_a_part_is_nowhere_is_refused() -> None:
    class Gap(OneMatrix):
        def weight_table(self) -> WeightTable:
            table = super().weight_table()
            return dataclasses.replace(
                table,
                leaves={
                    **table.leaves,
                    "layers/mlp_norm": Llama.weight_table(self).leaves["layers/mlp_norm"],
                },
            )

    llama, params = llama_params()
    with pytest.raises(
        NotImplementedError, match=r"layers.0.all: the weight table cuts it into .* all of it"
    ):
        to_hf(Gap(llama.config, FLOAT32), params)


def test_parameters_of_another_form_are_refused_with_every_difference() -> None:
    model, params = llama_params()
    layers = {**params["layers"], "up": params["embed"], "qkv": params["layers"]["qkv"][:1]}
    del layers["out"]
    with pytest.raises(ValueError) as raised:
        to_hf(model, {**params, "layers": layers})
    text = str(raised.value)
    assert "1 missing:\n  layers/out float32" in text and "1 unexpected:\n  layers/up" in text
    assert "1 of another shape:\n  layers/qkv: wanted (3, 64" in text


def test_arrays_that_were_deleted_are_named() -> None:
    model, params = llama_params()
    params = {**params, "embed": jnp.asarray(params["embed"]) + 0}
    params["embed"].delete()
    with pytest.raises(ValueError, match=r"1 deleted:\n  embed$"):
        to_hf(model, params)


def test_tensors_of_another_model_are_refused_with_every_difference() -> None:
    model, params = llama_params()
    tensors = to_hf(model, params)
    tensors["extra"] = tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"(?s)1 missing:\n  model.norm.weight .*1 unexpected:\n  extra"):
        from_hf(model, tensors)
