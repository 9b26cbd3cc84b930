"""A whole model on each backend: errors against float32 beside the reference's own, and the tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.llama import Llama
from pjengine.models.rope import RopeConfig
from pjengine.models.shapes import SHAPES
from tests.golden import golden as goldens
from tests.kernels.cases import NEEDS_JAX_TRITON
from tests.models.forward import error, logits_of, random_params, widened

LENS = [100, 1, 17, 64, 33, 15, 16, 130]  # around pages, and around tiles
SMALL = dataclasses.replace(
    SHAPES["tiny"], hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
    rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=32), dtype="bfloat16",
)  # fmt: skip
LARGE = dataclasses.replace(
    SMALL, hidden_size=1024, intermediate_size=4096, num_layers=4, head_dim=128,
    rope=RopeConfig(kind="default", theta=10000.0, rotary_dim=128),
)  # fmt: skip
ON_GPU = [
    pytest.param(None, id="chosen", marks=pytest.mark.gpu),  # Mosaic where it can
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("jax_triton", marks=[pytest.mark.gpu, NEEDS_JAX_TRITON]),
]


@pytest.mark.parametrize("num_seqs", [1, 5, 40])
@pytest.mark.parametrize("backend", ON_GPU)
def test_no_backend_is_less_exact_than_the_reference(backend: str | None, num_seqs: int) -> None:
    check(LARGE, backend, num_seqs, num_steps=48 if num_seqs == 1 else 16)


@pytest.mark.parametrize("num_seqs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_interpreted_kernels_are_no_less_exact_than_the_reference(num_seqs: int) -> None:
    check(SMALL, "triton_interpret", num_seqs, num_steps=12)


def check(config: Any, backend: str | None, num_seqs: int, *, num_steps: int) -> None:
    """Decode steps go on with the same tokens, whatever the likeliest are."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, LENS[i % len(LENS)]) for i in range(num_seqs)]
    model, exact = Llama(config, jnp.dtype("bfloat16")), Llama(config, jnp.dtype("float32"))
    params = random_params(model, scale=0.04)
    forced = rng.integers(0, config.vocab_size, (num_steps, num_seqs)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        truth = logits_of(exact, widened(params), prompts, forced, "reference")
    theirs = logits_of(model, params, prompts, forced, "reference")
    ours = logits_of(model, params, prompts, forced, backend)
    assert error(ours, truth) <= 1.1 * error(theirs, truth)
    second, first = np.sort(truth)[..., -2:].transpose(2, 0, 1)
    is_clear = first - second > 2 * np.abs(theirs - truth).max()
    assert is_clear.mean() > 0.4  # the more sequences, the larger the largest error
    for found in (ours, theirs):
        np.testing.assert_array_equal(found.argmax(-1)[is_clear], truth.argmax(-1)[is_clear])


@pytest.mark.gpu
@NEEDS_JAX_TRITON
def test_an_engine_on_jax_triton_gives_the_tokens_of_the_default(tmp_path: Path) -> None:
    from pjengine import LLM, SamplingParams

    golden = goldens.load("gqa")
    goldens.write_checkpoint(golden, tmp_path)
    prompts = [golden.prompt, golden.prompt[:1], golden.prompt[:7], golden.prompt * 3]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 2**24}
    found = []
    for backend in (None, "jax_triton"):
        with LLM(tmp_path, dtype="float32", kernel_backend=backend, skip_tokenizer_init=True, **sizes) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]
    assert found[0][0] == golden.tokens
