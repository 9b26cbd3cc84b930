"""MXFP4 as its format defines it, and a checkpoint that holds its experts so."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.loader import load_params
from pjengine.models.mxfp4 import unpack_mxfp4
from pjengine.models.registry import build_model, parse_config
from tests.golden import golden as goldens

BLOCK = 32


def element(code: int) -> float:
    """E2M1: a sign, two bits of an exponent that is biased by 1, a bit of the fraction."""
    sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return math.copysign(size, -1.0 if sign else 1.0)


def unpack(blocks: np.ndarray, scales: np.ndarray, dtype: Any = jnp.float32) -> jax.Array:
    return unpack_mxfp4(jnp.asarray(blocks), jnp.asarray(scales), dtype)


def test_every_byte_holds_two_elements_the_lower_first() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    found = np.asarray(unpack(blocks, np.full((16, 1), 127, np.uint8))).ravel()
    wanted = [element(code) for byte in range(256) for code in (byte & 15, byte >> 4)]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_block_has_its_own_power_of_two(dtype: Any) -> None:
    scales = np.arange(4, 252, dtype=np.uint8).reshape(4, -1)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*scales.shape, 16)).astype(np.uint8)
    found = unpack(blocks, scales, dtype)
    assert found.shape == (4, scales.shape[1] * BLOCK)
    assert found.dtype == dtype
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    elements = np.vectorize(element)(codes)
    wanted = elements * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    np.testing.assert_array_equal(np.asarray(found, np.float64), wanted.reshape(found.shape))


def test_the_last_scale_is_not_a_number() -> None:
    blocks, scales = np.full((2, 16), 0x22, np.uint8), np.array([254, 255], np.uint8)
    found = np.asarray(unpack(blocks, scales)).reshape(2, BLOCK)
    assert (found[0] == 2.0**127).all()
    assert np.isnan(found[1]).all()


def make_checkpoints(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same model twice: with packed experts in `folder`/packed, without in `folder`/plain."""
    golden, inner, rng = goldens.load("gpt_oss"), 64, np.random.default_rng(0)
    config = {**golden.config, "intermediate_size": inner}
    plain = {name: array for name, array in golden.weights().items() if ".mlp.experts." not in name}
    packed = dict(plain)
    num, hidden = config["num_local_experts"], config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        for name, rows, size in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            codes = rng.integers(0, 16, (num, rows, size)).astype(np.uint8)
            scales = rng.integers(121, 125, (num, rows, size // BLOCK)).astype(np.uint8)
            by_scale = codes.reshape(*scales.shape, BLOCK)
            factors = 2.0 ** (scales.astype(np.float64) - 127)
            values = (np.vectorize(element)(by_scale) * factors[..., None]).reshape(codes.shape)
            plain[whole] = np.ascontiguousarray(values.swapaxes(1, 2), np.float32)
            packed[f"{whole}_blocks"] = by_scale[..., 0::2] | by_scale[..., 1::2] << 4
            packed[f"{whole}_scales"] = scales
            bias = rng.standard_normal((num, rows)).astype(np.float32)
            plain[f"{whole}_bias"] = packed[f"{whole}_bias"] = bias
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    for name, tensors in (("plain", plain), ("packed", packed)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return config, {**config, "quantization_config": quantization}


def load(folder: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    model = build_model(parse_config(config), jnp.dtype("float32"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    table, num_layers = model.weight_table(), model.config.num_layers
    return model, load_params(open_checkpoint(folder), table, abstract, num_layers=num_layers)


def test_packed_experts_are_loaded_as_those_they_stand_for(tmp_path: Path) -> None:
    plain_config, packed_config = make_checkpoints(tmp_path)
    plain_model, plain = load(tmp_path / "plain", plain_config)
    model, packed = load(tmp_path / "packed", packed_config)
    jax.tree.map(np.testing.assert_array_equal, packed, plain)
    assert dataclasses.replace(model.config, is_mxfp4=False) == plain_model.config
    logits = model.forward(packed, jnp.arange(40, dtype=jnp.int32)[None])
    assert np.isfinite(np.asarray(logits)).all()
    with pytest.raises(ValueError, match="gate_up_proj_blocks"):
        load(tmp_path / "plain", packed_config)
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj_scales \(6, 96, 2\)"):
        load(tmp_path / "packed", plain_config)


def test_what_is_not_packed_is_bfloat16_where_nothing_is_said() -> None:
    config = goldens.load("gpt_oss").config | {"intermediate_size": 32}
    del config["dtype"]
    assert parse_config(config).dtype == "float32"
    assert parse_config({**config, "quantization_config": {"quant_method": "mxfp4"}}).dtype == "bfloat16"
