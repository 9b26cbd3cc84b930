"""Compiles what the tests that were chosen ask for, once, in as many processes as there are cores."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.compile.target import compiler_path
from tests.compile.worker import Report, compile_apart


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Mapping[str, Report]:
    """Reports by name of the program: of all `program` parameters of the module's tests."""
    if compiler_path() is None:
        pytest.skip("needs JAX's CUDA compiler, which `make test` installs")
    items = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = list(dict.fromkeys(each["program"] for each in params if "program" in each))
    num_workers = min(4, os.cpu_count() or 1, len(names))
    reports: dict[str, Report] = {}
    with ThreadPoolExecutor(num_workers) as workers:
        # Neighbours take about as long as each other.
        for part in workers.map(compile_apart, [names[i::num_workers] for i in range(num_workers)]):
            reports |= part
    return reports
