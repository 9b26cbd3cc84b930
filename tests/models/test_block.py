"""The pieces that architectures share: each field of ModelConfig counts, over pages as in whole sequences."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.alibi import alibi_slopes
from pjengine.models.config import Activation, ExpertConfig, ModelConfig
from pjengine.models.decoder import Decoder
from pjengine.models.layers import ACTIVATIONS, layer_norm, rms_norm
from pjengine.models.rope import RopeConfig
from pjengine.models.shapes import SHAPES
from tests.models.forward import logits_of, random_params

FLOAT32 = jnp.dtype("float32")
TINY = SHAPES["tiny"]  # 4 heads of 16, 2 KV heads, 2 layers
PARTIAL = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
SLOWER = RopeConfig(kind="default", theta=1000000.0, rotary_dim=16)
EXPERTS = ExpertConfig(num_experts=6, num_choices=2, inner_size=48)
LAYER_NORM = {"norm": "layer", "has_norm_bias": True}
FIELDS: dict[str, dict[str, Any]] = {
    "layer norm": {"norm": "layer"},
    "norm bias": LAYER_NORM,
    "no norm weight": {"norm": "layer", "has_norm_weight": False},
    "norm of embeddings": {"has_embedding_norm": True, **LAYER_NORM},
    "no final norm": {"has_final_norm": False},
    "no rotation": {"rope": None},
    "part rotated": {"rope": PARTIAL},
    "rotation by layer": {"layer_ropes": (None, SLOWER)},
    "learned positions": {"rope": None, "has_learned_positions": True},
    "learned positions with an offset": {"rope": None, "has_learned_positions": True, "position_offset": 2},
    "ALiBi": {"rope": None, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "scale": {"attention_scale": 0.4},
    "capped scores": {"attention_softcap": 0.3},
    "windows by layer": {"layer_windows": (5, None)},
    "sinks": {"has_sinks": True},
    "biases of queries, keys and values": {"qkv_bias": True},
    "bias of attention": {"out_bias": True},
    "clipped": {"clip_qkv": 0.2},
    "norm of each head": {"qk_norm": "head"},
    "norm of each head, its own": {"qk_norm": "own"},
    "norm of all heads": {"qk_norm": "full"},
    "norm of all heads with biases": {"qk_norm": "full", "has_qk_norm_bias": True, **LAYER_NORM},
    "gate of another kind": {"activation": "gelu_tanh"},
    "no gate": {"is_gated": False, "activation": "relu"},
    "no gate, with biases": {"is_gated": False, "mlp_bias": True},
    "experts": {"experts": EXPERTS},
    "experts with biases": {"experts": dataclasses.replace(EXPERTS, has_router_bias=True, has_bias=True)},
    "experts in one layer": {"experts": EXPERTS, "dense_layers": (0,)},
    "side by side": {"is_parallel": True},
    "side by side, one norm": {"is_parallel": True, "has_mlp_norm": False},
    "norms before and after": {"has_post_norms": True},
    "norms after": {"has_pre_norms": False, "has_post_norms": True},
    "scaled embeddings": {"embedding_scale": 8.0},
    "scaled residuals": {"residual_scale": 0.2},
    "scaled logits": {"logit_scale": 0.125},
    "capped logits": {"logit_softcap": 2.0},
    "bias of the output": {"head_bias": True},
    "tied": {"tie_word_embeddings": True},
}
# That `make test` tries; CI tries all.
QUICK = {
    *("layer norm", "learned positions", "ALiBi", "windows by layer", "norm of each head", "experts"),
    *("side by side", "norms before and after", "scaled residuals"),
}


def logits(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """At the last 4 of 28 positions: of a whole sequence, and of a prompt of 25 tokens and 3 steps."""
    model = Decoder(config, FLOAT32)
    params = random_params(model, scale=0.3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 28).astype(np.int32)
    dense = jax.jit(model.forward)(params, tokens[None])[0, -4:]
    paged = logits_of(model, params, [tokens[:25]], tokens[25:, None], None)[:, 0]
    return np.asarray(dense), paged


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return logits(TINY)[0]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(own, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, own in FIELDS.items()
    ],
)
def test_each_field_counts_and_pages_agree_with_whole_sequences(
    fields: dict[str, Any], plain: np.ndarray
) -> None:
    dense, paged = logits(dataclasses.replace(TINY, **fields))
    np.testing.assert_allclose(paged, dense, atol=1e-5 * np.abs(dense).max(), rtol=0)
    assert np.abs(dense - plain).max() > 0.01


def test_every_field_that_a_layer_reads_has_a_case() -> None:
    sizes = (
        "architecture vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim "
        "max_position_embeddings norm_eps dtype bos_token_id eos_token_ids"
    )
    sizes += " norm_offset share"  # below, and in test_share.py
    tried = {name for fields in FIELDS.values() for name in fields}
    assert {field.name for field in dataclasses.fields(ModelConfig)} == tried | set(sizes.split())


def test_each_field_of_experts_counts() -> None:
    fields: dict[str, dict[str, Any]] = {
        "choices": {"num_choices": 3},
        "weights": {"is_normalized": False},
        "router's bias": {"has_router_bias": True},
        "biases": {"has_bias": True},
        "slope": {"gate_alpha": 1.702},
        "limit": {"gate_limit": 0.1},
        "offset": {"up_offset": 1.0},
    }

    def first(experts: ExpertConfig) -> np.ndarray:
        model = Decoder(dataclasses.replace(TINY, experts=experts), FLOAT32)
        params = model.init(jax.random.key(0))
        for name in ("router_bias", "expert_gate_up_bias", "expert_down_bias"):
            if name in params["layers"]:
                bias = params["layers"][name]
                params["layers"][name] = jax.random.normal(jax.random.key(1), bias.shape)
        return np.asarray(model.forward(params, jnp.arange(8, dtype=jnp.int32)[None]))

    plain = first(EXPERTS)
    for name, change in fields.items():
        assert np.abs(first(dataclasses.replace(EXPERTS, **change)) - plain).max() > 1e-4, name


def test_dense_layers_leave_some_to_the_experts() -> None:
    for fields in ({"dense_layers": (0,)}, {"experts": EXPERTS, "dense_layers": (0, 1)}):
        with pytest.raises(ValueError, match="dense_layers must leave layers to the experts, got"):
            dataclasses.replace(TINY, **fields)


def test_an_offset_makes_up_for_weights_that_are_less(plain: np.ndarray) -> None:
    dense, paged = logits(
        dataclasses.replace(TINY, norm_offset=1.0)
    )  # whose weights begin at 0, and not at 1
    np.testing.assert_allclose(dense, plain, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(paged, plain, atol=2e-4, rtol=1e-5)


def test_norms_are_those_of_their_formulas() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 8)).astype(np.float32) + 1
    weight, bias = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    eps = 1e-3
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    array, w, b = map(jnp.asarray, (x, weight, bias))
    rms = x / np.sqrt((x**2).mean((1, 2), keepdims=True) + eps)
    np.testing.assert_allclose(rms_norm(array, w, eps=eps, num_axes=2), rms * weight, **options)
    found = rms_norm(array, w, eps=eps, offset=1.0, num_axes=2)
    np.testing.assert_allclose(found, rms * (1 + weight), **options)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    np.testing.assert_allclose(layer_norm(array, None, None, eps=eps), centred, **options)
    np.testing.assert_allclose(layer_norm(array, w, b, eps=eps), centred * weight + bias, **options)
    found = layer_norm(array, w, None, eps=eps, offset=1.0)
    np.testing.assert_allclose(found, centred * (1 + weight), **options)


def test_activations_are_those_of_their_formulas() -> None:
    from math import erf, exp, pi, sqrt, tanh

    formulas: dict[Activation, Callable[[float], float]] = {
        "silu": lambda x: x / (1 + exp(-x)),
        "gelu": lambda x: x / 2 * (1 + erf(x / sqrt(2))),
        "gelu_tanh": lambda x: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + exp(-1.702 * x)),
        "relu": lambda x: max(x, 0.0),
    }
    assert set(formulas) == set(ACTIVATIONS)
    xs = np.linspace(-4, 4, 33, dtype=np.float32)
    for name, formula in formulas.items():
        wanted = [formula(float(x)) for x in xs]
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(xs)), wanted, atol=2e-6, err_msg=name)


def test_slopes_fall_by_halves_and_lie_between_for_other_numbers_of_heads() -> None:
    assert alibi_slopes(8) == tuple(0.5**i for i in range(1, 9))
    assert alibi_slopes(6) == (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
