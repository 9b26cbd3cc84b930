"""Many clients at once, a third of whom leave at a moment of their own."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pjengine.serving.http_client import Endpoint, events
from tests.serving.process import Server, start_server

NUM_DISTINCT = 40  # requests; each is first answered alone
NUM_REQUESTS = 5000
NUM_STREAMS = 500  # at once

# 64 rows and 64 pages, which is too few for as many of the longer requests: some wait for them.
ARGUMENTS = (
    "--load-format=dummy",
    '--hf-overrides={"num_hidden_layers": 1}',
    "--dtype=float32",
    "--max-model-len=128",
    "--max-num-seqs=64",
    "--max-num-batched-tokens=256",
    "--kv-cache-memory-bytes=1056000",
    "--decode-steps=1",
    "--disable-uvicorn-access-log",
)

# Counts the pages at the end.
SERVE = """
import sys
from pjengine.engine import LLMEngine
from pjengine.serving.cli import main

close = LLMEngine.close

def check_and_close(engine):
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    print("all pages are back", flush=True)
    close(engine)

LLMEngine.close = check_and_close
sys.exit(main(["serve", "demo", "--port=0", *sys.argv[1:]]))
"""


def distinct_requests(chance: random.Random) -> list[dict[str, Any]]:
    """Greedy and sampled ones; some prompts begin alike and share pages."""

    def token_ids(count: int) -> list[int]:
        return [chance.randrange(10, 4096) for _ in range(count)]

    shared = [token_ids(48) for _ in range(3)]
    made = []
    for index in range(NUM_DISTINCT):
        prompt = token_ids(chance.choice([1, 3, 17, 40]))
        made.append(
            {
                "prompt": prompt if index % 3 else chance.choice(shared) + prompt,
                "max_tokens": chance.choice([3, 5, 8, 12]),
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                **({"temperature": 0} if index % 2 else {"temperature": 1, "top_p": 0.9, "seed": index}),
            }
        )
    return made


@dataclass
class Answer:
    """What a client has seen of its stream."""

    ids: set[str] = field(default_factory=set)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def add(self, event: dict[str, Any]) -> None:
        [choice] = event["choices"]
        self.ids.add(event["id"])
        self.token_ids += choice["token_ids"]
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"]

    def is_beginning_of(self, other: "Answer") -> bool:
        return other.text.startswith(self.text) and other.token_ids[: len(self.token_ids)] == self.token_ids


async def ask(
    endpoint: Endpoint, body: dict[str, Any], answer: Answer, num_events: int | None = None
) -> None:
    """Reads an answer: all of it, or so many events."""
    async with endpoint.request("POST", "/completions", json.dumps(body).encode()) as reply:
        async with aclosing(events(await reply.check())) as parts:
            if num_events != 0:
                async for event in parts:
                    answer.add(event)
                    num_events = None if num_events is None else num_events - 1
                    if num_events == 0:
                        return


@dataclass
class Load:
    """Sends requests, `NUM_STREAMS` at a time, and compares each answer with that of the request alone."""

    server: Server
    requests: list[dict[str, Any]]
    chance: random.Random
    alone: list[Answer] = field(default_factory=list)
    num_whole: int = 0
    num_left: int = 0
    rss_bytes: list[int] = field(default_factory=list)  # of the server, after each request

    async def run(self) -> None:
        self.endpoint = Endpoint(f"{self.server.url}/v1")
        for body in self.requests:
            answer = Answer()
            await ask(self.endpoint, body, answer)
            assert answer.finish_reason == "length" and len(answer.token_ids) == body["max_tokens"]
            self.alone.append(answer)
        todo = iter(range(NUM_REQUESTS))
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_STREAMS):
                group.create_task(self._client(todo))

    async def _client(self, todo: Iterator[int]) -> None:
        statm = Path(f"/proc/{self.server.process.pid}/statm")
        for index in todo:
            await self._one(index)
            self.rss_bytes.append(int(statm.read_text().split()[1]) * 4096)

    async def _one(self, index: int) -> None:
        which, leaves = self.chance.randrange(NUM_DISTINCT), self.chance.random()
        body = {**self.requests[which], "request_id": f"load-{index}"}
        answer, alone = Answer(), self.alone[which]
        if leaves < 1 / 6:  # after a time, in which it may have been sent, be in line, run, or have ended
            with suppress(TimeoutError):
                async with asyncio.timeout(self.chance.uniform(0, 4)):
                    await ask(self.endpoint, body, answer)
        elif leaves < 1 / 3:  # before the answer, or after some of it
            await ask(self.endpoint, body, answer, num_events=self.chance.randrange(4))
        else:
            await ask(self.endpoint, body, answer)
            assert answer.finish_reason == "length", (body, answer)
        assert answer.ids <= {f"cmpl-load-{index}"}
        if answer.finish_reason is None:
            self.num_left += 1
            assert answer.is_beginning_of(alone), (body, answer, alone)
        else:
            self.num_whole += 1
            assert (answer.token_ids, answer.text) == (alone.token_ids, alone.text), (body, answer, alone)


async def get(endpoint: Endpoint, path: str) -> str:
    async with endpoint.request("GET", path) as reply:
        return (await (await reply.check()).read()).decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_500_streams_nothing_is_lost_or_crossed_and_nothing_stays_behind(tmp_path: Path) -> None:
    chance = random.Random(1)
    with start_server(tmp_path, *ARGUMENTS, code=SERVE) as server:
        load = Load(server, distinct_requests(chance), chance)
        asyncio.run(load.run())
        root = Endpoint(server.url)
        metrics = asyncio.run(get(root, "/metrics"))
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert re.search(rf"pjengine:{name}{{.*}} 0\.0\n", metrics), metrics
        assert json.loads(asyncio.run(get(root, "/load"))) == {"server_load": 0}
        server.terminate()
        assert server.wait() == 0
        assert "all pages are back" in server.log
        assert "Traceback" not in server.log and "ERROR" not in server.log
    assert load.num_whole + load.num_left == NUM_REQUESTS
    assert NUM_REQUESTS / 4 < load.num_left < NUM_REQUESTS / 2.5, load.num_left
    # The floor: a compilation takes tens of MB for a moment. Compared over three eighths of the requests.
    part = NUM_REQUESTS // 8
    before, last = min(load.rss_bytes[4 * part : 5 * part]), min(load.rss_bytes[7 * part :])
    assert last < 1.05 * before, (before, last)
