"""The plan adds up, fits what it says, and is the engine's own."""

import dataclasses
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
        "max_logprobs": 20,
    }
    config = changes.pop("config", SHAPES["llama-8b"])
    return plan_memory(config, jnp.dtype("bfloat16"), **{**settings, **changes})


def test_the_parts_fill_the_budget_to_the_last_page() -> None:
    made = plan()
    assert 0 <= 100 * 10**9 - made.total_bytes < made.page_bytes
    assert made.page_bytes == 16 * 2 * 32 * 8 * 128 * 2
    assert made.max_model_len == 8192


def windowed(*windows: int | None, **changes: Any) -> Any:
    """The plan of a model whose layers see these windows, one after the other and again."""
    from pjengine.models.shapes import SHAPES

    return plan(config=dataclasses.replace(SHAPES["llama-8b"], layer_windows=windows), **changes)


@pytest.mark.parametrize("windows", [(1024, None), (1024, 512, 1024, None), (1024,)])
def test_layers_with_windows_have_pages_of_their_own(windows: tuple[int | None, ...]) -> None:
    made = windowed(*windows)
    group, layer = made.window_group, 16 * 2 * 8 * 128 * 2
    share = sum(window is not None for window in windows) / len(windows)
    assert group.layers == tuple(i for i in range(32) if windows[i % len(windows)] is not None)
    assert group.window == 1024
    assert made.window_page_bytes == 32 * share * layer
    assert made.page_bytes == 32 * (1 - share) * layer + 16 * 4  # token ids
    assert made.kv_bytes == made.page_bytes * made.num_pages + made.window_page_bytes * group.num_pages
    assert 0 <= 100 * 10**9 - made.total_bytes < max(made.page_bytes, made.window_page_bytes)
    assert made.num_full_requests > 2 * plan().num_full_requests * share
    assert f"window pages {group.num_pages:,}".split()[-1] in made.table()


def test_as_many_requests_of_the_expected_length_fit_into_either_group() -> None:
    made = windowed(1024, None)
    expected = 4096 // 16  # half of the longest
    num_requests = made.num_pages / expected
    assert made.window_group.num_pages - 16384 // 16 == pytest.approx(
        num_requests * (1024 // 16 + 1), rel=0.01
    )


def test_windows_that_no_request_outgrows_change_nothing() -> None:
    assert windowed(8192, None) == plan()
    assert windowed(2048, None, max_model_len=2048) == plan(max_model_len=2048)


def test_no_group_has_less_than_a_request_needs_or_more_than_all_can_use() -> None:
    sizes: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
    made = windowed(1024, None, **sizes)
    assert (made.num_pages, made.window_group.num_pages) == (2 * 512 + 1, 1 + 2 * (1024 // 16 + 1) + 4)
    least = 513 * made.page_bytes + (1 + 1024 // 16 + 2 + 64 // 16) * made.window_page_bytes
    sizes |= {"budget_bytes": None, "max_model_len": 8192}
    small = windowed(1024, None, kv_cache_memory_bytes=least, **sizes)
    assert small.max_model_len == 8192 and small.kv_bytes <= least
    with pytest.raises(ValueError, match="lower max_num_batched_tokens, or raise kv_cache_memory_bytes"):
        windowed(1024, None, kv_cache_memory_bytes=least // 2, **sizes)


def test_no_more_pages_than_requests_could_use() -> None:
    assert plan(max_num_seqs=2, max_num_batched_tokens=64).num_pages == 2 * 512 + 1


def test_an_open_length_is_shortened_to_what_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = plan(budget_bytes=217 * 10**8)
    assert made.max_model_len == made.num_kv_tokens < 8192
    assert "max_model_len=8192 does not fit" in caplog.text
    caplog.clear()
    assert plan().max_model_len == 8192 and not caplog.text


def test_a_length_that_was_asked_for_must_fit() -> None:
    with pytest.raises(ValueError, match="one request of 8192 tokens needs"):
        plan(budget_bytes=20 * 10**9, max_model_len=8192)
    with pytest.raises(ValueError, match="gets 0 bytes beside 16,060,522,496 of weights"):
        plan(budget_bytes=10**9)


def test_more_kv_pages_than_the_budget_holds_are_refused() -> None:
    assert plan(kv_cache_memory_bytes=10**10).kv_bytes <= 10**10
    with pytest.raises(ValueError, match=r"bytes of KV pages are too many .* Lower kv_cache_memory_bytes"):
        plan(kv_cache_memory_bytes=90 * 10**9)
    assert plan(kv_cache_memory_bytes=90 * 10**9, budget_bytes=None).kv_bytes > 80 * 10**9


def test_tokens_asked_for_by_id_are_in_the_plan() -> None:
    few, many = plan(max_logprobs=0), plan(max_logprobs=4096)
    num_top = 2 * 4 * 4096 * 2 * 1024 + 2 * 4 * 4096 * 2 * 16384
    assert many.temp_bytes - few.temp_bytes == num_top + 2 * 8 * (4096 - 128) * 1024


def test_penalties_take_what_is_planned_however_long_the_context_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from pjengine import logits
    from pjengine.edit_sizes import EditSizes

    num_seqs, page_size, vocab_size = 64, 16, 1024
    monkeypatch.setattr(logits, "HISTORY_BLOCK", 2**16)

    def temp_bytes(max_model_len: int) -> int:
        def shape(*axes: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(axes, dtype)

        def edit(raw: Any, page_table: Any, lens: Any, penalty: Any, token_ids: Any) -> Any:
            history = logits.History(token_ids, page_table, lens, lens)
            sizes = EditSizes(has_penalties=True)
            return logits.apply_edits(raw, {}, sizes, [penalty] * 3, history)

        floats = shape(num_seqs, dtype=jnp.float32)
        raw, table = (
            shape(num_seqs, vocab_size, dtype=jnp.float32),
            shape(num_seqs, max_model_len // page_size),
        )
        lowered = jax.jit(edit).lower(raw, table, shape(num_seqs), floats, shape(2000, page_size))
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    counts = num_seqs * vocab_size * (1 + 4)  # seen, and how often
    for max_model_len in (256, 32768):
        planned = logits.history_bytes(num_seqs, max_model_len, page_size)
        assert temp_bytes(max_model_len) <= planned + 2 * counts + 8 * num_seqs * max_model_len // page_size
    assert logits.history_bytes(num_seqs, 32768, page_size) == 32 * 2**16


def test_a_plan_without_a_device_needs_no_weights() -> None:
    from pjengine.config import EngineConfig
    from pjengine.planning import plan_without_device

    made = plan_without_device(EngineConfig(model="llama-8b", load_format="dummy"), "h200")
    assert made.weights_bytes == 16_060_522_496
    table = made.table()
    assert "1,024" not in table and "131,072 B a token" in table
    parts = ("weights", "activations", "program temp", "KV pages", "total")
    assert [line[:14].strip() for line in table.splitlines()[:5]] == list(parts)
    demo = plan_without_device(EngineConfig(model="demo"), "l4")
    assert demo.weights_bytes == 2 * 4_985_088
    with pytest.raises(ValueError, match="gpu must be one of h200"):
        plan_without_device(EngineConfig(model="demo"), "abacus")


def test_a_gpu_has_room_for_the_products_that_the_compiler_times() -> None:
    """On a card of 80 GB with 70 % of it for the engine, the first program could not be made without."""
    from pjengine.models.shapes import SHAPES
    from pjengine.state_sizes import state_bytes

    config = SHAPES["llama-8b"]
    on_gpu, on_cpu = plan(), plan(budget_bytes=None, max_num_seqs=1024)
    head = config.vocab_size * config.hidden_size * 2
    states = state_bytes(config, jnp.dtype("bfloat16")) * (on_gpu.max_states - on_cpu.max_states)
    assert on_gpu.temp_bytes - on_cpu.temp_bytes - states >= head


def test_hidden_states_take_a_share_that_is_planned_for() -> None:
    from pjengine.models.shapes import SHAPES
    from pjengine.state_sizes import SHARE, state_bytes

    each = state_bytes(SHAPES["llama-8b"], jnp.dtype("bfloat16"))
    made, small = plan(), plan(budget_bytes=40 * 10**9)
    assert made.max_states * each <= SHARE * 100 * 10**9 < (made.max_states + 1) * each
    assert made.temp_bytes - small.temp_bytes == (made.max_states - small.max_states) * each
    assert plan(max_num_batched_tokens=1024).max_states == 1024  # one layer of whole steps


def test_few_logprobs_bound_nothing_and_cost_next_to_nothing() -> None:
    few, none = plan(), plan(max_logprobs=0)
    assert few.max_prompt_logprob_tokens is None is none.max_prompt_logprob_tokens
    # 20 are rounded up to 32 values and ids; a step runs while the host reads the one before it.
    assert few.temp_bytes - none.temp_bytes == 2 * (16384 + 1024) * 32 * 8
    assert "prompt logprobs in steps" not in few.table()


def test_logprobs_of_a_vocabulary_are_in_the_plan_and_bound_the_steps_that_have_them() -> None:
    few, all_of_them = plan(), plan(max_logprobs=-1)
    bound = all_of_them.max_prompt_logprob_tokens
    assert bound == 4096
    output = bound * (128256 + 1) * 8
    assert 2 * output <= 0.1 * 100 * 10**9 < 4 * output
    assert all_of_them.temp_bytes >= few.temp_bytes + 2 * output
    assert all_of_them.total_bytes <= 100 * 10**9
    assert "prompt logprobs in steps of at most 4,096 tokens" in all_of_them.table()
    assert plan(max_logprobs=10**6).max_prompt_logprob_tokens == bound
    assert plan(max_logprobs=1000).max_prompt_logprob_tokens is None
    assert plan(max_logprobs=-1, max_num_batched_tokens=4096).max_prompt_logprob_tokens is None
    assert plan(max_logprobs=-1, budget_bytes=None, max_num_seqs=1).max_prompt_logprob_tokens is None


@pytest.mark.parametrize("max_num_seqs", [1, 33, 256, 1000])
@pytest.mark.parametrize("budget_gb", [13, 19, 40, 140])
def test_the_bound_is_a_mixed_bucket_that_holds_every_row(max_num_seqs: int, budget_gb: int) -> None:
    from pjengine.config import RunnerConfig

    sizes: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": 16384}
    made = plan(max_logprobs=-1, budget_bytes=budget_gb * 10**9, weights_bytes=10**9, **sizes)
    bound = made.max_prompt_logprob_tokens
    config = RunnerConfig(
        num_pages=9, page_size=16, max_model_len=64, max_prompt_logprob_tokens=bound, **sizes
    )
    assert bound in config.mixed_buckets and bound >= max(32, max_num_seqs)


@pytest.mark.parametrize("num_tokens", [32, 256, 1000, 2048])
def test_the_plan_counts_what_a_program_for_prompt_logprobs_gives(num_tokens: int) -> None:
    import jax

    from pjengine.logprob_sizes import prompt_bytes
    from pjengine.logprobs import prompt_logprobs_of
    from pjengine.memory import activation_bytes
    from pjengine.models.shapes import SHAPES

    config = SHAPES["tiny"]
    hidden, vocab, num_top = config.hidden_size, config.vocab_size, config.vocab_size

    def compute(states: jax.Array, targets: jax.Array, weights: jax.Array) -> object:
        return prompt_logprobs_of(states, targets, num_top, lambda rows: rows @ weights)

    shapes = [(num_tokens, hidden), (num_tokens,), (hidden, vocab)]
    args = [jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.float32) for shape in shapes]
    analysis = jax.jit(compute).lower(*args).compile().memory_analysis()
    assert analysis is not None
    output = analysis.output_size_in_bytes
    assert output <= prompt_bytes(num_tokens, num_top) / 2 + 1024
    planned = activation_bytes(config, jnp.dtype("float32"), num_tokens, 1) + prompt_bytes(
        num_tokens, num_top
    )
    assert output + analysis.temp_size_in_bytes <= planned


def test_the_bound_reaches_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import loading
    from pjengine.config import EngineConfig
    from pjengine.planning import plan_without_device

    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "max_logprobs": -1}
    assert (
        plan_without_device(EngineConfig(model="llama-8b", **settings), "h200").max_prompt_logprob_tokens
        == 4096
    )
    monkeypatch.setattr(loading, "device_budget", lambda *_: 20 * 10**6)
    config = EngineConfig(model="tiny", max_num_batched_tokens=4096, max_num_seqs=4, **settings)
    loaded = loading.load_model(config)
    assert loaded.memory_plan.max_prompt_logprob_tokens == 256
    assert loaded.runner_config.max_prompt_logprob_tokens == 256


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
