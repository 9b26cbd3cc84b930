"""Which backend runs, what is logged of it, and what is refused."""

import logging
from collections.abc import Callable

import jax
import pytest

from pjengine.pallas_kernels import dispatch as module
from pjengine.pallas_kernels.dispatch import chosen_backends, dispatch, platform
from tests.kernels.cases import cuda_target


def refuse() -> str:
    raise NotImplementedError("head_dim 512: at most 256")


def implementations(triton: Callable[[], str]) -> dict[str, Callable[[], str]]:
    return {"triton": triton, "reference": lambda: "by reference"}


def test_a_cpu_runs_the_reference() -> None:
    if platform() == "cpu":
        assert dispatch("op_cpu", implementations(lambda: "by triton"), None) == "by reference"
        assert chosen_backends()["op_cpu"] == "reference"


def test_a_mesh_that_names_a_gpu_runs_the_kernel() -> None:
    with cuda_target():
        assert platform() == "gpu"
        assert dispatch("op_gpu", implementations(lambda: "by triton"), None) == "by triton"
    assert chosen_backends()["op_gpu"] == "triton"


def test_a_refused_shape_falls_back_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=module.__name__)
    with cuda_target():
        for _ in range(3):
            assert dispatch("op_fallback", implementations(refuse), None) == "by reference"
    assert chosen_backends()["op_fallback"] == "reference"
    [record] = caplog.records
    assert "op=op_fallback backend=reference" in record.getMessage()
    assert "head_dim 512" in record.getMessage()


def test_a_backend_asked_for_does_not_fall_back() -> None:
    with pytest.raises(NotImplementedError, match="head_dim 512"):
        dispatch("op", implementations(refuse), "triton")


def test_no_backend_left_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"no backend of platform .* can run op: head_dim 512"):
        dispatch("op", {"triton": refuse, "reference": refuse}, None)


def test_an_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match="backend must be one of triton, reference; got 'mosaic'"):
        dispatch("op", implementations(refuse), "mosaic")


def test_the_platform_is_jaxs_unless_a_mesh_names_it() -> None:
    assert platform() == jax.default_backend()
