"""Where the time of a step goes: `pjengine bench profile` sums the kernels of JAX's own profile by name."""

import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from pjengine.bench import Workload, check_batch, fixed_length, random_tokens, throughput

# Without it XLA launches every kernel by itself while it is watched, and the profile is of another program.
KEEP_GRAPHS = "--xla_enable_command_buffers_during_profiling=true"
SETTLE = 4  # steps before the first that is timed


@dataclass
class Trace:
    """What the GPUs did in some steps, and what it took to launch it."""

    num_gpus: int = 0
    kernels_ns: Counter[str] = field(default_factory=Counter)  # by name; copies are kernels here
    num_kernels: int = 0
    num_graph_launches: int = 0  # of CUDA graphs, which XLA calls command buffers
    num_kernel_launches: int = 0  # of kernels by themselves

    @classmethod
    def read(cls, profile: jax.profiler.ProfileData) -> "Trace":
        """Kernels are on the streams of a GPU's plane, launches on the planes of the host."""
        found = cls()
        for plane in profile.planes:
            is_gpu = plane.name.startswith("/device:GPU")
            found.num_gpus += is_gpu
            for line in plane.lines:
                if is_gpu and line.name.startswith("Stream"):
                    for event in line.events:
                        found.kernels_ns[unnumbered(event.name)] += event.duration_ns
                        found.num_kernels += 1
                elif not is_gpu:
                    names = Counter(event.name for event in line.events)
                    found.num_graph_launches += _count(names, "GraphLaunch")
                    found.num_kernel_launches += _count(names, "LaunchKernel")
        return found

    def per_step(self, num_steps: int) -> dict[str, Any]:
        """As a row of the benchmark says it: kernels are of one GPU, a mean over all, launches of all."""
        shares = num_steps * max(1, self.num_gpus)
        by_time = {name: ns / shares / 1e3 for name, ns in self.kernels_ns.most_common()}
        return {
            "busy_ms": sum(by_time.values()) / 1e3,
            "num_kernels": self.num_kernels / shares,
            "num_graph_launches": self.num_graph_launches / num_steps,
            "num_kernel_launches": self.num_kernel_launches / num_steps,
            "kernels_us": {name: round(us, 1) for name, us in by_time.items()},
        }


def _count(names: Mapping[str, int], part: str) -> int:
    return sum(count for name, count in names.items() if part in name)


def unnumbered(name: str) -> str:
    """One name for the kernels that XLA tells apart by a number: `loop_fusion_12` is `loop_fusion_N`."""
    return re.sub(r"[._]\d+$", "_N", name)


@contextmanager
def traced(trace: Callable[[Trace], None]) -> Iterator[None]:
    """Profiles what runs in it, and hands over what was found."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        [path] = Path(folder).rglob("*.xplane.pb")
        trace(Trace.read(jax.profiler.ProfileData.from_file(str(path))))


def profile_decode(
    llm: Any, batch_size: int, *, prompt_len: int = 512, num_steps: int = 12
) -> dict[str, Any]:
    """Greedy steps of `batch_size` decodes, whose contexts begin with `prompt_len` tokens.

    `step_ms` is the wall time of a step that nothing watches; the rest is from a profile of `num_steps`
    others. A step gives each request `depth` tokens, or with drafts what holds of them.

    Raises:
      ValueError: the batch does not run at once, or its requests are longer than `max_model_len`.
    """
    engine = llm.engine
    depth = engine.runner.config.decode_steps
    # The first to be read decode while the others' prompts are: none may end before the profile does.
    num_reading = batch_size * prompt_len // engine.runner.config.max_num_batched_tokens + 1
    output_len = (num_reading + SETTLE + 2 * num_steps + 4) * max(depth, 1 + engine.scheduler.num_drafts)
    check_batch(llm, batch_size, prompt_len, output_len)
    engine.runner.wait_until_warm()
    for prompt in random_tokens(engine.model_config.vocab_size, [prompt_len] * batch_size, seed=0):
        engine.add_request(prompt, fixed_length(output_len))
    while engine.scheduler.waiting or engine.scheduler.rows.prefilling():
        engine.advance()
    _advance(engine, SETTLE)
    start = time.perf_counter()
    _advance(engine, num_steps)
    step_ms = 1e3 * (time.perf_counter() - start) / num_steps
    found: list[Trace] = []
    jax.block_until_ready(engine.runner.cache)  # what is launched in the profile, and only that, runs in it
    with traced(found.append):
        _advance(engine, num_steps)
        jax.block_until_ready(engine.runner.cache)
    _finish(engine)
    row = {"kind": "decode", "batch_size": batch_size, "prompt_len": prompt_len, "depth": depth}
    return {**row, "num_steps": num_steps, "step_ms": step_ms, **found[0].per_step(num_steps)}


def profile_mixed(llm: Any, num_tokens: int, *, prompt_len: int = 512, num_steps: int = 5) -> dict[str, Any]:
    """Steps that read prompts of `prompt_len` tokens, `num_tokens` in all, and decode nothing.

    Each is launched when the one before has ended, so that `step_ms`, a median, has the host's time in it.

    Raises:
      ValueError: such a step has more than `max_num_batched_tokens` tokens, or `max_num_seqs` prompts.
    """
    engine, sizes = llm.engine, llm.engine.runner.config
    lens = [min(prompt_len, num_tokens - start) for start in range(0, num_tokens, prompt_len)]
    if num_tokens > sizes.max_num_batched_tokens:
        raise ValueError(
            f"a step of {num_tokens} tokens needs max_num_batched_tokens of as many, "
            f"got {sizes.max_num_batched_tokens}: raise it, or take fewer tokens"
        )
    check_batch(llm, len(lens), prompt_len, 2)
    engine.runner.wait_until_warm()
    prompts = random_tokens(engine.model_config.vocab_size, lens, seed=0)

    def step() -> float:
        for prompt in prompts:
            engine.add_request(prompt, fixed_length(1))
        start = time.perf_counter()
        engine.advance()
        jax.block_until_ready(engine.runner.cache)
        took = time.perf_counter() - start
        if engine.scheduler.waiting or engine.scheduler.rows.prefilling():
            raise RuntimeError(f"{num_tokens} tokens were more than one step: the figures would mean nothing")
        _finish(engine)
        return 1e3 * took

    step()  # the first pass touches fresh pages and programs
    step_ms = statistics.median(step() for _ in range(num_steps))
    found: list[Trace] = []
    with traced(found.append):
        for _ in range(num_steps):
            step()
    row = {"kind": "mixed", "num_tokens": num_tokens, "prompt_len": prompt_len}
    return {**row, "num_steps": num_steps, "step_ms": step_ms, **found[0].per_step(num_steps)}


def profile_workload(llm: Any, workload: Workload) -> dict[str, Any]:
    """The kernels of a whole workload: how long a GPU was busy of the time that all requests took.

    `step_ms` is what the same requests took when nothing watched, and all is of one run, not of one step.

    Raises:
      ValueError: a request of the workload is longer than `max_model_len`.
    """
    step_ms = 1e3 * throughput(llm, workload)["elapsed_s"]
    found: list[Trace] = []
    with traced(found.append):
        throughput(llm, workload)
    row = {"kind": "workload", "num_requests": len(workload.prompts)}
    return {**row, "num_steps": 1, "step_ms": step_ms, **found[0].per_step(1)}


def _advance(engine: Any, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.advance()


def _finish(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.advance()
