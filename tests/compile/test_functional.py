"""What XLA makes of programs of `pjengine.functional` on an H200, found without one."""

import math
from collections.abc import Mapping

import jax
import pytest

from tests.compile.hlo import collectives, copies
from tests.compile.worker import Report

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]  # compiles whole generate loops
FEW = {"skinny_qkv", "paged_decode", "skinny_linear", "ragged_paged_attention_mosaic"}
MANY = {"stacked_linear", "rope_kv_write", "paged_decode", "ragged_paged_attention_mosaic"}
KERNELS = {
    "functional 32 mapped": FEW,
    "functional 192 mapped": MANY,
    "functional 64 on two": FEW,
}


def copied_weights(report: Report) -> list[str]:
    from tests.compile.functional_programs import MODEL

    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))["layers"]
    stacks = [math.prod(leaf.shape) for leaf in shapes.values() if len(leaf.shape) > 2]
    large = {("bf16", size) for size in (*stacks, *(size // 2 for size in stacks))}
    return [line for line in copies(report.hlo, large) if "custom-call" not in line]  # which are products


@pytest.mark.parametrize("program", KERNELS)
def test_programs_run_the_kernels_of_the_engine_and_copy_no_weights(
    compiled: Mapping[str, Report], program: str
) -> None:
    report = compiled[program]
    assert not report.error
    assert all(name in report.hlo for name in KERNELS[program])
    assert copied_weights(report) == []
    assert collectives(report.hlo) == []


@pytest.mark.parametrize(
    ("program", "is_copying"),
    [("functional 32 without options", False), ("functional 192 without options", True)],
)
def test_without_the_options_many_rows_copy_weights(
    compiled: Mapping[str, Report], program: str, is_copying: bool
) -> None:
    assert bool(copied_weights(compiled[program])) == is_copying
