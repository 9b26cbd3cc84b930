"""Strict JAX for every test. pjengine is imported inside fixtures and tests only, so that the
`--jaxtyping-packages` hook is in place before any of its modules is loaded."""

import os
import tempfile
from collections.abc import Iterator

import pytest

# Four CPU devices for the sharding tests; it must be set before JAX starts its backend.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax

import tests.typechecker  # noqa: F401 - the hook looks it up as an attribute of `tests`

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled programs for all that this run starts, and never the user's own."""
    if not hasattr(
        config, "workerinput"
    ):  # a worker of several at a time finds what the first process has set
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name


@pytest.fixture(scope="session", autouse=True)
def quick_compile() -> Iterator[None]:
    """XLA compiles for a CPU in half the time, subprocesses included; no effect where there is a GPU."""
    if has_gpu():
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


def has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says at once what has failed: a run that is ended from outside has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        title = f"{report.nodeid} ({report.when}, {report.duration:.0f} s)"
        print(f"\n{title}\n{report.longreprtext}\n", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs `gpu` tests only where a GPU answers; says so otherwise."""
    if any(item.get_closest_marker("gpu") for item in items) and not has_gpu():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
