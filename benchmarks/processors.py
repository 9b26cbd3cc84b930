"""What logits processors cost: time of a decode step without any, with one in JAX, and with one on the host.

python -m benchmarks.processors --shape llama-8b --batch-size 64
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from pjengine import LLM, SamplingParams, host_processor

NUM_TOKENS, NUM_RUNS = 64, 5


def never_twice(token_ids: Any, logits: Any) -> Any:
    known = jnp.where(token_ids < 0, len(logits), token_ids)
    return logits.at[known].set(-jnp.inf, mode="drop")


@host_processor
def never_twice_on_host(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
    logits[token_ids] = -np.inf
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=512)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    cases: dict[str, list[Any] | None] = {"none": None, "jax": [never_twice], "host": [never_twice_on_host]}
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "decode_steps": 1}
    with LLM(args.shape, max_num_seqs=args.batch_size, enable_prefix_caching=False, **settings) as llm:
        vocab_size = llm.engine.model_config.vocab_size
        for name, processors in cases.items():
            times = []
            for _ in range(1 + NUM_RUNS):
                prompts = rng.integers(0, vocab_size, (args.batch_size, args.prompt_len)).tolist()
                seconds = {}
                for num_tokens in (1, NUM_TOKENS):
                    params = SamplingParams(
                        max_tokens=num_tokens, ignore_eos=True, seed=0, logits_processors=processors
                    )
                    start = time.perf_counter()
                    llm.generate(prompts, params, use_tqdm=False)
                    seconds[num_tokens] = time.perf_counter() - start
                times.append(1000 * (seconds[NUM_TOKENS] - seconds[1]) / (NUM_TOKENS - 1))
            print(json.dumps({"processor": name, "step_ms": statistics.median(times[1:]), "all": times}))


if __name__ == "__main__":
    main()
