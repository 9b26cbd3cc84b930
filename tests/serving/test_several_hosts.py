"""Two processes on CPU devices that gloo joins: together they give the tokens of one, and end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.golden import golden as goldens
from tests.serving.process import ROOT, Server, start_server, wait_until

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}
SIZES |= {"dtype": "float32", "warm_up": False, "decode_steps": 1, "kv_cache_memory_bytes": 2**20}
OPTIONS = ("--max-num-seqs=4", "--max-num-batched-tokens=32", "--skip-tokenizer-init", "--dtype=float32")
OPTIONS += ("--no-warm-up", "--decode-steps=1", "--kv-cache-memory-bytes=1048576")
MUST_END_S = 30  # a process that has lost another

# Every host runs the same: the worker's never comes past the first statement.
ALL_WAYS = """
import json, sys
from pjengine import LLM, SamplingParams
from tests.serving.test_several_hosts import answers
with LLM(**json.loads(sys.argv[1])) as llm:
    print(json.dumps(answers(llm)), file=sys.stderr)
print("closed", file=sys.stderr)
"""
ENDLESS = """
import json, sys
from pjengine import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
while True:
    for chunk in llm.stream([1, 2, 3], SamplingParams(max_tokens=64, ignore_eos=True)):
        print("chunk", file=sys.stderr, flush=True)
"""


def answers(llm: Any) -> list[Any]:
    """Of every kind of program, in a few requests; and that a request that cannot run leaves the engine well."""
    from pjengine import SamplingParams

    some: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, **some),
        SamplingParams(temperature=0.8, seed=3, logprobs=2, logit_bias={7: 5.0}, **some),
        SamplingParams(temperature=0, use_beam_search=True, best_of=2, n=2, max_tokens=4),
    ]
    prompt = goldens.load("gqa").prompt
    outputs = llm.generate([prompt[: 20 + i] for i in range(len(params))], params, use_tqdm=False)
    streamed = [token for chunk in llm.stream(prompt[:20], params[0]) for token in chunk.token_ids]
    refusal = ""
    if llm.engine.config.nnodes > 1:
        try:
            llm.generate(prompt, SamplingParams(logits_processors=[never]), use_tqdm=False)
        except ValueError as error:
            refusal = str(error)
    again = llm.generate(prompt[:20], params[0], use_tqdm=False)
    texts = [[one.token_ids for one in output.outputs] for output in [*outputs, *again]]
    return [texts, streamed, refusal]


def never(token_ids: Any, logits: Any) -> Any:
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    goldens.write_checkpoint(goldens.load("gqa"), folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Any]:
    from pjengine import LLM

    with LLM(folder, **SIZES) as llm:
        return answers(llm)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def two_scripts(code: str, folder: Path, tmp_path: Path) -> Iterator[list[Server]]:
    """The same script on two hosts; first the head."""
    settings = {"model": str(folder), **SIZES, "tensor_parallel_size": 2, "nnodes": 2}
    settings["coordinator"] = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            (own := tmp_path / str(rank)).mkdir()
            given = json.dumps({**settings, "node_rank": rank})
            started.append(stack.enter_context(start_server(own, given, code=code)))
        yield started


@contextmanager
def two_servers(folder: Path, tmp_path: Path, *options: str) -> Iterator[list[Server]]:
    """`pjengine serve` on two hosts; first the head."""
    together = ("--tensor-parallel-size=2", "--nnodes=2", f"--coordinator=127.0.0.1:{free_port()}", "--port=0")
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            (own := tmp_path / str(rank)).mkdir()
            arguments = ("serve", str(folder), *OPTIONS, *together, f"--node-rank={rank}", *options)
            module = "pjengine.serving.cli"
            started.append(stack.enter_context(start_server(own, *arguments, module=module)))
        yield started


def complete(server: Server, prompt: list[int], **more: Any) -> Any:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more}
    return server.request("POST", "/v1/completions", body)


def test_two_hosts_give_the_tokens_of_one_and_end_together(
    folder: Path, alone: list[Any], tmp_path: Path
) -> None:
    with two_scripts(ALL_WAYS, folder, tmp_path) as (head, worker):
        assert head.wait(120) == 0, head.log
        assert worker.wait(30) == 0, worker.log
        lines = head.log.splitlines()
    texts, streamed, refusal = json.loads(next(line for line in lines if line.startswith("[[[")))
    assert [texts, streamed] == alone[:2]
    assert "logits_processors are functions of this process" in refusal
    assert "closed" in lines and "closed" not in worker.log
