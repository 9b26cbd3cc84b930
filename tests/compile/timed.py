"""Programs of `pjengine bench kernels` at small sizes, compiled for an H200."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from jax.stages import Compiled

from pjengine.pallas_kernels.bench import OPS, Cache, decode_call, step_case
from pjengine.pallas_kernels.paged_attention import DecodeTiles
from pjengine.pallas_kernels.shapes import SHAPES
from pjengine.pallas_kernels.skinny_linear import SkinnyTiles
from pjengine.pallas_kernels.timing import Case
from pjengine.step_compiler import COMPILER_OPTIONS
from tests.compile.target import struct
from tests.kernels.cases import cuda_target

NUM_CALLS = 6


def cases(name: str, op: str) -> list[Case]:
    return list(OPS[op](name, is_tiny=True, is_tuning=False, interpret=False))


def split_decode(name: str) -> Case:
    """Decode attention, three programs to a sequence."""
    [case] = cases(name, "decode")
    cache = Cache.make(SHAPES[name], [100], num_layers=2)
    tiles = DecodeTiles(block_kv=32, num_splits=3)
    return dataclasses.replace(case, call=decode_call(cache, tiles=tiles), args=cache.arrays)


def compile_case(make: Callable[[], Case]) -> Compiled:
    case = dataclasses.replace(make(), num_calls=NUM_CALLS)
    structs = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), (case.state, *case.args))
    with cuda_target():
        lowered = jax.jit(case.program, donate_argnums=0).lower(*structs)
    return lowered.compile(COMPILER_OPTIONS["gpu"])


def case_at(name: str, op: str, index: int) -> Case:
    return cases(name, op)[index]


def out_of_step() -> Case:
    *_, plain = cases("demo", "product")[:3]
    k, n = plain.args[0].shape[1:]
    return step_case(plain, "out", SkinnyTiles.choose(num_rows=1, k=k, n=n, is_gated=False), interpret=False)


# Of all calls.
NUM_KERNELS: Mapping[str, int] = {
    "timed decode": NUM_CALLS,
    "timed split decode": NUM_CALLS,
    "timed split decode, merged after": 2 * NUM_CALLS,
    "timed prefill": NUM_CALLS + 1,  # which plans the blocks, once
    "timed qkv of a step": NUM_CALLS,
    "timed qkv": NUM_CALLS,
    "timed qkv of the library": NUM_CALLS,
    "timed gate_up of a step": NUM_CALLS,
    "timed out of a step": NUM_CALLS,
    "timed experts": 4 * NUM_CALLS,  # a plan, two products, the sums over the choices
    "timed experts, planned once": 3 * NUM_CALLS + 1,
    "timed rope_kv_write": NUM_CALLS,
    "timed keep_threshold": NUM_CALLS,
}
_at = functools.partial
_CASES: Mapping[str, Callable[[], Case]] = {
    "timed decode": _at(case_at, "demo", "decode", 0),
    "timed split decode": _at(split_decode, "demo"),
    "timed split decode, merged after": _at(split_decode, "starcoder"),
    "timed prefill": _at(case_at, "demo", "prefill", 0),
    "timed qkv of a step": _at(case_at, "demo", "product", 0),
    "timed qkv": _at(case_at, "demo", "product", 1),
    "timed qkv of the library": _at(case_at, "demo", "product", 2),
    "timed gate_up of a step": _at(case_at, "demo", "product", 3),
    "timed out of a step": out_of_step,
    "timed experts": _at(case_at, "demo", "experts", 0),
    "timed experts, planned once": _at(case_at, "demo", "experts", 1),
    "timed rope_kv_write": _at(case_at, "demo", "small", 0),
    "timed keep_threshold": _at(case_at, "demo", "small", 2),
}
PROGRAMS: Mapping[str, Callable[[], Compiled]] = {
    name: functools.partial(compile_case, make) for name, make in _CASES.items()
}
