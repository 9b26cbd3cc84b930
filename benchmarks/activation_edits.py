"""What activation edits cost: time of a decode step without any, with one of each request, and with eight.

python -m benchmarks.activation_edits --shape llama-8b --batch-size 64
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from pjengine import LLM, ActivationEdit, SamplingParams

NUM_TOKENS, NUM_RUNS = 64, 5


def steer(state: Any, token: Any, direction: Any, strength: Any) -> Any:
    return state + strength * direction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=512)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "decode_steps": 1}
    with LLM(args.shape, max_num_seqs=args.batch_size, enable_prefix_caching=False, **settings) as llm:
        config = llm.engine.model_config
        layers: dict[str, list[int]] = {
            "none": [],
            "one layer": [config.num_layers // 2],
            "eight layers": list(range(min(8, config.num_layers + 1))),
        }
        for name, numbers in layers.items():
            times = []
            for _ in range(1 + NUM_RUNS):
                prompts = rng.integers(0, config.vocab_size, (args.batch_size, args.prompt_len)).tolist()
                own = rng.normal(0, 1e-3, (args.batch_size, config.hidden_size))  # each request has its own
                edits = [[ActivationEdit(n, steer, (direction, 1.0)) for n in numbers] for direction in own]
                seconds = {}
                for num_tokens in (1, NUM_TOKENS):
                    fields: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True, "seed": 0}
                    params = [SamplingParams(activation_edits=each, **fields) for each in edits]
                    start = time.perf_counter()
                    llm.generate(prompts, params, use_tqdm=False)
                    seconds[num_tokens] = time.perf_counter() - start
                times.append(1000 * (seconds[NUM_TOKENS] - seconds[1]) / (NUM_TOKENS - 1))
            print(json.dumps({"edits": name, "step_ms": statistics.median(times[1:]), "all": times[1:]}))


if __name__ == "__main__":
    main()
