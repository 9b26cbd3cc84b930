"""The chosen tiles on an H200, found without one: no spilled registers, enough shared memory."""

import re
from collections.abc import Mapping

import pytest

from tests.compile.hlo import kernels
from tests.compile.kernels import FEATURED_MOSAIC, PROGRAMS
from tests.compile.target import chosen
from tests.compile.worker import Report

# The first test to ask for `compiled` waits for all programs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# One shape of each kind, and sums of two GPUs.
IN_CI = re.compile(
    "(?<!stacked_linear )llama-8b( |$)|stacked_linear llama-8b (down|head)|falcon-7b bfloat16|"
    "qwen3-30b-a3b bfloat16|plan of|peer_sum.* on 2$"
)


def assert_fits(report: Report) -> None:
    assert not report.error  # XLA makes a spill one
    assert set(report.spilled_bytes) <= {0}, report.printed
    if "mosaic_gpu" in report.hlo:
        assert report.spilled_bytes, "its assembler was not heard"


@pytest.mark.parametrize(
    "program",
    [
        program if IN_CI.search(program) else pytest.param(program, marks=pytest.mark.sweep)
        for program in PROGRAMS
    ],
)
def test_chosen_tiles_fit_and_spill_no_registers(compiled: Mapping[str, Report], program: str) -> None:
    assert_fits(compiled[program])


@pytest.mark.parametrize("program", chosen(FEATURED_MOSAIC))
def test_features_spill_no_more_than_the_numbers_of_a_block(
    compiled: Mapping[str, Report], program: str
) -> None:
    report = compiled[program]
    assert not report.error
    assert report.spilled_bytes and max(report.spilled_bytes) <= 128, report.printed  # a tile takes 512


@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.startswith("peer_sum")])
def test_gpus_sum_in_one_kernel_and_no_collective(compiled: Mapping[str, Report], program: str) -> None:
    assert kernels(compiled[program].hlo) == ["custom-call"]
    assert "mosaic_gpu" in compiled[program].hlo


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "paged_attention of 9 stages",
            r"Shared memory size limit exceeded: requested 5\d+, available: 23\d+",
        ),
        ("ragged_prefill of 4 warps", "discarded due to register spilling"),
        ("grouped_linear of 4 warps", "discarded due to register spilling"),
        ("mosaic_prefill of 4 stages", "exceeds available shared memory"),
        ("gated_linear of 8 stages", "exceeds available shared memory"),
        ("stacked_linear of 6 stages", "exceeds available shared memory"),
        ("mosaic_prefill of 256 slots", r"[1-9]\d* bytes spill stores"),
    ],
)
def test_tiles_that_are_too_large_are_found(
    compiled: Mapping[str, Report], program: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_fits(compiled[program])
