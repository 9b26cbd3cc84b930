"""A server of two engines, in a process of its own."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from tests.serving.process import RANDOM, start_server


def numbers(text: str, name: str) -> list[float]:
    """Of each engine, in order."""
    pattern = rf'pjengine:{name}{{engine="(\d)",model_name="demo"[^}}]*}} (\S+)'
    found = sorted(re.findall(pattern, text))
    assert [engine for engine, _ in found] == ["0", "1"], (name, found)
    return [float(value) for _, value in found]


def test_two_engines_answer_as_one_and_are_counted_apart(tmp_path: Path) -> None:
    with start_server(tmp_path, "--model=demo", "--port=0", "-dp", "2", *RANDOM) as server:
        fields: dict[str, Any] = {"model": "demo", "max_tokens": 8, "temperature": 1, "seed": 1}
        fields["extra_body"] = {"ignore_eos": True}

        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            def ask(index: int) -> str:
                return client.completions.create(prompt="import os\n" * (1 + index), **fields).choices[0].text

            def listen(index: int) -> str:
                stream = client.completions.create(prompt="import os\n" * (1 + index), stream=True, **fields)
                return "".join(chunk.choices[0].text for chunk in stream)

            with ThreadPoolExecutor(8) as pool:
                together = list(pool.map(ask, range(8)))
                streamed = list(pool.map(listen, range(8)))
            assert together == streamed == [ask(index) for index in range(8)]

        def get(path: str) -> str:
            with urllib.request.urlopen(f"{server.url}{path}", timeout=30) as reply:
                return reply.read().decode()

        metrics = get("/metrics")
        tokens = numbers(metrics, "generation_tokens_total")
        assert sum(tokens) == 3 * 8 * 8 and min(tokens) >= 8
        assert sum(numbers(metrics, "e2e_request_latency_seconds_count")) == 24
        assert numbers(metrics, "request_generation_tokens_sum") == tokens
        assert numbers(metrics, "num_requests_running") == [0, 0]
        assert get("/health") == "" and '"max_num_seqs":8' in get("/dashboard/stats")
        assert "engine 0: " in server.log and "engine 1: " in server.log
        server.terminate()
        assert server.wait() == 0, server.log
