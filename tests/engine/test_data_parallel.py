"""Engines beside each other give the tokens that one gives."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

# One layer of random weights under the packaged tokenizer.
SIZES: dict[str, Any] = {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 1}, "dtype": "float32"}
SIZES |= {"max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_steps": 1, "warm_up": False}


def requests() -> tuple[list[list[int]], list[Any]]:
    """Of every way to decode, short ones and long ones, some with the same beginning."""
    from pjengine import SamplingParams, StructuredOutputsParams

    rng, some = random.Random(0), dict[str, Any](max_tokens=10, ignore_eos=True)
    form = StructuredOutputsParams(regex=r"[a-z]{3}-\d{4}")
    params = [
        SamplingParams(temperature=0, **some),
        SamplingParams(temperature=0.8, seed=3, **some),
        SamplingParams(temperature=1, n=2, seed=4, **some),
        SamplingParams(temperature=0, use_beam_search=True, best_of=2, n=2, max_tokens=6),
        SamplingParams(temperature=1, seed=5, max_tokens=20, structured_outputs=form),
        SamplingParams(temperature=1, **some),  # its seed is drawn when it arrives
    ]
    beginning = rng.choices(range(300, 4000), k=32)
    prompts = [beginning[: 16 * (i % 3)] + rng.choices(range(300, 4000), k=1 + 7 * i) for i in range(12)]
    return prompts, params * 2


def answers(llm: Any) -> list[Any]:
    prompts, params = requests()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    again = llm.generate(prompts[:4], params[:4], use_tqdm=False)  # now with prefixes in the cache
    return [[one.token_ids for one in output.outputs] for output in [*outputs, *again]]


@pytest.fixture(scope="module")
def replicated() -> Iterator[Any]:
    from pjengine import LLM

    with LLM("demo", data_parallel_size=2, **SIZES) as llm:
        yield llm


@pytest.mark.slow
def test_every_way_to_decode_gives_the_tokens_of_one_engine(replicated: Any) -> None:
    from pjengine import LLM

    with LLM("demo", **SIZES) as alone:
        wanted = answers(alone)
        plan = alone.engine.memory_plan
    assert answers(replicated) == wanted
    engine = replicated.engine
    assert engine.memory_plan == plan
    for own in engine.engines:
        own.scheduler.check_integrity()
        assert own.num_generation_tokens > 50  # neither has computed all
    assert sum(own.scheduler.num_cache_hits for own in engine.engines) > 0


def test_streams_grow_side_by_side(replicated: Any) -> None:
    from pjengine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found: dict[int, list[int]] = {index: [] for index in range(4)}
    for chunk in replicated.stream([[500 + index] * 4 for index in found], params):
        found[chunk.index] += chunk.token_ids
    whole = replicated.generate([[500 + index] * 4 for index in found], params, use_tqdm=False)
    assert list(found.values()) == [output.outputs[0].token_ids for output in whole]


def test_each_engine_has_its_devices_and_the_same_weights(replicated: Any) -> None:
    import jax

    first, second = (own.runner for own in replicated.engine.engines)
    for left, right in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        assert left.devices() == {jax.devices()[0]} and right.devices() == {jax.devices()[1]}
        np.testing.assert_array_equal(left, right)
    assert first.cache.k.devices() == {jax.devices()[0]} and second.cache.k.devices() == {jax.devices()[1]}
    assert replicated.params["embed"] is first.params["embed"]


def test_parameters_that_are_divided_are_copied_part_by_part() -> None:
    import jax
    from jax.sharding import NamedSharding

    from pjengine.sharding.mesh import choose_device_groups, make_mesh
    from pjengine.sharding.partition import copied, partition

    here, there = (make_mesh(devices) for devices in choose_device_groups(2, 2))
    values = np.arange(24.0).reshape(4, 6)
    for path in ("embed", "final_norm"):
        leaf = jax.device_put(values, NamedSharding(here, partition(path, 2)))
        copy = copied({"x": leaf}, there)["x"]
        np.testing.assert_array_equal(copy, values)
        assert copy.sharding.spec == leaf.sharding.spec
        assert copy.devices() == set(jax.devices()[2:4])


def test_what_cannot_be_is_refused_with_the_counts() -> None:
    from pjengine import LLM, EngineConfig, LLMEngine

    with pytest.raises(
        ValueError, match="data_parallel_size=3 with tensor_parallel_size=2 needs 6 devices, f"
    ):
        LLM("demo", data_parallel_size=3, tensor_parallel_size=2, **SIZES)
    for size in (0, True):
        with pytest.raises(ValueError, match="data_parallel_size must be a whole number of at least 1"):
            EngineConfig(model="demo", data_parallel_size=size)
    with pytest.raises(ValueError, match="an LLMEngine is one engine, got data_parallel_size=2: use LLM"):
        LLMEngine(EngineConfig(model="demo", data_parallel_size=2))


def test_a_benchmark_of_one_batch_refuses_several_engines(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.serving.cli import main

    for name in ("latency", "profile"):
        assert main(["bench", name, "--shape", "tiny", "--load-format", "dummy", "-dp", "2"]) == 2
        assert "times the steps of one engine, got data_parallel_size=2" in capsys.readouterr().err


def test_the_plan_says_of_which_devices_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from pjengine.serving.cli import main

    assert main(["plan", "llama-8b", "--gpu", "h200", "-dp", "2", "-tp", "4"]) == 0
    assert "of 2 engines on 8 devices, each device as above" in capsys.readouterr().out


def test_each_engine_explains_its_own_schedule(replicated: Any) -> None:
    answers(replicated)
    with pytest.raises(ValueError, match=r"2 engines has steps of its own: explain_schedule\(engine=0\)"):
        replicated.explain_schedule()
    records = [replicated.explain_schedule(engine=i, num_steps=1000) for i in (0, 1)]
    ids = [{own.request_id for own in record.requests} for record in records]
    assert all(ids) and not ids[0] & ids[1]
