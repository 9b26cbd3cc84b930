"""An NVIDIA H200 to compile for where there is none: XLA's CUDA compiler needs only its description."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from pjengine.sharding.mesh import AXES
from tests.kernels.cases import cuda_target

WHEELS = Path(sys.prefix) / "cuda-compiler"  # where the Makefile puts the CUDA compiler of a CPU machine
DESCRIPTION = Path(__file__).parent / "h200.txtpb"


def compiler_path() -> list[str] | None:
    """What to add to the path of imports for the CUDA compiler of JAX; None: there is none."""
    if any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return []  # JAX's CUDA build, as on a GPU machine
    return [str(WHEELS)] if WHEELS.exists() else None


def chosen(programs: Iterable[str]) -> list[Any]:
    """Parameters of tests: those of llama-8b in bfloat16; the others, which take minutes, are marked slow."""
    return [
        program
        if "llama-8b " in program and "float32" not in program
        else pytest.param(program, marks=pytest.mark.slow)
        for program in programs
    ]


@functools.cache
def sharding(num_devices: int = 1) -> NamedSharding:
    """Of what is whole on every H200 of one machine."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DESCRIPTION.read_text(), topology=f"1x1x{num_devices}"
    )
    mesh: Mesh = topologies.make_mesh(topo=topology, mesh_shape=(1, num_devices), axis_names=AXES)
    return NamedSharding(mesh, PartitionSpec())


def struct(shape: Sequence[int], dtype: Any = jnp.int32) -> Any:
    """Stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding())


def compile_for_h200(function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()) -> Compiled:
    """The function, traced for the shapes of `args`, through XLA and NVIDIA's assembler."""
    with cuda_target():
        lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    return lowered.compile()
