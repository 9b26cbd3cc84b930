"""What a sum over the GPUs of one process takes, through their memory, and with a residual and its norm.

Of the norm either the start (`fused`, few rows) or the whole (`normed`).

    python -m benchmarks.peer_sum --num-gpus 2

One JSON object for each shape: microseconds of one sum of a chain of 64, as the host sees them. What NCCL
takes in an engine's step shows `pjengine bench profile --disable-custom-all-reduce`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pjengine.bench import environment
from pjengine.config import RunnerConfig
from pjengine.inboxes import Inboxes
from pjengine.pallas_kernels.peer_sum import peer_sum, peer_sum_norm, peer_sum_residual
from pjengine.pallas_kernels.skinny_linear import MAX_ROWS, Residual
from pjengine.sharding.mesh import TENSOR, choose_devices, make_mesh, replicated
from pjengine.step_compiler import DIVIDED_OPTIONS, STRAIGHT_OPTIONS

NUM_SUMS, NUM_CALLS, NUM_RUNS = 64, 20, 5
SHAPES = [(rows, 4096) for rows in (1, 8, 32, 64, 128, 256, 512, 682, 1024, 2048)]
SHAPES += [(rows, 8192) for rows in (1, 32, 128)]


def peer(x: Any, weights: Any, table: Any) -> Any:
    for _ in range(NUM_SUMS):
        x = peer_sum(x, table[0], axis=TENSOR, backend="mosaic")
    return x


def fused(x: Any, weights: Any, table: Any) -> Any:
    rows, part = x, x
    for _ in range(NUM_SUMS):
        residual = Residual(rows, weights, 1)
        rows, normed = peer_sum_residual(part, table[0], residual, axis=TENSOR, backend="mosaic")
        part = normed.scaled
    return part


def normed(x: Any, weights: Any, table: Any) -> Any:
    rows, part = x, x
    for _ in range(NUM_SUMS):
        residual = Residual(rows, weights, 1)
        rows, part = peer_sum_norm(part, table[0], residual, eps=1e-5, axis=TENSOR, backend="mosaic")
    return part


def sum_us(kind: Callable[..., Any], sharding: Any, table: Any, shape: tuple[int, int]) -> float:
    x = jax.device_put(jnp.zeros(shape, jnp.bfloat16), sharding)
    weights = jax.device_put(jnp.full((3, shape[1]), 0.001, jnp.bfloat16), sharding)
    whole, own = PartitionSpec(), PartitionSpec(TENSOR)
    run = jax.shard_map(
        kind, mesh=sharding.mesh, in_specs=(whole, whole, own), out_specs=whole, check_vma=False
    )
    options = {**DIVIDED_OPTIONS["gpu"], **STRAIGHT_OPTIONS["gpu"]}
    program = jax.jit(run).lower(x, weights, table).compile(options)
    x, times = program(x, weights, table).block_until_ready(), []
    for _ in range(NUM_RUNS):
        begun = time.perf_counter()
        for _ in range(NUM_CALLS):
            x = program(x, weights, table)
        x.block_until_ready()
        times.append(time.perf_counter() - begun)
    return round(1e6 * statistics.median(times) / NUM_CALLS / NUM_SUMS, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=2)
    options = parser.parse_args()
    sharding = replicated(make_mesh(choose_devices(options.num_gpus)))
    sizes = {"num_pages": 2, "page_size": 16, "max_model_len": 32}
    inboxes = Inboxes(sharding, RunnerConfig(**sizes, max_num_seqs=1, max_num_batched_tokens=16))
    table = inboxes.renew()
    if table is None:
        raise SystemExit("wanted several Hopper GPUs that see each other's memory")
    for shape in SHAPES:
        found: dict[str, float | None] = {}
        for kind in (peer, fused, normed) if shape[0] <= MAX_ROWS else (peer, normed):
            try:
                found[f"{kind.__name__}_us"] = sum_us(kind, sharding, table, shape)
            except NotImplementedError:
                found[f"{kind.__name__}_us"] = None  # too much for the kernel
        print(
            json.dumps(
                {"bench": "peer_sum", "num_gpus": options.num_gpus, "shape": shape, **found, **environment()}
            )
        )
    inboxes.free()


if __name__ == "__main__":
    main()
