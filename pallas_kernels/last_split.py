"""Sums that several programs share: the last of them to be done finishes, so that no kernel has to follow."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


class Counters:
    """How many programs of each sum are done: zeros before each kernel, and after it.

    One for a step, lent to its kernels in the order in which they are traced: each is given the array that the
    one before left, so that XLA updates it in place, and no two kernels ever count in it at the same time.
    """

    def __init__(self, size: int) -> None:
        self.array = jnp.zeros((size,), jnp.int32)


def finish_last(
    counters_ref: Any,  # [sums]
    index: Any,
    num_programs: Any,
    finish: Callable[[], None],
    *,
    interpret: bool,
) -> None:
    """Calls `finish` in the last of the `num_programs` programs that come here with this `index`.

    What the others had stored by then can be read there, and only there.
    """
    if not interpret:  # one program after the other, and no barrier in the interpreter
        plt.debug_barrier()  # the stores of every thread before the count, which only one thread makes
    # To all processors, the count releases what this program stored, and acquires what the earlier ones did.
    one = 0 * index + 1  # the interpreter takes no literal
    num_before = plt.atomic_add(counters_ref, (index,), one)

    @pl.when(num_before == num_programs - 1)
    def _() -> None:
        plt.store(counters_ref.at[index], 0)
        finish()
