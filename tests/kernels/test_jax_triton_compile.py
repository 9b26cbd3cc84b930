"""What Triton makes of the `jax_triton` kernels on an H200, found without one."""

from collections.abc import Mapping, Sequence

import pytest

from pjengine.pallas_kernels.triton_extra import import_jax_triton
from tests.kernels.jax_triton_compiler import PROGRAMS, Kernel, compile_apart, compiler_path

SHARED_BYTES = 227 * 1024  # that a program may have
SPILLED_BYTES = 8  # one register, stored and loaded: Triton 3.8 does it in two of these kernels, 3.7 in none


@pytest.fixture(scope="module")
def compiled() -> Mapping[str, Sequence[Kernel]]:
    try:
        import_jax_triton()
    except NotImplementedError as error:
        pytest.skip(str(error))
    if compiler_path() is None:
        pytest.skip("needs the CUDA compiler of JAX")
    return compile_apart()


def assert_fits(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.spilled_bytes <= SPILLED_BYTES, kernel
        assert kernel.shared_bytes <= SHARED_BYTES, kernel


@pytest.mark.timeout(900)  # the first one waits for all programs
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_chosen_tiles_fit_and_spill_no_registers(
    compiled: Mapping[str, Sequence[Kernel]], program: str
) -> None:
    assert_fits(compiled[program])


def test_decode_is_one_kernel_and_a_merge_of_its_splits(compiled: Mapping[str, Sequence[Kernel]]) -> None:
    assert [kernel.name for kernel in compiled["decode llama-8b 1"]] == ["_decode_kernel", "_merge_kernel"]
    assert [kernel.name for kernel in compiled["decode llama-8b 256"]] == ["_decode_kernel"]


def test_prefill_takes_the_products_of_hopper_but_not_in_float32(
    compiled: Mapping[str, Sequence[Kernel]],
) -> None:
    [narrow], [wide] = compiled["prefill llama-8b 512"], compiled["prefill llama-8b float32"]
    assert narrow.num_wgmma > 0
    assert wide.num_wgmma == 0  # they would round to TF32


def test_tiles_that_are_too_large_are_found(compiled: Mapping[str, Sequence[Kernel]]) -> None:
    with pytest.raises(AssertionError, match="spilled_bytes"):
        assert_fits(compiled["prefill of 4 warps"])
