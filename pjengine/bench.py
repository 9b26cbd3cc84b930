"""Offline benchmarks: throughput, latency, start-up. Workloads and definitions as in README.

Prompts are random token ids, outputs have fixed lengths, nothing is detokenized.
"""

import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pjengine.request import SamplingParams

FIRST_TOKEN_ID = 10  # below are the special tokens of most vocabularies


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens each is answered with."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def num_tokens(self) -> int:
        return self.num_output_tokens + sum(map(len, self.prompts))


def sharegpt_like(vocab_size: int, num_requests: int = 1000) -> Workload:
    """Log-normal lengths fitted to ShareGPT: means of 222 prompt and 202 output tokens."""
    rng = random.Random(0)

    def clip(length: float) -> int:
        return max(4, min(1024, round(length)))

    lens = [
        (clip(rng.lognormvariate(4.885672, 1.1)), clip(rng.lognormvariate(4.923151, 0.9)))
        for _ in range(num_requests)
    ]
    prompts = _random_tokens(vocab_size, [prompt for prompt, _ in lens], seed=17)
    return Workload(prompts, [output for _, output in lens])


def random_1024_128(vocab_size: int, num_requests: int = 512) -> Workload:
    """Prompts of 1024 tokens, outputs of 128."""
    return Workload(_random_tokens(vocab_size, [1024] * num_requests, seed=7936), [128] * num_requests)


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "sharegpt-like": sharegpt_like,
    "random-1024-128": random_1024_128,
}
DEFAULT_NUM_REQUESTS = {"sharegpt-like": 1000, "random-1024-128": 512}


def _random_tokens(vocab_size: int, lens: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(FIRST_TOKEN_ID, vocab_size), k=length) for length in lens]


def throughput(llm: Any, workload: Workload, *, temperature: float = 1.0) -> dict[str, float]:
    """All requests at once: from the call of `generate` to its return."""
    params = [_fixed_length(length, temperature) for length in workload.output_lens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    got = [len(output.outputs[0].token_ids) for output in outputs]
    if got != workload.output_lens:
        raise RuntimeError("a request ended early: the figures would mean nothing")
    return {
        "num_requests": len(got),
        "elapsed_s": elapsed,
        "requests_per_s": len(got) / elapsed,
        "output_tokens_per_s": workload.num_output_tokens / elapsed,
        "total_tokens_per_s": workload.num_tokens / elapsed,
    }


def latency(
    llm: Any, batch_size: int, *, prompt_len: int = 512, output_len: int = 128, repeats: int = 3
) -> dict[str, float]:
    """Greedy decoding of one batch. TPOT = (T(all tokens) - T(1 token)) / (tokens - 1), medians."""
    vocab_size = llm.engine.model_config.vocab_size
    prompts = _random_tokens(vocab_size, [prompt_len] * batch_size, seed=0)

    def run(length: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, _fixed_length(length, 0.0), use_tqdm=False)
        return time.perf_counter() - start

    run(output_len)  # the first pass touches fresh pages and programs
    first = [run(1) for _ in range(repeats)]
    whole = [run(output_len) for _ in range(repeats)]
    tpot_ms = [1e3 * (all_ - one) / (output_len - 1) for all_, one in zip(sorted(whole), sorted(first), strict=True)]
    return {
        "batch_size": batch_size,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "first_token_ms": 1e3 * statistics.median(first),
        "tpot_ms": 1e3 * (statistics.median(whole) - statistics.median(first)) / (output_len - 1),
        "tpot_spread_ms": max(tpot_ms) - min(tpot_ms),
    }


_STARTUP = """
import json, sys, time
start = float(sys.argv[1])
settings = json.loads(sys.argv[2])
cache_dir = sys.argv[3]
import jax
jax.config.update("jax_compilation_cache_dir", cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from pjengine import LLM, SamplingParams
import pjengine.engine
imported = time.time()
llm = LLM(**settings)
ready = time.time()
llm.generate([[11]], SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
first = time.time()
compile_s = llm.engine.runner.compile_s
print(json.dumps({
    "import_s": imported - start,
    "weights_s": ready - imported - compile_s,
    "compile_s": compile_s,
    "first_token_s": first - ready,
    "total_s": first - start,
    "num_programs": len(llm.engine.runner.programs),
}))
"""


def startup(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Process start to the first token of a one-token request: cold (no compilation cache), then warm."""
    with tempfile.TemporaryDirectory() as cache_dir:
        for kind in ("cold", "warm"):
            arguments = [sys.executable, "-c", _STARTUP, repr(time.time()), json.dumps(settings), cache_dir]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"the engine did not start:\n{done.stderr[-4000:]}")
            yield {"kind": kind, **json.loads(done.stdout.splitlines()[-1])}


def _fixed_length(length: int, temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=length, temperature=temperature, ignore_eos=True, detokenize=False)


def environment() -> dict[str, str]:
    """What a figure means nothing without: hardware and versions."""
    import jax
    import jaxlib

    import pjengine

    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform == "gpu" else platform.processor() or platform.machine(),
        "pjengine": pjengine.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
