"""What `pjengine bench kernels` times on a GPU, found without one: the kernels, and nothing beside them."""

from collections.abc import Mapping

import pytest

from tests.compile.hlo import kernels
from tests.compile.timed import NUM_KERNELS, PROGRAMS
from tests.compile.worker import Report

# The first test to ask for `compiled` waits for all programs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_call_is_its_kernels_and_nothing_else_runs(
    compiled: Mapping[str, Report], program: str
) -> None:
    report = compiled[program]
    assert not report.error
    found = kernels(report.hlo)
    assert set(found) <= {"custom-call", "fusion"}
    assert len(found) == NUM_KERNELS[program]
