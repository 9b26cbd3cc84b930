"""Decode attention of contexts of different lengths: in the order they came, and the longest first.

    python -m benchmarks.decode_order

One JSON object for each case: microseconds of one call among 24 of a program, shapes of Llama 3.1 8B. What
sorting takes is in it; the calls of a program share it, as the layers of a step do. Page tables are as wide
as the longest context needs, an engine's as `max_model_len` does.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pjengine.bench import environment
from pjengine.pallas_kernels.paged_attention import DecodeTiles, decode_triton
from pjengine.pallas_kernels.timing import seconds

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_LAYERS = 32, 8, 128, 16, 2
NUM_CALLS = 24
LENGTHS: Mapping[str, Callable[[random.Random, int], list[int]]] = {
    "all of 576": lambda rng, batch: [576] * batch,
    "log-normal, median 330, at most 2048": lambda rng, batch: [
        min(2048, max(8, round(rng.lognormvariate(5.8, 0.7)))) for _ in range(batch)
    ],
    "one of 16384 among 576": lambda rng, batch: [576] * (batch - 1) + [16384],
}
ORDERS = {"in order": 10**9, "longest first": 0}


def page_table_of(lengths: list[int]) -> np.ndarray:
    """Each sequence's pages, one after the other, from 1 on."""
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    table, first = np.zeros((len(lengths), max(counts)), np.int32), 1
    for row, count in zip(table, counts, strict=True):
        row[:count] = np.arange(first, first + count)
        first += count
    return table


def call_us(lengths: list[int], num_at_once: int) -> float:
    """A call of sequences of these lengths; of more programs than `num_at_once` the longest begin first."""
    table = page_table_of(lengths)
    num_pages = int(table.max()) + 1
    shape = (NUM_LAYERS * num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
    k_pages, v_pages = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
    q = jax.random.normal(jax.random.key(3), (len(lengths), NUM_HEADS, HEAD_DIM), jnp.bfloat16)
    tiles = DecodeTiles.choose_for(q, k_pages, table.shape[1] * PAGE_SIZE)
    tiles = dataclasses.replace(tiles, num_at_once=num_at_once)

    def run(q: Any, *args: Any) -> Any:
        for i in range(NUM_CALLS):
            offset = jnp.int32(i % NUM_LAYERS * num_pages)
            out, _ = decode_triton(q, *args, offset, scale=HEAD_DIM**-0.5, tiles=tiles)
            q = lax.optimization_barrier((q, out))[0]  # one call after the other
        return out

    args = (q, k_pages, v_pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32))
    program = jax.jit(run).lower(*args).compile()
    return round(1e6 * seconds(functools.partial(program, *args)) / NUM_CALLS, 1)


def main() -> None:
    rng = random.Random(0)
    for kind, lengths_of in LENGTHS.items():
        for batch in (32, 64, 128, 256, 512, 1024):
            lengths = lengths_of(rng, batch)
            num_bytes = sum(lengths) * 2 * NUM_KV_HEADS * HEAD_DIM * 2
            for order, num_at_once in ORDERS.items():
                us = call_us(lengths, num_at_once)
                case = {"bench": "decode-order", "lengths": kind, "batch_size": batch, "order": order}
                row = case | {"us": us, "tb_per_s": round(num_bytes / us / 1e6, 2)}
                print(json.dumps(row | environment()), flush=True)


if __name__ == "__main__":
    main()
