"""Sums that several programs share: the last of them to be done finishes, so that no kernel has to follow."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int


class Counters:
    """How many programs of each sum are done: zeros before each kernel, and after it.

    One for a step, lent to its kernels in the order in which they are traced: each is given the array that
    the one before left, so that XLA updates it in place, and no two kernels count in it at the same time.
    Made and used within one trace: `array` is then a value of that trace.
    """

    def __init__(self, size: int) -> None:
        self.array = jnp.zeros((size,), jnp.int32)


def counters_for(num_sums: int, counters: Int[Array, " c"] | None) -> Int[Array, " c"]:
    """The counters that a kernel is given, or zeros of its own.

    Raises:
      ValueError: they are fewer than its sums.
    """
    if counters is None:
        return jnp.zeros((num_sums,), jnp.int32)
    if len(counters) < num_sums:
        raise ValueError(f"{len(counters)} counters: wanted one for each of {num_sums} sums")
    return counters


def finish_last(
    counters_ref: Any,  # [sums or more]
    index: Any,
    num_programs: Any,
    finish: Callable[[], None],
    *,
    interpret: bool,
) -> None:
    """Calls `finish` in the last of the `num_programs` programs that come here with this `index`.

    There, and only there, what the others had stored when they came can be read.
    """
    if not interpret:  # the interpreter knows no barrier, and runs one program after the other
        plt.debug_barrier()  # what all threads stored, before the count, which one thread makes for all
    one = 0 * index + 1  # the interpreter takes no literal
    # For all processors, counting releases what this program stored, and acquires what the others released.
    num_before = plt.atomic_add(counters_ref, (index,), one)

    @pl.when(num_before == num_programs - 1)
    def _() -> None:
        plt.store(counters_ref.at[index], jnp.int32(0))
        finish()
