"""What new weights cost a running engine: the swap, the steps behind it, and memory over many rounds.

python -m benchmarks.update_params --shape llama-1b --rounds 100
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from pjengine import LLM, SamplingParams
from pjengine.stats import read_stats


@partial(jax.jit, donate_argnums=0)
def trained(params: Any) -> Any:
    """A step that takes the engine's weights and gives others, in the same memory."""
    return jax.tree.map(lambda leaf: leaf * np.float32(0.9999).astype(leaf.dtype), params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    prompts = np.random.default_rng(0).integers(3, 200, (args.batch_size, 64)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    with LLM(args.shape, max_num_seqs=args.batch_size, **settings) as llm:
        llm.engine.runner.wait_until_warm()
        times: dict[str, list[float]] = {name: [] for name in ("plain", "train", "swap", "after_swap")}
        memory = []
        for number in range(3 + args.rounds):
            marks = [time.perf_counter()]
            llm.generate(prompts, sampling, use_tqdm=False)
            marks.append(time.perf_counter())
            params = jax.block_until_ready(trained(llm.params))
            marks.append(time.perf_counter())
            llm.update_params(params)
            marks.append(time.perf_counter())
            llm.generate(prompts, sampling, use_tqdm=False)
            marks.append(time.perf_counter())
            llm.reset_prefix_cache()
            stats = jax.devices()[0].memory_stats() or {}
            memory.append(stats.get("bytes_in_use", sum(own.nbytes for own in jax.live_arrays())))
            for own, start, end in zip(times.values(), marks, marks[1:], strict=False):
                own.extend([end - start] * (number >= 3))
        figures = {f"{name}_ms": round(1e3 * statistics.median(own), 3) for name, own in times.items()}
        figures |= {
            "growth_bytes": memory[-1] - memory[3],
            "num_recompiles": read_stats(llm.engine).num_recompiles,
        }
        print(json.dumps({"shape": args.shape, "rounds": args.rounds, **figures}))


if __name__ == "__main__":
    main()
