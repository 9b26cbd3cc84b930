"""What scores, embeddings and hidden states cost beside plain prefill of the same prompts.

    python -m benchmarks.scoring --model llama-8b --load-format dummy

One JSON object a line: seconds for all prompts, the least of three, after one run that compiles.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pjengine import LLM, HiddenStatesParams, SamplingParams


def least_s(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=512)
    options = parser.parse_args()
    settings = {"load_format": options.load_format, "skip_tokenizer_init": True}
    with LLM(options.model, enable_prefix_caching=False, **settings) as llm:
        rng, vocab_size = np.random.default_rng(0), llm.engine.model_config.vocab_size
        prompts = rng.integers(0, vocab_size, (options.num_prompts, options.prompt_len)).tolist()
        completions = rng.integers(0, vocab_size, (options.num_prompts, 4, 8)).tolist()
        one_token = SamplingParams(max_tokens=1, temperature=0)
        states = SamplingParams(max_tokens=1, temperature=0, hidden_states=HiddenStatesParams(layers=(-1,)))
        quiet: dict[str, Any] = {"use_tqdm": False}
        cases: dict[str, Callable[[], Any]] = {
            "prefill": lambda: llm.generate(prompts, one_token, **quiet),
            "score 1": lambda: llm.score(prompts, [own[:1] for own in completions], **quiet),
            "score 4": lambda: llm.score(prompts, completions, **quiet),
            "encode last": lambda: llm.encode(prompts, **quiet),
            "encode mean": lambda: llm.encode(prompts, pooling="mean", **quiet),
            "hidden states, one layer": lambda: llm.generate(prompts, states, **quiet),
        }
        for name, run in cases.items():
            print(json.dumps({"case": name, "seconds": round(least_s(run), 4), **vars(options)}), flush=True)


if __name__ == "__main__":
    main()
