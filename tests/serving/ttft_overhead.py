"""How much later the first token comes over HTTP than from the Python API.

The same engine twice: in this process, under AsyncLLM, and in a server of its own. There are as many clients
as rows, each sends its next request when the last was answered, and rounds with and without HTTP alternate.
Run it on an idle machine: `python -m tests.serving.ttft_overhead`.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from pjengine import AsyncLLM, SamplingParams
from pjengine.sampling_params import RequestOutputKind
from pjengine.serving.http_client import Endpoint
from pjengine.serving.load_client import Demand, send
from tests.serving.process import start_server

PROMPT_LEN, OUTPUT_LEN = 32, 16
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_batched_tokens": 256,
    "decode_steps": 1,
    "enable_prefix_caching": False,
}

type Ask = Callable[[list[int]], Awaitable[float]]  # a prompt -> seconds to its first token


def api(llm: AsyncLLM) -> Ask:
    params = SamplingParams(
        temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def ask(prompt: list[int]) -> float:
        start_s, ttft_s = time.perf_counter(), None
        async with aclosing(llm.generate({"prompt_token_ids": prompt}, params)) as outputs:
            async for _ in outputs:
                ttft_s = ttft_s or time.perf_counter() - start_s
        assert ttft_s is not None
        return ttft_s

    return ask


def http(endpoint: Endpoint) -> Ask:
    async def ask(prompt: list[int]) -> float:
        body = {
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": OUTPUT_LEN,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        demand = Demand(
            content=json.dumps(body).encode(), num_prompt_tokens=PROMPT_LEN, num_output_tokens=OUTPUT_LEN
        )
        timing = await send(endpoint, demand)
        assert timing.error is None, timing.error
        return timing.ttft_s

    return ask


async def median_ttft_s(ask: Ask, chance: random.Random, num_clients: int, num_requests: int) -> float:
    """Of each client's requests, of which the first, sent all at once, do not count."""
    ttfts_s: list[float] = []

    async def client() -> None:
        for index in range(num_requests + 1):
            ttft_s = await ask([chance.randrange(10, 4096) for _ in range(PROMPT_LEN)])
            if index:
                ttfts_s.append(ttft_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())
    return statistics.median(ttfts_s)


async def compare(asks: dict[str, Ask], rounds: int, num_clients: int, num_requests: int) -> None:
    chance, found = random.Random(1), []
    for index in range(rounds + 1):
        figures = {
            name: 1e3 * await median_ttft_s(ask, chance, num_clients, num_requests)
            for name, ask in asks.items()
        }
        if index:  # in the first, programs are still made
            found.append(figures["http"] - figures["api"])
            print(json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
    print(json.dumps({"overhead_ms": round(statistics.median(found), 2), "rounds": len(found)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-clients", type=int, default=64)
    parser.add_argument("--num-requests", type=int, default=6, help="of each client in a round")
    chosen = parser.parse_args()
    settings = {**SETTINGS, "max_num_seqs": chosen.num_clients}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not False]
    flags += [f"--no-{name.replace('_', '-')}" for name, value in settings.items() if value is False]
    llm = AsyncLLM("demo", **settings)
    llm.engine.runner.wait_until_warm()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--model=demo", "--port=0", "--disable-uvicorn-access-log", *flags)
        with start_server(Path(folder), *arguments) as server:
            asks = {"api": api(llm), "http": http(Endpoint(f"{server.url}/v1"))}
            asyncio.run(compare(asks, chosen.rounds, chosen.num_clients, chosen.num_requests))
    llm.close()


if __name__ == "__main__":
    main()
