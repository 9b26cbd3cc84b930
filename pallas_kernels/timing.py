"""How kernels are timed: a `Case` again and again in one program, and the limits that the card has.

A timed program is many calls in a row, as the layers of a model make them, and holds nothing but their
kernels (`tests/compile` looks at it). The calls read COLD_BYTES or more before they read anything again, so
that it comes from memory and not from the L2 cache; where that is not so, `is_cold` is false.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

type Row = dict[str, object]
type State = tuple[Any, ...]
# Of the state, the number of the call and the arguments: the state of the next call, and what else it made.
type Call = Callable[..., tuple[State, Any]]

CALLS = 32  # in one program, at least, as in a model of 32 layers
COLD_BYTES = 128 << 20  # more than twice the L2 cache of an H200
MEASUREMENTS, RUNS = 5, 3


def seconds(program: Callable[[], Any]) -> float:
    """Median time of one run of a compiled program, over MEASUREMENTS of RUNS queued together."""
    jax.block_until_ready(program())
    times = []
    for _ in range(MEASUREMENTS):
        start = time.perf_counter()
        for _ in range(RUNS):
            out = program()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / RUNS)
    return statistics.median(times)


def copy_gb_per_s(num_bytes: int) -> float:
    """Bytes read plus bytes written a second by adding 1 to an array. Reading alone can be faster."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    return 2 * num_bytes / seconds(functools.partial(jax.jit(lambda x: x + 1), x)) / 1e9


def product_tflop_per_s(size: int) -> float:
    """Of one square bfloat16 product by the library that XLA calls."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    return 2 * size**3 / seconds(functools.partial(jax.jit(jnp.dot), left, right)) / 1e12


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the card was measured to do, and how a kernel's figure reads beside it."""

    copy_gb_per_s: float
    product_tflop_per_s: float

    @classmethod
    def measure(cls, *, is_tiny: bool) -> "Limits":
        return cls(copy_gb_per_s(1 << (20 if is_tiny else 30)), product_tflop_per_s(256 if is_tiny else 8192))

    def row(self, case: Row, took: Callable[[], float], *, gb: float = 0.0, tflop: float = 0.0) -> Row:
        """One result: `took` seconds for `gb` through the memory, or for `tflop` of products."""
        try:
            took_s = took()
        except jax.errors.JaxRuntimeError as error:  # tiles that need more shared memory than there is
            return {**case, "error": str(error).partition("\n")[0][:200]}
        unit, amount, limit = (
            ("gb_per_s", gb, self.copy_gb_per_s) if gb else ("tflop_per_s", tflop, self.product_tflop_per_s)
        )
        rate = amount / took_s
        return {**case, "us": took_s * 1e6, unit: rate, f"limit_{unit}": limit, "share": rate / limit}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one size, to be called again and again."""

    row: Row  # what it is
    call: Call
    state: State
    args: tuple[Any, ...] = ()
    num_calls: int
    gb: float = 0.0  # of one call
    tflop: float = 0.0
    is_cold: bool = True

    def program(self, state: State, *args: Any) -> tuple[State, list[Any]]:
        """Every call. To be jitted, with the state donated: it passes through without a copy."""
        outs = []
        for index in range(self.num_calls):
            # The barrier takes no kernel. Without it, XLA would make one product of those that share their x;
            # and what nobody takes it would leave out, so that the program gives it.
            state, out = lax.optimization_barrier(self.call(state, index, *args))
            outs.append(out)
        return state, outs

    def seconds(self) -> float:
        """Of one call."""
        program = jax.jit(self.program, donate_argnums=0, compiler_options=library_only())
        state = jax.tree.map(jnp.copy, self.state)  # other cases may have the same

        def run() -> Any:
            nonlocal state
            state, outs = program(state, *self.args)
            return state, outs

        return seconds(run) / self.num_calls


def library_only() -> dict[str, bool]:
    """Compiler options under which XLA's products are those of the library, as in the engine."""
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else {}


def layers_for(num_bytes: int, *, is_tiny: bool) -> int:
    """How many layers, of `num_bytes` each, are more than stays in a cache."""
    return 2 if is_tiny else -(-COLD_BYTES // num_bytes)


def calls_for(num_layers: int, *, is_tiny: bool) -> int:
    """How many calls go through all of the layers."""
    return 2 if is_tiny else max(CALLS, num_layers)


def described(backend: str, tiles: Any = None) -> Row:
    return {"backend": backend, "tiles": None if tiles is None else dataclasses.asdict(tiles)}
