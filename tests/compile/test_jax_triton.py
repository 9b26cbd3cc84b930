"""The `jax_triton` kernels on an H200, found without one: no spilled registers, enough shared memory."""

from collections.abc import Mapping, Sequence

import pytest

from pjengine.pallas_kernels.triton_extra import import_jax_triton
from tests.compile.jax_triton_kernels import PROGRAMS, Kernel, compile_apart
from tests.compile.target import compiler_path

SHARED_BYTES = 227 * 1024  # that a program may have
SPILLED_BYTES = 8  # one register, stored and loaded: Triton 3.8 does it in two of these kernels, 3.7 in none


@pytest.fixture(scope="module")
def kernels() -> Mapping[str, Sequence[Kernel]]:
    try:
        import_jax_triton()
    except NotImplementedError as error:
        pytest.skip(str(error))
    if compiler_path() is None:
        pytest.skip("needs JAX's CUDA compiler, which `make test` installs")
    return compile_apart()


def assert_fits(found: Sequence[Kernel]) -> None:
    for kernel in found:
        assert kernel.spilled_bytes <= SPILLED_BYTES, kernel
        assert kernel.shared_bytes <= SHARED_BYTES, kernel


@pytest.mark.timeout(900)  # the first one waits for all programs
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_chosen_tiles_fit_and_spill_no_registers(
    kernels: Mapping[str, Sequence[Kernel]], name: str
) -> None:
    assert_fits(kernels[name])


def test_decode_is_one_kernel_and_a_merge_of_its_splits(kernels: Mapping[str, Sequence[Kernel]]) -> None:
    assert [kernel.name for kernel in kernels["decode llama-8b 1"]] == ["_decode_kernel", "_merge_kernel"]
    assert [kernel.name for kernel in kernels["decode llama-8b 256"]] == ["_decode_kernel"]


def test_prefill_takes_the_products_of_hopper_but_not_in_float32(
    kernels: Mapping[str, Sequence[Kernel]],
) -> None:
    [narrow], [wide] = kernels["prefill llama-8b 512"], kernels["prefill llama-8b float32"]
    assert narrow.num_wgmma > 0
    assert wide.num_wgmma == 0  # they would round to TF32


def test_tiles_that_are_too_large_are_found(kernels: Mapping[str, Sequence[Kernel]]) -> None:
    with pytest.raises(AssertionError, match="spilled_bytes"):
        assert_fits(kernels["prefill of 4 warps"])
