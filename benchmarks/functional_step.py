"""A decode step of `pjengine.functional` in a scan, mapped or not, beside one of an engine with its weights.

    python -m benchmarks.functional_step --model llama-8b --load-format dummy

Then whether mapped rows, and an exported program, have the tokens of the batch.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pjengine import LLM, functional
from pjengine.bench import environment, latency


def generate(model: Any, length: int, params: Any, tokens: Any) -> Any:
    def step(carry: Any, _: None) -> Any:
        token = jnp.argmax(carry[0], axis=-1)
        return functional.decode_step(model, params, carry[1], token), token

    cache = functional.init_cache(model, len(tokens), tokens.shape[1] + length)
    return jax.lax.scan(step, functional.prefill(model, params, cache, tokens), length=length)[1].T


def mapped(model: Any, length: int, params: Any, tokens: Any) -> Any:
    return jax.vmap(lambda own: generate(model, length, params, own[None])[0])(tokens)


def median_s(run: Any, inputs: Any) -> float:
    clock = time.perf_counter
    times = [(clock(), jax.block_until_ready(run(*inputs)), clock()) for _ in range(4)]
    return statistics.median(end - begun for begun, _, end in times[1:])  # the first one compiles


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--load-format", default="auto")
for name, default in (("--batch-size", 32), ("--prompt-len", 512), ("--output-len", 128)):
    parser.add_argument(name, type=int, default=default)
o = parser.parse_args()
sizes = {"max_num_seqs": o.batch_size, "max_model_len": o.prompt_len + o.output_len + 1}
pool = {
    "kv_cache_memory_bytes": (sizes["max_model_len"] + 16) * o.batch_size * 2**18
}  # leaves room beside it
with LLM(o.model, load_format=o.load_format, skip_tokenizer_init=True, **sizes, **pool) as llm:
    rows = {"engine": latency(llm, o.batch_size, prompt_len=o.prompt_len, output_len=o.output_len)["tpot_ms"]}
    inputs = (llm.params, jnp.ones((o.batch_size, o.prompt_len), jnp.int32))
    jit = partial(jax.jit, compiler_options=functional.compiler_options())
    whole = {own.__name__: jit(partial(own, llm.model, o.output_len)) for own in (generate, mapped)}
    for own in (generate, mapped):
        first = median_s(jit(partial(own, llm.model, 1)), inputs)
        rows[own.__name__] = 1e3 * (median_s(whole[own.__name__], inputs) - first) / (o.output_len - 1)
    wanted, checks = (
        whole["generate"](*inputs),
        [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )
    exported = jit(jax.export.export(whole["mapped"], disabled_checks=checks)(*inputs).call)
    equal = {
        name: bool((run(*inputs) == wanted).all()) for name, run in {**whole, "exported": exported}.items()
    }
    print(json.dumps({"tpot_ms": rows, "equal": equal, **vars(o), **environment()}))
