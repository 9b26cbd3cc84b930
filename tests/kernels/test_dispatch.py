"""Which backend runs, what is logged of it, and what is refused."""

import importlib
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import jax
import pytest

from pjengine.pallas_kernels import dispatch as module
from pjengine.pallas_kernels import triton_extra
from pjengine.pallas_kernels.dispatch import check_backend, chosen_backends, dispatch, platform
from pjengine.pallas_kernels.triton_extra import backend_versions, import_jax_triton
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


def test_ops_without_jax_triton_run_as_if_nothing_was_asked_for() -> None:
    with cuda_target():
        assert dispatch("op_without", implementations(lambda: "by triton"), "jax_triton") == "by triton"
        assert dispatch("op_refused", implementations(refuse), "jax_triton") == "by reference"


def test_jax_triton_runs_where_an_op_has_it_and_does_not_fall_back() -> None:
    has_it = {**implementations(lambda: "by triton"), "jax_triton": lambda: "by jax_triton"}
    assert dispatch("op_with", has_it, "jax_triton") == "by jax_triton"
    assert chosen_backends()["op_with"] == "jax_triton"
    with pytest.raises(NotImplementedError, match="head_dim 512"):
        dispatch("op", {**has_it, "jax_triton": refuse}, "jax_triton")
    with cuda_target():
        assert dispatch("op_with", has_it, None) == "by triton"


@pytest.mark.parametrize("name", ["jax_triton", "triton", "mosaic", "cuda"])
def test_a_cpu_has_no_backends_of_gpus(name: str) -> None:
    if platform() == "cpu":
        with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu; available: reference, triton_"):
            check_backend(name)


def test_jax_triton_without_its_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(triton_extra, "version", absent)
    with cuda_target():
        check_backend("triton")
        with pytest.raises(NotImplementedError, match=r"jax-triton: pip install 'pjengine\[triton\]'"):
            check_backend("jax_triton")


@pytest.mark.parametrize(
    ("found", "jax_version", "message"),
    [("0.3.1", (0, 11, 2), "jax-triton 0.3.1 is too old"), ("0.4.1", (0, 12, 0), "does not work with JAX")],
)
def test_versions_that_do_not_work_together_are_refused(
    found: str, jax_version: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_extra, "version", lambda name: found)
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", jax_version)
    with pytest.raises(NotImplementedError, match=message):
        import_jax_triton()


def test_versions_of_packages_beside_jax_count_where_they_compile_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_extra, "version", {"jax-triton": "0.4.1", "triton": "3.7.1"}.__getitem__)
    assert backend_versions("jax_triton") == ("jax-triton 0.4.1", "triton 3.7.1")
    assert backend_versions("triton") == backend_versions(None) == ()
