"""What operators ask: models, health, tokens, metrics."""

import math
import re
from typing import Any

import pytest

from tests.serving.client import Client, make_client


def test_models_are_listed_under_each_of_their_names(llm: Any) -> None:
    client = make_client(llm, served_model_names=("a/b", "c"))
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["a/b", "c"]
    assert listed["data"][0]["root"] == "demo" and listed["data"][0]["max_model_len"] == 1024
    assert client.get("/v1/models/a/b").json() == listed["data"][0]
    assert client.get("/v1/models/demo").status_code == 404
    body = {"prompt": "a", "max_tokens": 1}
    assert client.answer("/v1/completions", **body)["model"] == "a/b"
    assert client.answer("/v1/completions", **body, model="c")["model"] == "c"


def test_health_version_and_load_answer(client: Client) -> None:
    import pjengine

    assert client.get("/health").status_code == 200
    assert client.get("/ping").status_code == client.send("POST", "/ping").status_code == 200
    assert client.get("/version").json() == {"version": pjengine.__version__}
    assert client.get("/load").json() == {"server_load": 0}


def test_texts_become_tokens_and_tokens_texts(client: Client) -> None:
    tokenizer = client.service.llm.engine.tokenizer
    answer = client.answer("/tokenize", prompt="import os", return_token_strs=True)
    tokens = tokenizer.encode("import os")
    assert answer == {
        "count": len(tokens),
        "max_model_len": 1024,
        "tokens": tokens,
        "token_strs": tokenizer.hf.convert_ids_to_tokens(tokens),
    }
    assert client.answer("/tokenize", prompt="")["count"] == 0
    assert client.answer("/detokenize", tokens=[*tokens, 0])["prompt"] == "import os<|endoftext|>"
    for refused in ([4096], [0] * 1025):
        status, error = client.error("/detokenize", tokens=refused)
        assert (status, error["param"]) == (400, "tokens")
    assert "at most max_model_len=1024, got 1025" in error["message"]


def read_metrics(client: Client, prefix: str = "pjengine") -> dict[str, float]:
    """By name and the labels that are not the same for all."""
    values = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(rf"{prefix}:(\w+){{(.*)}} (\S+)", line)
            assert match, line
            labels = re.sub(r'(engine="0"|model_name="demo"),?', "", match[2]).rstrip(",")
            values[f"{match[1]} {labels}".strip()] = float(match[3])
    return values


def test_metrics_count_what_was_asked_and_answered(llm: Any) -> None:
    client = make_client(llm)
    before = read_metrics(client)
    usages = [
        client.answer("/v1/completions", prompt=["a", "b c"], max_tokens=5, n=2, ignore_eos=True)["usage"],
        client.answer("/v1/completions", prompt="x = 1\n", max_tokens=40, stop_token_ids=list(range(4096)))[
            "usage"
        ],
        client.events(
            "/v1/completions",
            prompt="a b",
            max_tokens=6,
            ignore_eos=True,
            stream_options={"include_usage": True},
        )[-1]["usage"],
    ]
    after = read_metrics(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    num_output = sum(usage["completion_tokens"] for usage in usages)
    assert grown("generation_tokens_total") == num_output == 5 * 4 + 1 + 6
    assert grown("prompt_tokens_total") == 2 * usages[0]["prompt_tokens"] + sum(
        u["prompt_tokens"] for u in usages[1:]
    )
    assert grown('request_success_total finished_reason="length"') == 5
    assert grown('request_success_total finished_reason="stop"') == 1
    assert grown("request_generation_tokens_sum") == num_output
    assert grown("request_max_num_generation_tokens_sum") == 5 + 5 + 1 + 6
    assert grown("request_params_n_sum") == 2 + 2 + 1 + 1
    assert grown("request_params_max_tokens_sum") == 5 + 5 + 40 + 6
    assert grown("request_prompt_tokens_sum") == sum(usage["prompt_tokens"] for usage in usages)
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):
        assert grown(f"{name}_count") == 4 and grown(f"{name}_sum") >= 0
    assert grown("request_time_per_output_token_seconds_count") == 3  # not of the answer of one token
    assert 1 <= grown("inter_token_latency_seconds_count") <= 5
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[name] == 0
    assert after["prefix_cache_queries_total"] >= grown("prompt_tokens_total")
    assert not math.isnan(after["prefix_cache_hits_total"] + after["num_preemptions_total"])
    assert after["recompiles_after_warmup_total"] == llm.engine.runner.recompiles_after_warmup
    assert any(name.startswith("kernel_backend_info backend=") for name in after)
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert after[f"spec_decode_num_{name}_total"] == 0


def test_what_was_refused_is_no_request_that_has_ended(llm: Any) -> None:
    client = make_client(llm)
    for body in ({"prompt": [5000]}, {"prompt": "a", "priority": 1}, {"prompt": "a", "temperature": 3}):
        assert client.error("/v1/completions", **body)[0] == 400
    after = read_metrics(client)
    assert not any(name.startswith("request_success") for name in after)
    assert after["e2e_request_latency_seconds_count"] == 0


def test_metrics_can_have_vllms_prefix(llm: Any) -> None:
    assert "num_requests_running" in read_metrics(make_client(llm, metrics_prefix="vllm"), "vllm")


@pytest.mark.parametrize("is_running", [False, True])
def test_the_line_of_figures_says_what_has_happened(
    llm: Any, is_running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    from pjengine.stats import log_stats, read_stats

    before = read_stats(llm.engine)
    now = before
    if is_running:
        now = dataclasses.replace(
            before,
            num_running=3,
            num_waiting=2,
            kv_cache_usage=0.25,
            num_prompt_tokens=before.num_prompt_tokens + 100,
            num_generation_tokens=before.num_generation_tokens + 50,
            num_cache_queries=before.num_cache_queries + 80,
            num_cache_hits=before.num_cache_hits + 20,
        )
    with caplog.at_level("INFO", logger="pjengine.stats"):
        log_stats(before, now, 10.0)
    line = (
        "prompt 10.0 tokens/s, generation 5.0 tokens/s, running 3, waiting 2, preempted 0, KV usage 25.0%, "
        "prefix hits 25.0%"
    )
    assert [record.message for record in caplog.records] == ([line] if is_running else [])
