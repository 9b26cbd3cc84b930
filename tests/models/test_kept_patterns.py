"""The attention of each head, as a matrix: what the layer computes by, and what transformers has."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.attention import dense_attend
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.kept_patterns import PatternAttend
from pjengine.models.loader import load_params
from pjengine.models.registry import build_model, parse_config
from pjengine.pallas_kernels.attention_variant import AttentionVariant
from tests.golden import golden as goldens
from tests.models.test_attention import DIM, GROUP, IDS, KV_HEADS, LENGTH, VARIANTS, rotary


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_patterns_times_values_are_what_the_layer_attends_to(variant: AttentionVariant) -> None:
    qkv = jax.random.normal(jax.random.key(0), (LENGTH, KV_HEADS, GROUP + 2, DIM))
    attend = PatternAttend((3,))
    out, _ = attend(qkv, None, layer=3, rotary=rotary(0, LENGTH), scale=0.3, variant=variant)
    dense, _ = dense_attend(qkv, None, layer=3, rotary=rotary(0, LENGTH), scale=0.3, variant=variant)
    np.testing.assert_array_equal(out, dense)
    attend(qkv, None, layer=4, rotary=None, scale=0.3, variant=variant)
    assert attend.patterns.keys() == {3}  # nobody has asked for the other
    pattern, values = np.asarray(attend.patterns[3]), np.repeat(np.asarray(qkv[:, :, -1]), GROUP, axis=1)
    assert pattern.shape == (KV_HEADS * GROUP, LENGTH, LENGTH) and pattern.min() >= 0
    np.testing.assert_allclose(np.einsum("hqk,khd->qhd", pattern, values), out, atol=1e-5)
    sums = pattern.sum(axis=-1)
    if variant.sinks is None:
        np.testing.assert_allclose(sums, 1, atol=1e-5)
    else:
        assert sums.max() < 1
    before = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    assert not pattern[:, before < 0].any()
    if variant.window is not None:
        assert not pattern[:, before >= variant.window].any()


@pytest.mark.parametrize("name", sorted(goldens.ATTENTIONS))
def test_patterns_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    from pjengine.inside import attention_patterns

    golden = goldens.load(name)
    with np.load(goldens.FOLDER / "attentions.npz") as file:
        wanted = file[name]  # of the last four tokens
    model = build_model(parse_config(golden.config), jnp.dtype("float32"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    checkpoint = open_checkpoint(goldens.write_checkpoint(golden, tmp_path))
    params = load_params(checkpoint, model.weight_table(), abstract, num_layers=model.config.num_layers)
    layers = range(model.config.num_layers)
    found = attention_patterns(model, params, golden.prompt, layers=layers)
    np.testing.assert_allclose(found[:, :, -4:], wanted, atol=2e-5)
    some = attention_patterns(model, params, golden.prompt, layers=[-1, 0], heads=[1, -1])
    np.testing.assert_array_equal(some, found[[-1, 0]][:, [1, -1]])
