"""Models divided among devices: who has which heads, and that all together compute what one does."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pjengine.models import share
from pjengine.models.attention import PagedAttend
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.decoder import Decoder
from pjengine.models.loader import dummy_params, load_params
from pjengine.models.registry import build_model, parse_config
from pjengine.models.share import NOBODY, divide_heads, widen
from pjengine.models.state import Batch, KVCache, kv_shape
from pjengine.pallas_kernels.peer_sum import peer_sum
from pjengine.sharding.mesh import make_mesh
from pjengine.sharding.partition import KV_PAGES, placed
from tests.golden import golden as goldens
from tests.models.forward import PAGE_SIZE
from tests.models.test_architectures import CASES, FLOAT32

# The first case of every architecture, and cases whose heads, KV heads or vocabulary do not divide by 4.
EACH = sorted({names[0] for names in goldens.BY_ARCHITECTURE.values() if names[0] in CASES})
ODD = [
    *("bloom_6_heads", "bloom_12_heads", "falcon_rw_6_heads", "falcon_mqa_alibi", "mpt_6_heads"),
    *("mpt_qk_ln", "mpt_kv_n_heads", "gpt_bigcode_mha", "mqa", "cohere_qk_norm", "phi_qk_layernorm"),
]
# That `make test` divides; CI has the engine divide all (`tests/engine/test_tensor_parallel.py`).
QUICK = {"gpt2", "gemma2", "gpt_oss", "qwen3_moe", "bloom_6_heads", "mpt_qk_ln", "mqa", "cohere_qk_norm"}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8]))
def test_every_head_stands_once_beside_its_own_keys(num_kv_heads: int, group: int, num_devices: int) -> None:
    heads = divide_heads(num_kv_heads * group, num_kv_heads, num_devices)
    assert len(heads.keys) % num_devices == 0
    found = heads.queries[heads.queries != NOBODY]
    assert sorted(found) == list(range(num_kv_heads * group))
    for key, queries in zip(heads.keys, heads.queries, strict=True):
        own = queries[queries != NOBODY]
        assert (own // group == key).all()
        assert key != NOBODY or len(own) == 0
    if num_kv_heads % num_devices == 0:
        assert (heads.queries.reshape(-1) == np.arange(num_kv_heads * group)).all()  # as they were


def sharded(
    golden: goldens.Golden, folder: Path, num_devices: int, *, has_whole_experts: bool = False
) -> tuple[Decoder, Any, Any]:
    """A golden case's model and parameters on so many devices, and their mesh."""
    goldens.write_checkpoint(golden, folder)
    config, mesh = parse_config(golden.config), make_mesh(jax.devices()[:num_devices])
    if has_whole_experts:
        assert config.experts is not None
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, is_whole=True))
    one, model = build_model(config, FLOAT32), build_model(config, FLOAT32, num_devices)
    params = load_params(
        open_checkpoint(folder),
        model.weight_table(),
        jax.eval_shape(one.init, jax.random.key(0)),
        num_layers=config.num_layers,
        stored=placed(
            jax.eval_shape(model.init, jax.random.key(0)), mesh, has_whole_experts=has_whole_experts
        ),
        widen=partial(widen, config=config, num_devices=num_devices),
    )
    return model, params, mesh


def prompt_logits(
    model: Decoder, params: Any, mesh: Any, prompt: list[int], *, has_inboxes: bool = False
) -> np.ndarray:
    """The prompt's logits, read over pages by all devices together."""
    length = len(prompt)
    width = -(-length // PAGE_SIZE)
    tokens, table = jnp.asarray(prompt, jnp.int32), jnp.arange(1, width + 1, dtype=jnp.int32)[None]

    def run(params: Any) -> Any:
        positions = jnp.arange(length, dtype=jnp.int32)
        lens, shape = jnp.full(length, length, jnp.int32), kv_shape(model.own, width + 1, PAGE_SIZE)
        cache = KVCache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((width + 1, PAGE_SIZE), jnp.int32))
        if has_inboxes:
            cache = cache._replace(inboxes=jnp.zeros((1, model.num_devices + 2, 2), jnp.uint32))
        cu_q_lens = jnp.array([0, length], jnp.int32)
        slots = positions + PAGE_SIZE
        batch = Batch(tokens, positions, lens, slots, table, cu_q_lens[1:], cu_q_lens)
        attend = PagedAttend(batch, width + 1)
        hidden, _ = model.run(params, tokens, positions, lens, cache, attend)
        return model.logits(params, hidden)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    whole = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)
    return np.asarray(jax.jit(whole)(params))


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        pytest.param(name, num, marks=() if name in QUICK else pytest.mark.sweep)
        for name, num in [*((name, 4) for name in [*EACH, *ODD]), ("gqa", 2), ("falcon_mqa", 2)]
    ],
)
def test_devices_together_compute_what_transformers_does(name: str, num_devices: int, tmp_path: Path) -> None:
    golden = goldens.load(name)
    model, params, mesh = sharded(golden, tmp_path, num_devices)
    logits = prompt_logits(model, params, mesh, golden.prompt)
    assert logits.shape[1] == model.config.vocab_size
    found = logits[-4:, : golden.last_logits.shape[1]]
    np.testing.assert_allclose(found, golden.last_logits, atol=2e-4, rtol=0)


# The six experts of gpt-oss on four devices: two are padding, and one device has no others.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe_dense_layers"])
def test_devices_with_whole_experts_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    golden = goldens.load(name)
    model, params, mesh = sharded(golden, tmp_path, 4, has_whole_experts=True)
    experts = model.own.experts
    assert experts is not None and model.config.experts is not None
    assert experts.inner_size == model.config.experts.inner_size
    for leaf in ("expert_gate_up", "expert_down"):
        [shape] = {shard.data.shape for shard in params["layers"][leaf].addressable_shards}
        assert shape[1] == experts.num_held == -(-experts.num_experts // 4)
    logits = prompt_logits(model, params, mesh, golden.prompt)
    found = logits[-4:, : golden.last_logits.shape[1]]
    np.testing.assert_allclose(found, golden.last_logits, atol=2e-4, rtol=0)


def test_each_device_has_its_part_of_what_is_large() -> None:
    from pjengine.models.shapes import SHAPES

    mesh = make_mesh(jax.devices()[:4])
    model = build_model(SHAPES["llama-8b"], jnp.dtype("bfloat16"), 4)
    abstract = placed(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    own = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    assert own < whole / 4 * 1.001  # norms are on every device
    assert KV_PAGES[1] == "tensor"


def test_dummy_parameters_are_the_same_on_any_number_of_devices() -> None:
    config = parse_config(goldens.load("gqa").config)
    made = [
        dummy_params(
            placed(
                jax.eval_shape(build_model(config, FLOAT32, n).init, jax.random.key(0)),
                make_mesh(jax.devices()[:n]),
            ),
            seed=3,
        )
        for n in (1, 2)
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)


# Side by side, attention and MLP do not wait for each other: their sums must not share inboxes.
@pytest.mark.parametrize(
    ("name", "is_one_by_one"), [("gqa", True), ("qwen3_moe", True), ("cohere_qk_norm", False)]
)
def test_only_sums_that_wait_for_each_other_go_through_inboxes(
    name: str, is_one_by_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_inboxes: list[bool] = []

    def noted(x: Any, inboxes: Any, *, axis: str) -> Any:
        if x.ndim == 2:  # of the residual stream
            have_inboxes.append(inboxes is not None)
        return peer_sum(x, None, axis=axis)

    monkeypatch.setattr(share, "peer_sum", noted)
    golden = goldens.load(name)
    model, params, mesh = sharded(golden, tmp_path, 2)
    prompt_logits(model, params, mesh, golden.prompt, has_inboxes=True)
    assert have_inboxes == [True, *[is_one_by_one] * 2 * model.config.num_layers]
