"""Triton's interpreter behind `jax_triton.triton_call`: the kernels run in numpy, program by program.

It wants tensors like torch's, and TRITON_INTERPRET set before Triton is imported. For machines without a GPU:
it shows what a kernel computes, not what it is compiled to.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.default_backend() == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}


class HostTensor:
    """What the interpreter asks of a torch tensor; it reads and writes by the address."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = NAMES[str(array.dtype)]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    def cpu(self) -> "HostTensor":
        return self

    def new_empty(self, size: int, device: str) -> "HostTensor":
        return self

    def set_(self, *args: Any) -> None: ...

    def copy_(self, other: "HostTensor") -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


def triton_call(
    *args: jax.Array | None,
    kernel: Any,
    out_type: Any,
    grid: Sequence[int],
    name: str,
    num_warps: int,
    num_stages: int,
    **metaparams: Any,
) -> Any:
    """Outputs start as NaN: what a kernel does not write shows."""
    types, tree = jax.tree.flatten(out_type)
    outs = [np.full(each.shape, np.nan, each.dtype) for each in types]
    tensors = [None if x is None else HostTensor(np.array(x)) for x in args]
    kernel[tuple(grid)](*tensors, *map(HostTensor, outs), **metaparams)
    return jax.tree.unflatten(tree, map(jnp.asarray, outs))


@contextmanager
def interpreted(module: ModuleType) -> Iterator[None]:
    """The kernels of `module` run here. (The wrappers must see arrays, hence no jit.)"""
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(module.jax_triton, "triton_call", triton_call)
        patch.setattr(module, "platform", lambda: "gpu")
        yield
