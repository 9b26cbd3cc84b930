"""What a caller gets wrong is refused by name, whatever its type, and disturbs nobody."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("unchecked_types")  # it is our own refusals that are looked at

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "warm_up": False,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
}


@pytest.fixture(scope="module")
def engine(gqa_folder: Path) -> Iterator[Any]:
    from pjengine import EngineConfig, LLMEngine

    engine = LLMEngine(EngineConfig(model=str(gqa_folder), scheduling_policy="priority", **SIZES))
    yield engine
    engine.close()


BAD_VALUES: dict[str, tuple[str, list[Any]]] = {
    "priority": ("priority must be a whole number, got", ["x", None, [1], 1.5, True, float("nan")]),
    "request_id": ("request_id must be a str, got", [5, b"x", ["a"]]),
    "params": ("sampling_params must be SamplingParams, got", [{"temperature": 0}, 0, []]),
}
BAD_ARGUMENTS = [
    ({name: value}, message) for name, (message, values) in BAD_VALUES.items() for value in values
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_bad_argument_of_add_request_is_refused(
    engine: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        engine.add_request([1, 2], **arguments)
    assert not engine.has_unfinished_requests()


def test_a_bad_argument_of_async_llm_is_refused(gqa_folder: Path) -> None:
    from pjengine import AsyncLLM

    async def ask(llm: Any, **arguments: Any) -> None:
        async for _ in llm.generate([1, 2], **arguments):
            pass

    async def main() -> None:
        async with AsyncLLM(gqa_folder, **SIZES) as llm:
            for arguments, message in BAD_ARGUMENTS:
                named = {name.replace("params", "sampling_params"): own for name, own in arguments.items()}
                with pytest.raises((ValueError, TypeError), match=message):
                    await ask(llm, **named)

    asyncio.run(main())
    with pytest.raises(TypeError, match="no setting 'block_size'; did you mean 'page_size'"):
        AsyncLLM(gqa_folder, block_size=16)


def test_requests_of_any_whole_priority_run_in_its_order(engine: Any) -> None:
    import numpy as np

    from pjengine import SamplingParams

    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    priorities = [3, np.int64(-1), 10**30, 0]
    each = [engine.add_request([1, 2], params, request_id="", priority=priorities[0])]
    each += [engine.add_request([1, 2], params, priority=priority) for priority in priorities[1:]]
    while engine.has_unfinished_requests():
        engine.step()
    starts = [generation.request.metrics.scheduled_s for generation in each]
    assert sorted(range(4), key=lambda i: starts[i]) == [1, 3, 0, 2] and each[0].request.request_id == ""


def test_a_closed_engine_refuses_everything_and_takes_no_memory(gqa_folder: Path) -> None:
    from pjengine import EngineConfig, LLMEngine

    engine = LLMEngine(EngineConfig(model=str(gqa_folder), **SIZES))
    generation = engine.add_request([1, 2])
    engine.step()
    engine.close()
    engine.close()
    assert generation.request.finish_reason == "abort"
    for call in (engine.step, engine.advance, lambda: engine.add_request([1]), engine.reset_prefix_cache):
        with pytest.raises(RuntimeError, match="this engine is closed; create another"):
            call()
    engine.abort_request("any")
    assert engine.runner.cache.k.is_deleted() and not engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"warm_up": "x"}, "warm_up must be True or False"),
        ({"disable_custom_all_reduce": 1}, "disable_custom_all_reduce must be True or False, got 1"),
        ({"prefill_first": 1}, "prefill_first must be True, False or None, got 1"),
        (
            {"prefill_first": True, "deterministic": True},
            "never has prompts beside decodes, got prefill_first",
        ),
        ({"skip_tokenizer_init": 1}, "skip_tokenizer_init must be True or False"),
        ({"gpu_memory_utilization": "x"}, r"gpu_memory_utilization must be in \(0, 1\], got 'x'"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization must be in"),
        ({"max_logprobs": 10**30}, "max_logprobs must be a whole number of at least -1 and less than"),
        ({"max_logprobs": None}, "max_logprobs must be a whole number"),
        ({"max_num_seqs": 10**30}, "max_num_seqs must be a whole number of at least 1 and less than"),
        ({"seed": None}, "seed must be a whole number"),
        ({"hf_overrides": [1]}, "hf_overrides must be a dict"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
    ],
)
def test_a_bad_setting_is_a_value_error(settings: dict[str, Any], message: str) -> None:
    from pjengine import EngineConfig

    with pytest.raises(ValueError, match=message):
        EngineConfig(model="demo", **settings)


def test_settings_of_vllm_that_are_not_here_are_taken_where_they_say_so() -> None:
    from pjengine.config import known_settings

    neutral: dict[str, Any] = {"trust_remote_code": False, "enforce_eager": False}
    neutral["pipeline_parallel_size"] = 1
    neutral |= {"quantization": None, "disable_log_stats": True, "swap_space": 0, "kv_cache_dtype": "auto"}
    assert known_settings({"seed": 3, **neutral}) == {"seed": 3}
    for name, value, wanted in (
        ("pipeline_parallel_size", 2, "pipeline_parallel_size=2 is not supported, only 1"),
        ("pipeline_parallel_size", True, "only 1"),
        ("trust_remote_code", True, "only False"),
        ("quantization", "awq", "quantization='awq' is not supported, only None"),
    ):
        with pytest.raises(NotImplementedError, match=wanted):
            known_settings({name: value})


def test_none_in_a_prompt_is_as_good_as_absent() -> None:
    from pjengine.prompts import encode_prompt

    prompt = {"prompt": None, "prompt_token_ids": [1, 2], "cache_salt": None, "multi_modal_data": None}
    encoded = encode_prompt(prompt, None, vocab_size=160, max_tokens=9)
    assert (encoded.token_ids, encoded.text, encoded.cache_salt) == ([1, 2], None, "")
    for bad in ({"prompt": None, "prompt_token_ids": None}, {"prompt_token_ids": [1], "multi_modal_data": 1}):
        with pytest.raises(ValueError, match="a prompt dict holds"):
            encode_prompt(bad, None, vocab_size=160, max_tokens=9)
