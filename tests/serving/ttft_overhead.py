"""How much later the first token comes over HTTP than from the Python API.

The same engine twice: in this process, under AsyncLLM, and in a server of its own; rounds with and without
HTTP alternate. First at a rate that leaves the machine time: many clients hold a connection open, and each
thinks for a random time before it sends its next request, so that they come one by one, as Poisson has it.
Both ways get the very same requests at the same times. Then with the machine full: each client sends its next
request when the last was answered. Clients, server and engine share the processors, so that all that HTTP
computes adds up there.

Run it on an idle machine: `python -m tests.serving.ttft_overhead`.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pjengine import AsyncLLM, SamplingParams
from pjengine.bench import environment
from pjengine.sampling_params import RequestOutputKind
from tests.serving.process import start_server

PROMPT_LEN = 32
OUTPUT_LENS = range(1, 17)
MEAN_OUTPUT_LEN = 8  # where the machine is full: of all requests, which therefore end together
# One layer of random weights: its steps take little of the machine, so that HTTP's share of it shows.
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "hf_overrides": {"num_hidden_layers": 1},
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_batched_tokens": 256,
    "decode_steps": 1,
    "enable_prefix_caching": False,
}
IDLE_S = 4.0  # after 5, the server would close the connection
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"  # of an answer in chunks


@dataclass(frozen=True)
class Demand:
    """One request, and what its client does before it."""

    due_s: float  # from the start of the round; a client that still reads an answer is late
    prompt: list[int]
    num_output_tokens: int


type Ask = Callable[[Demand], Awaitable[float]]  # -> seconds to the first token
type Plan = Sequence[Sequence[Demand]]  # by client


def plan(seed: int, num_clients: int, num_requests: int, rate: float | None) -> Plan:
    """`num_requests` for each client, on average: at `rate` a second together, or each as soon as it can."""
    chance, due_s = random.Random(seed), 0.0
    demands: list[list[Demand]] = [[] for _ in range(num_clients)]
    for index in range(num_clients * num_requests):
        due_s += chance.expovariate(rate) if rate else 0.0
        length = chance.choice(OUTPUT_LENS) if rate else MEAN_OUTPUT_LEN
        prompt = [chance.randrange(10, 4096) for _ in range(PROMPT_LEN)]
        whose = chance.randrange(num_clients) if rate else index % num_clients
        demands[whose].append(Demand(due_s, prompt, length))
    return demands


class Api:
    """Asks the engine in this process."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def connect(self, _: AsyncExitStack) -> Ask:
        return self._ask

    async def _ask(self, demand: Demand) -> float:
        params = SamplingParams(
            temperature=0,
            max_tokens=demand.num_output_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        start_s, ttft_s, num_tokens = time.perf_counter(), None, 0
        async with aclosing(self._llm.generate({"prompt_token_ids": demand.prompt}, params)) as outputs:
            async for output in outputs:
                ttft_s = ttft_s or time.perf_counter() - start_s
                num_tokens += len(output.outputs[0].token_ids)
        assert ttft_s is not None and num_tokens == demand.num_output_tokens
        return ttft_s


class Http:
    """Asks a server, each client on a connection of its own, opened anew if it has been idle for long."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def connect(self, stack: AsyncExitStack) -> Ask:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        used_s = time.perf_counter()

        async def ask(demand: Demand) -> float:
            nonlocal reader, writer, used_s
            start_s, ttft_s, received = time.perf_counter(), None, b""
            if start_s - used_s > IDLE_S:
                writer.close()
                reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(_message(demand))
            while not received.endswith(END):
                part = await reader.read(65536)
                assert part, received
                received += part
                if ttft_s is None and b"data: " in received:
                    ttft_s = time.perf_counter() - start_s
            assert ttft_s is not None and received.startswith(b"HTTP/1.1 200 "), received
            assert b'"completion_tokens":%d,' % demand.num_output_tokens in received, received
            used_s = time.perf_counter()
            return ttft_s

        stack.callback(lambda: writer.close())
        return ask


def _message(demand: Demand) -> bytes:
    body = {
        "prompt": demand.prompt,
        "temperature": 0,
        "max_tokens": demand.num_output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def ttfts_s(way: Api | Http, plan: Plan) -> list[float]:
    """Of all requests of a round."""
    found: list[float] = []

    async def client(ask: Ask, demands: Sequence[Demand], start_s: float) -> None:
        for demand in demands:
            wait_s = start_s + demand.due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            found.append(await ask(demand))

    async with AsyncExitStack() as stack:
        asks = [await way.connect(stack) for _ in plan]
        async with asyncio.TaskGroup() as group:
            start_s = time.perf_counter()
            for ask, demands in zip(asks, plan, strict=True):
                group.create_task(client(ask, demands, start_s))
    return found


async def compare(ways: dict[str, Api | Http], chosen: argparse.Namespace, rate: float | None) -> None:
    """Prints what both take at the median, for each round and over all of them."""
    all_s: dict[str, list[float]] = {name: [] for name in ways}
    num_requests = chosen.num_requests if rate else 6
    for index in range(chosen.rounds + 1):
        own_s: dict[str, list[float]] = {}
        # In the first, programs are still made, and what is used first is loaded.
        for name, way in ways.items():
            demands = plan(index, chosen.num_clients, num_requests if index else 2, rate)
            own_s[name] = await ttfts_s(way, demands)
        if index:
            for name in ways:
                all_s[name] += own_s[name]
            show(rate, index, own_s)
    show(rate, None, all_s, clients=chosen.num_clients, **environment())


def show(rate: float | None, index: int | None, found_s: dict[str, list[float]], **more: Any) -> None:
    figures: dict[str, Any] = {"bench": "ttft_overhead", "requests_per_s": rate, "round": index}
    medians = {name: 1e3 * statistics.median(values) for name, values in found_s.items()}
    figures |= {f"median_ttft_{name}_ms": round(value, 2) for name, value in medians.items()}
    figures["overhead_ms"] = round(medians["http"] - medians["api"], 2)
    figures["num_requests"] = len(found_s["http"])
    print(json.dumps(figures | more), flush=True)


def _flag(name: str, value: Any) -> str:
    name = name.replace("_", "-")
    if value is False:
        return f"--no-{name}"
    return f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-clients", type=int, default=64)
    parser.add_argument("--num-requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--rates", default="10,full", help="requests a second, and `full` for all at once")
    chosen = parser.parse_args()
    settings = {**SETTINGS, "max_num_seqs": chosen.num_clients}
    flags = [_flag(name, value) for name, value in settings.items()]
    llm = AsyncLLM("demo", **settings)
    llm.engine.runner.wait_until_warm()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--model=demo", "--port=0", "--disable-uvicorn-access-log", *flags)
        with start_server(Path(folder), *arguments) as server:
            ways: dict[str, Api | Http] = {"api": Api(llm), "http": Http(*server.address)}
            for rate in chosen.rates.split(","):
                asyncio.run(compare(ways, chosen, None if rate == "full" else float(rate)))
    llm.close()


if __name__ == "__main__":
    main()
