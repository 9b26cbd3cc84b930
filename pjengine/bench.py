"""Offline benchmarks: throughput, latency, start-up, the host's share of a step, the kernels.

Prompts are random token ids, outputs have fixed lengths, nothing is detokenized. `pjengine bench` is
the way in; run as `python -m pjengine.bench`, this module is one engine start of `startup`.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pjengine.config import EngineConfig
from pjengine.sampling_params import SamplingParams

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
    prompts = random_tokens(vocab_size, [prompt for prompt, _ in lens], seed=17)
    return Workload(prompts, [output for _, output in lens])


def random_1024_128(vocab_size: int, num_requests: int = 512) -> Workload:
    """Prompts of 1024 tokens, outputs of 128."""
    return Workload(random_tokens(vocab_size, [1024] * num_requests, seed=7936), [128] * num_requests)


WORKLOADS: Mapping[str, Callable[[int, int], Workload]] = {
    "sharegpt-like": sharegpt_like,
    "random-1024-128": random_1024_128,
}
DEFAULT_NUM_REQUESTS: Mapping[str, int] = {"sharegpt-like": 1000, "random-1024-128": 512}


def random_tokens(vocab_size: int, lens: list[int], seed: int) -> list[list[int]]:
    """One list of token ids for each length."""
    rng = random.Random(seed)
    return [rng.choices(range(FIRST_TOKEN_ID, vocab_size), k=length) for length in lens]


def check_shape(name: str) -> None:
    """Raises ValueError unless `name` is one of the named shapes."""
    from pjengine.models.shapes import SHAPES

    if name not in SHAPES:
        raise ValueError(f"no shape is named {name!r}; there are {', '.join(SHAPES)}")


def throughput(
    llm: Any, workload: Workload, *, temperature: float = 1.0, repeats: int = 1
) -> dict[str, float | int]:
    """All requests at once, from the call of `generate` to its return; medians over `repeats`.

    Raises:
      ValueError: a request of the workload is longer than `max_model_len`.
    """
    from pjengine.stats import read_stats

    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        _check_length(llm, len(prompt), output_len)
    _warm_up(llm)
    params = [fixed_length(length, temperature) for length in workload.output_lens]
    elapsed: list[float] = []
    num_preemptions, before = 0, draft_counts(llm)
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = llm.generate(workload.prompts, params, use_tqdm=False)
        elapsed.append(time.perf_counter() - start)
        if [len(output.outputs[0].token_ids) for output in outputs] != workload.output_lens:
            raise RuntimeError("a request ended early: the figures would mean nothing")
        num_preemptions += sum(output.metrics.num_preemptions for output in outputs)
    median_s = statistics.median(elapsed)
    return {
        "num_requests": len(params),
        "temperature": temperature,
        "repeats": repeats,
        "elapsed_s": median_s,
        "elapsed_spread_s": max(elapsed) - min(elapsed),
        "requests_per_s": len(params) / median_s,
        "output_tokens_per_s": workload.num_output_tokens / median_s,
        "total_tokens_per_s": workload.num_tokens / median_s,
        "num_preemptions": num_preemptions,
        "recompiles_after_warmup": read_stats(llm.engine).num_recompiles,
        **draft_figures(llm, before),
    }


def latency(
    llm: Any,
    batch_size: int,
    *,
    prompt_len: int = 512,
    output_len: int = 128,
    repeats: int = 3,
    sampling: Mapping[str, Any] | None = None,
    is_copying: bool = False,
) -> dict[str, Any]:
    """Decoding of one batch: TPOT = (T(all tokens) - T(1 token)) / (tokens - 1), T being medians.

    `sampling` are fields of SamplingParams; without, it is greedy. Of a beam search the rate is that of the
    sequences, and that of all beams is beside it. With `is_copying` the answers copy a part of their
    prompts (see `copied_prompts`), of which there is half of `prompt_len`.

    Raises:
      ValueError: the batch does not run at once, or its requests are longer than `max_model_len`.
    """
    num_beams = (sampling or {}).get("best_of", 1)
    check_batch(llm, batch_size, prompt_len, output_len, num_beams)
    _warm_up(llm)
    prompts = random_tokens(llm.engine.model_config.vocab_size, [prompt_len] * batch_size, seed=0)
    if is_copying:
        if output_len > prompt_len // 2:
            raise ValueError(f"an answer copies up to half of prompt_len={prompt_len}, got {output_len}")
        prompts = copied_prompts(llm, prompts)

    def run(length: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, fixed_length(length, **(sampling or {})), use_tqdm=False)
        return time.perf_counter() - start

    run(output_len)  # the first pass touches fresh pages and programs
    before = draft_counts(llm)
    first = [run(1) for _ in range(repeats)]
    whole = [run(output_len) for _ in range(repeats)]
    steps = output_len - 1
    tpot_s = (statistics.median(whole) - statistics.median(first)) / steps
    range_s = max(whole) - min(whole) + max(first) - min(first)
    return {
        "batch_size": batch_size,
        "sampling": dict(sampling or {}),
        "prompt_len": prompt_len,
        "output_len": output_len,
        "repeats": repeats,
        "first_token_ms": 1e3 * statistics.median(first),
        "all_tokens_ms": 1e3 * statistics.median(whole),
        "tpot_ms": 1e3 * tpot_s,
        "tpot_spread_ms": 1e3 * range_s / steps,  # largest less smallest that these runs could be paired to
        "output_tokens_per_s": batch_size / tpot_s if tpot_s > 0 else 0.0,
        **({"beam_tokens_per_s": num_beams * batch_size / max(tpot_s, 1e-9)} if num_beams > 1 else {}),
        "recompiles_after_warmup": llm.engine.runner.recompiles_after_warmup,
        **({"is_copying": True} if is_copying else {}),
        **draft_figures(llm, before),
    }


def copied_prompts(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """For each prompt another of its length, which ends where the copy of a part of it has begun.

    Three quarters of it are a greedy answer of the model, and the last one is its beginning again. Random
    weights would not go on with the copy. So what their layers add is set to zero, which takes as long:
    the next token then follows from the last one alone, and the answer copies.
    """
    import jax
    import jax.numpy as jnp

    if llm.engine.config.load_format == "dummy":
        for path, leaf in jax.tree_util.tree_leaves_with_path(llm.params):
            if path[-1].key in ("out", "down", "expert_down"):
                llm.params[path[0].key][path[-1].key] = jnp.zeros_like(leaf, device=leaf.sharding)
    params = [fixed_length(len(prompt)) for prompt in prompts]
    answers = llm.generate([prompt[:1] for prompt in prompts], params, use_tqdm=False)
    return [
        text[: len(text) - len(text) // 4] + text[: len(text) // 4]
        for text in (answer.outputs[0].token_ids for answer in answers)
    ]


def draft_counts(llm: Any) -> tuple[int, int]:
    """Of an engine so far: tokens drafted, and those that held."""
    from pjengine.stats import read_stats

    stats = read_stats(llm.engine)
    return stats.num_draft_tokens, stats.num_accepted_tokens


def draft_figures(llm: Any, before: tuple[int, int]) -> dict[str, Any]:
    """What a row says of speculation since `draft_counts` gave `before`; nothing, if the engine has none."""
    if llm.engine.config.speculation is None:
        return {}
    drafted, accepted = (now - then for now, then in zip(draft_counts(llm), before, strict=True))
    return {
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
        "acceptance_rate": accepted / drafted if drafted else None,
    }


def check_batch(llm: Any, batch_size: int, prompt_len: int, output_len: int, num_beams: int = 1) -> None:
    """Raises ValueError where the figures of `latency` would not be those of one batch."""
    max_num_seqs = llm.engine.runner.config.max_num_seqs
    if batch_size * num_beams > max_num_seqs:
        beams = f" searches of {num_beams} beams" if num_beams > 1 else ""
        raise ValueError(
            f"a batch of {batch_size}{beams} does not run at once with max_num_seqs={max_num_seqs}: "
            "raise it, or lower the batch size"
        )
    if output_len < 2:
        raise ValueError(f"output_len must be at least 2, for a time between tokens, got {output_len}")
    _check_length(llm, prompt_len, output_len)


def _check_length(llm: Any, prompt_len: int, output_len: int) -> None:
    if prompt_len + output_len > llm.engine.max_model_len:
        raise ValueError(
            f"{prompt_len} prompt tokens and {output_len} output tokens do not fit into "
            f"max_model_len={llm.engine.max_model_len}: choose shorter ones, or a model with more positions"
        )


def _warm_up(llm: Any) -> None:
    from pjengine.replicas import engines_of

    engines = engines_of(llm.engine)
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(lambda own: own.runner.wait_until_warm(use_tqdm=own.config.use_tqdm_on_load), engines))


def startup(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Process start to the first token of a one-token request: cold (no compilation cache), then warm.

    The engine runs in processes of their own; this one touches no device.

    Raises:
      ValueError: the engine refused the settings.
      RuntimeError: it failed otherwise.
    """
    with tempfile.TemporaryDirectory() as cache_dir:
        for kind in ("cold", "warm"):
            arguments = [repr(time.time()), json.dumps(settings), cache_dir]
            command = [sys.executable, "-m", "pjengine.bench", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"the engine did not start:\n{done.stderr[-4000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            if "refused" in result:
                raise ValueError(result["refused"])
            yield {"kind": kind, **result}


def start_once(begun: float, settings: Mapping[str, Any], cache_dir: str) -> dict[str, float | int]:
    """Starts an engine in this process, which began at `begun` (`time.time`); seconds of each part."""
    from pjengine.llm import LLM
    from pjengine.replicas import engines_of
    from pjengine.stats import read_stats

    imported = time.time()
    with LLM(**{**settings, "compile_cache_dir": cache_dir}) as llm:
        ready, compile_s = time.time(), read_stats(llm.engine).compile_s
        llm.generate([[FIRST_TOKEN_ID]], fixed_length(1, 0.0), use_tqdm=False)
        end, whole_compile_s = time.time(), read_stats(llm.engine).compile_s
        return {
            "import_s": imported - begun,
            "weights_s": ready - imported - compile_s,  # and config, device, memory plan
            "compile_s": whole_compile_s,
            "first_token_s": end - ready - (whole_compile_s - compile_s),
            "total_s": end - begun,
            "num_programs": sum(len(own.runner.programs) for own in engines_of(llm.engine)),
        }


def host_share(
    num_running: int, *, num_stop_ids: int = 0, num_steps: int = 128, repeats: int = 3
) -> dict[str, float | int]:
    """What the host does in a step of `num_running` decodes, on a device that answers at once.

    Everything that `LLMEngine.advance` does is in it, up to the call of the compiled step. Each request has
    `num_stop_ids` stop ids, and meets none.

    Raises:
      ValueError: the requests would not run through all steps, or there are not so many tokens to stop at.
    """
    import jax.numpy as jnp

    from pjengine.engine import LLMEngine
    from pjengine.step import StepOutput

    config = EngineConfig(
        model="tiny", load_format="dummy", skip_tokenizer_init=True, warm_up=False, decode_steps=1,
        max_num_seqs=num_running, max_num_batched_tokens=max(8192, num_running), kv_cache_memory_bytes=2**30,
    )  # fmt: skip
    engine = LLMEngine(config)
    for layout in engine.runner.layouts():
        answer = StepOutput(jnp.full((layout.depth, layout.num_seqs), FIRST_TOKEN_ID, jnp.int32))
        engine.runner.use(layout, lambda params, cache, rows, blob, answer=answer: (cache, rows, answer))
    lens = random.Random(0).choices(range(16, 64), k=num_running)  # so that pages fill at different steps
    output_len = engine.max_model_len - max(lens)
    if repeats * num_steps + 2 > output_len:
        raise ValueError(f"repeats * num_steps must be at most {output_len - 2}, got {repeats * num_steps}")
    if num_stop_ids < 0:
        raise ValueError(f"num_stop_ids must be at least 0, got {num_stop_ids}")
    stops = [FIRST_TOKEN_ID + 1 + i for i in range(num_stop_ids)]
    for prompt in random_tokens(engine.model_config.vocab_size, lens, seed=0):
        engine.add_request(prompt, fixed_length(output_len, stop_token_ids=stops))
    while engine.scheduler.waiting or engine.scheduler.rows.prefilling():
        engine.advance()
    engine.advance()  # reads the last of the prompts
    times = []
    for _ in range(repeats * num_steps):
        start = time.perf_counter()
        engine.advance()
        times.append(1e3 * (time.perf_counter() - start))
    engine.close()
    medians = [statistics.median(times[i::repeats]) for i in range(repeats)]
    return {
        "num_running": num_running,
        "num_stop_ids": num_stop_ids,
        "num_steps": len(times),
        "median_ms": statistics.median(times),
        "median_spread_ms": max(medians) - min(medians),
        "mean_ms": statistics.mean(times),
        "p99_ms": statistics.quantiles(times, n=100)[-1],
    }


def kernels(
    shape: str, ops: Sequence[str] | None = None, *, is_tuning: bool = False, interpret: bool = False
) -> Iterator[dict[str, Any]]:
    """Each kernel alone, beside the limit of the card: see `pallas_kernels.bench.kernel_rows`.

    Raises:
      ValueError: there is no such shape or op, or the shape has no sizes for the op.
    """
    from pjengine.pallas_kernels.bench import OPS, kernel_rows, ops_of
    from pjengine.pallas_kernels.shapes import EXPERTS, SHAPES

    if shape not in SHAPES and shape not in EXPERTS:
        names = ", ".join(dict.fromkeys([*SHAPES, *EXPERTS]))
        raise ValueError(f"no shape of the kernels is named {shape!r}; there are {names}")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"there is no op {op!r} to time; there are {', '.join(OPS)}")
        if op not in ops_of(shape):
            raise ValueError(f"{shape} has no sizes for the op {op!r}; it has for {', '.join(ops_of(shape))}")
    yield from kernel_rows(shape, ops, is_tuning=is_tuning, interpret=interpret)


def fixed_length(length: int, temperature: float = 0.0, **sampling: Any) -> SamplingParams:
    """Of a request that ends after `length` tokens, whatever they are."""
    return SamplingParams(
        max_tokens=length, temperature=temperature, ignore_eos=True, detokenize=False, **sampling
    )


def environment() -> dict[str, str | int]:
    """What a figure means nothing without: hardware and versions. Touches the device."""
    import jax

    device = jax.devices()[0]
    name = device.device_kind if device.platform == "gpu" else cpu()
    return {"device": name, **versions()}


def cpu() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def versions() -> dict[str, str | int]:
    import pjengine

    return {
        "pjengine": pjengine.__version__,
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    try:
        answer: dict[str, Any] = start_once(float(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
    except (ValueError, OSError, NotImplementedError) as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
