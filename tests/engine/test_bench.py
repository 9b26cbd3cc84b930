"""The benchmarks measure what their definitions say."""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "model": "tiny",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    from pjengine import LLM

    with LLM(**TINY, warm_up=False) as llm:
        yield llm


def test_sharegpt_like_is_drawn_as_defined() -> None:
    from pjengine.bench import WORKLOADS

    workload = WORKLOADS["sharegpt-like"](128256, 1000)
    lens, tokens = random.Random(0), random.Random(17)
    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        assert len(prompt) == max(4, min(1024, round(lens.lognormvariate(4.885672, 1.1))))
        assert output_len == max(4, min(1024, round(lens.lognormvariate(4.923151, 0.9))))
        assert prompt == tokens.choices(range(10, 128256), k=len(prompt))
    assert len(workload.prompts) == 1000
    assert round(statistics.mean(map(len, workload.prompts)), 1) == 222.0
    assert round(statistics.mean(workload.output_lens), 1) == 202.2
    assert workload.num_tokens - workload.num_output_tokens == sum(map(len, workload.prompts))


def test_random_1024_128_is_drawn_as_defined() -> None:
    from pjengine.bench import DEFAULT_NUM_REQUESTS, WORKLOADS

    assert DEFAULT_NUM_REQUESTS == {"sharegpt-like": 1000, "random-1024-128": 512}
    workload = WORKLOADS["random-1024-128"](32000, 512)
    tokens = random.Random(7936)
    assert workload.output_lens == [128] * 512
    assert workload.prompts == [tokens.choices(range(10, 32000), k=1024) for _ in range(512)]


def test_throughput_counts_the_tokens_of_the_workload(tiny: Any) -> None:
    from pjengine.bench import Workload, random_tokens, throughput

    workload = Workload(random_tokens(256, [5, 40, 3], seed=1), [4, 2, 6])
    result = throughput(tiny, workload, repeats=3)
    assert (result["num_requests"], result["repeats"], result["temperature"]) == (3, 3, 1.0)
    assert result["output_tokens_per_s"] * result["elapsed_s"] == pytest.approx(12)
    assert result["total_tokens_per_s"] * result["elapsed_s"] == pytest.approx(60)
    assert result["requests_per_s"] * result["elapsed_s"] == pytest.approx(3)
    assert result["recompiles_after_warmup"] == result["num_preemptions"] == 0


def test_tpot_is_what_the_tokens_after_the_first_take(tiny: Any) -> None:
    from pjengine.bench import latency

    result = latency(tiny, 2, prompt_len=16, output_len=9)
    assert result["repeats"] == 3
    assert result["tpot_ms"] == pytest.approx((result["all_tokens_ms"] - result["first_token_ms"]) / 8)
    assert result["tpot_spread_ms"] >= 0


def test_what_would_falsify_a_figure_is_refused(tiny: Any) -> None:
    from pjengine.bench import Workload, latency, throughput

    with pytest.raises(
        ValueError, match="500 prompt tokens and 20 output tokens do not fit into max_model_len=512"
    ):
        throughput(tiny, Workload([[11] * 500], [20]))
    with pytest.raises(ValueError, match="a batch of 3 does not run at once with max_num_seqs=2"):
        latency(tiny, 3)
    with pytest.raises(ValueError, match="output_len must be at least 2"):
        latency(tiny, 1, prompt_len=16, output_len=1)
    assert not tiny.engine.has_unfinished_requests()


def test_shapes_are_known_by_name() -> None:
    from pjengine.bench import check_shape

    check_shape("llama-8b")
    with pytest.raises(ValueError, match="no shape is named 'llama-9b'; there are llama-8b"):
        check_shape("llama-9b")


def test_startup_is_measured_cold_then_warm_without_a_device_in_the_parent() -> None:
    code = (
        "import json, sys; from pjengine.bench import startup; "
        "print(json.dumps(list(startup(json.loads(sys.argv[1]))))); assert 'jax' not in sys.modules"
    )
    settings = json.dumps(TINY | {"max_num_seqs": 1})
    done = subprocess.run(
        [sys.executable, "-c", code, settings], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cold, warm = json.loads(done.stdout)
    assert (cold["kind"], warm["kind"]) == ("cold", "warm")
    for result in (cold, warm):
        parts = ("import_s", "weights_s", "compile_s", "first_token_s")
        assert all(result[part] > 0 for part in parts)
        assert sum(result[part] for part in parts) == pytest.approx(result["total_s"])
        assert result["num_programs"] == 2
    assert warm["compile_s"] < cold["compile_s"]


def test_startup_hands_on_why_the_engine_refused() -> None:
    from pjengine.bench import startup

    with pytest.raises(ValueError, match="max_model_len=9999 is beyond the 512 positions"):
        list(startup(TINY | {"max_model_len": 9999}))


def test_the_host_s_share_is_measured_with_and_without_stop_ids() -> None:
    from pjengine.bench import host_share

    for num_stop_ids in (0, 3):
        result = host_share(3, num_stop_ids=num_stop_ids, num_steps=4, repeats=2)
        assert (result["num_running"], result["num_stop_ids"], result["num_steps"]) == (3, num_stop_ids, 8)
        assert 0 < result["median_ms"] <= result["p99_ms"]
    for bad in (-1, 1000):
        with pytest.raises(ValueError, match="stop"):
            host_share(1, num_stop_ids=bad, num_steps=4, repeats=1)


def test_environment_names_hardware_and_versions() -> None:
    from pjengine.bench import environment

    found = environment()
    assert {"device", "pjengine", "jax", "jaxlib", "python", "date"} == found.keys()
    assert all(found.values())
