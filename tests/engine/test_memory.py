"""The plan adds up, fits what it says, and is the engine's own."""

from typing import Any

import jax.numpy as jnp
import pytest


def plan(**changes: Any) -> Any:
    from pjengine.memory import plan_memory
    from pjengine.models.shapes import SHAPES

    settings: dict[str, Any] = {
        "weights_bytes": 16_060_522_496,
        "budget_bytes": 100 * 10**9,
        "kv_cache_memory_bytes": None,
        "page_size": 16,
        "max_model_len": None,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 16384,
    }
    return plan_memory(SHAPES["llama-8b"], jnp.dtype("bfloat16"), **{**settings, **changes})


def test_the_parts_fill_the_budget_to_the_last_page() -> None:
    made = plan()
    assert 0 <= 100 * 10**9 - made.total_bytes < made.page_bytes
    assert made.page_bytes == 16 * 2 * 32 * 8 * 128 * 2
    assert made.max_model_len == 8192


def test_no_more_pages_than_requests_could_use() -> None:
    assert plan(max_num_seqs=2, max_num_batched_tokens=64).num_pages == 2 * 512 + 1


def test_an_open_length_is_shortened_to_what_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = plan(budget_bytes=20 * 10**9)
    assert made.max_model_len == made.num_kv_tokens < 8192
    assert "max_model_len=8192 does not fit" in caplog.text
    caplog.clear()
    assert plan().max_model_len == 8192 and not caplog.text


def test_a_length_that_was_asked_for_must_fit() -> None:
    with pytest.raises(ValueError, match="one request of 8192 tokens needs"):
        plan(budget_bytes=20 * 10**9, max_model_len=8192)
    with pytest.raises(ValueError, match="gets 0 bytes beside 16,060,522,496 of weights"):
        plan(budget_bytes=10**9)


def test_a_plan_without_a_device_needs_no_weights() -> None:
    from pjengine.config import EngineConfig
    from pjengine.planning import plan_without_device

    made = plan_without_device(EngineConfig(model="llama-8b", load_format="dummy"), "h200")
    assert made.weights_bytes == 16_060_522_496
    assert "1,024" not in made.table() and "131,072 B a token" in made.table()
    demo = plan_without_device(EngineConfig(model="demo"), "l4")
    assert demo.weights_bytes == 2 * 4_985_088
    with pytest.raises(ValueError, match="gpu must be one of h200"):
        plan_without_device(EngineConfig(model="demo"), "abacus")


@pytest.mark.gpu
def test_the_plan_is_within_3_percent_of_the_peak() -> None:
    import jax

    from pjengine import LLM, SamplingParams

    with LLM("llama-8b", load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=0.7) as llm:
        prompts = [[i % 1000 + 10] * 1024 for i in range(1024)]
        llm.generate(prompts, SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
        planned = llm.engine.memory_plan.total_bytes
    stats = jax.devices()[0].memory_stats()
    assert stats is not None
    assert abs(stats["peak_bytes_in_use"] - planned) < 0.03 * planned
