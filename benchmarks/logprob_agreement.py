"""How far the logprobs of sampled tokens are from those that the same model computes as a trainer would.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m benchmarks.logprob_agreement --model llama-8b \\
        --load-format dummy --gpu-memory-utilization 0.4

One JSON object: absolute differences, in nats, of the two, and of each from what a copy of the weights in
float32 gives (`--no-float32`: without).
"""

import argparse
import dataclasses
import json
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine import LLM, SamplingParams, functional


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--float32", action=argparse.BooleanOptionalAction, default=True)
    for name, value in {"model": "demo", "load-format": "auto", "dtype": "auto"}.items():
        parser.add_argument(f"--{name}", default=value)
    for name, number in {"num-prompts": 32, "prompt-len": 128, "max-tokens": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("load_format", "dtype", "gpu_memory_utilization")}
    with LLM(options.model, skip_tokenizer_init=True, warm_up=False, **settings) as llm:
        size = options.num_prompts, options.prompt_len
        prompts = np.random.default_rng(0).integers(1, llm.model.config.vocab_size, size).tolist()
        wanted = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True, seed=0, logprobs=0)
        outputs = [output.outputs[0] for output in llm.generate(prompts, wanted, use_tqdm=False)]
        rows = [prompt + own.token_ids for prompt, own in zip(prompts, outputs, strict=True)]
        by_token = [list(zip(own.logprobs or [], own.token_ids, strict=True)) for own in outputs]
        engine = np.array([[likeliest[token].logprob for likeliest, token in own] for own in by_token])

        def compute(model: Any, params: Any) -> np.ndarray:
            # Of one row at a time: attention has all pairs of its tokens.
            program = jax.jit(model.logprobs, compiler_options=functional.compiler_options())
            found = [program(params, jnp.asarray([row], jnp.int32))[0] for row in rows]
            return np.array(found)[:, options.prompt_len - 1 :]

        logprobs = {"engine": engine, "trainer": compute(llm.model, llm.params)}
        if options.float32 and llm.model.dtype != jnp.float32:
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), llm.params)
            logprobs["float32"] = compute(dataclasses.replace(llm.model, dtype=jnp.dtype("float32")), wide)
        result = {**vars(options), "dtype": str(llm.model.dtype), "device": jax.devices()[0].device_kind}
        for (name, own), (other_name, other) in combinations(logprobs.items(), 2):
            error = np.abs(own - other)
            result[f"{name}_{other_name}"] = {"max": float(error.max()), "mean": float(error.mean())}
        print(json.dumps(result | {"std": float(engine.std())}))


if __name__ == "__main__":
    main()
