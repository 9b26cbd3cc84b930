"""Layers whose sums over GPUs end in the next norm, against the Block they stand for."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models import decoder
from pjengine.models.attention import PagedAttend
from pjengine.models.registry import build_model
from pjengine.models.shapes import SHAPES
from pjengine.models.state import Batch, KVCache, kv_shape
from pjengine.models.summed_layers import is_summed, summed_layers
from tests.golden import golden as goldens
from tests.kernels.cases import cuda_target
from tests.models.test_share import prompt_logits, sharded


@pytest.mark.parametrize(
    ("name", "num_devices"), [("gqa", 2), ("mqa", 4), ("qwen2", 2), ("smollm3_no_rope_layers", 2)]
)
def test_devices_together_compute_what_transformers_does(
    name: str, num_devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0

    def counted(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return summed_layers(*args)

    monkeypatch.setattr(decoder, "is_summed", lambda *_: True)
    monkeypatch.setattr(decoder, "summed_layers", counted)
    golden = goldens.load(name)
    model, params, mesh = sharded(golden, tmp_path, num_devices)
    logits = prompt_logits(model, params, mesh, golden.prompt)
    assert num_calls == 1
    found = logits[-4:, : golden.last_logits.shape[1]]
    np.testing.assert_allclose(found, golden.last_logits, atol=2e-4, rtol=0)


CONFIG = dataclasses.replace(
    SHAPES["tiny"], hidden_size=1024, num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16"
)


def is_summed_with(
    *, num_inboxes: int = 2, dtype: str = "bfloat16", num_rows: int = 64, backend: Any = None, **fields: Any
) -> bool:
    """Of a step of a model with these fields that two GPUs divide."""
    model = build_model(dataclasses.replace(CONFIG, **fields), jnp.dtype(dtype), 2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    empty = jnp.zeros((0,), jnp.int32)
    batch = Batch(empty, empty, empty, empty, jnp.zeros((0, 1), jnp.int32), empty, None)
    pages = jnp.zeros(kv_shape(model.own, 2, 16), dtype)
    cache = KVCache(pages, pages, jnp.zeros((2, 16), jnp.int32))
    if num_inboxes:
        cache = cache._replace(inboxes=jnp.zeros((1, num_inboxes + 2, 2), jnp.uint32))
    x = jnp.zeros((num_rows, model.config.hidden_size), dtype)
    return is_summed(params, model.own, x, cache, PagedAttend(batch, 2, backend))


def test_only_where_the_layers_are_built_so_and_the_kernel_can() -> None:
    assert not is_summed_with()  # on a CPU
    with cuda_target():
        assert is_summed_with()
        assert is_summed_with(backend="jax_triton", qkv_bias=True, layer_ropes=(None, CONFIG.rope))
        others: list[dict[str, Any]] = [
            {"norm_offset": 1.0}, {"has_post_norms": True}, {"is_parallel": True},
            {"qk_norm": "head"}, {"clip_qkv": 8.0}, {"activation": "gelu"}, {"is_gated": False},
            {"residual_scale": 0.5}, {"out_bias": True}, {"mlp_bias": True},
            {"num_inboxes": 0}, {"dtype": "float16"}, {"hidden_size": 512}, {"num_rows": 2**13 + 1},
            {"backend": "reference"}, {"backend": "triton"},
        ]  # fmt: skip
        for fields in others:
            assert not is_summed_with(**fields), fields
