"""The `jax_triton` kernels, compiled for an H200.

In a process of its own, as in `worker`; Triton too learns when it is imported whether to compile. XLA takes
their PTX as it is: NVIDIA's assembler, which comes with Triton, does the rest here.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.pallas_kernels.ragged_prefill import PrefillTiles
from pjengine.pallas_kernels.shapes import SHAPES
from tests.compile.target import compiler_path
from tests.kernels.cases import cuda_target

MARK = "compiled: "


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What became of one kernel of a program."""

    name: str
    num_registers: int
    spilled_bytes: int
    shared_bytes: int
    num_wgmma: int


def compile_apart() -> dict[str, list[Kernel]]:
    """Compiles every program, in a process of its own."""
    path = [*(compiler_path() or ()), *filter(None, sys.path)]
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_TRITON_DUMP_DIR": folder,
            "PYTHONPATH": os.pathsep.join(path),
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            env={**kept, **settings},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stdout[-4000:]}")
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return {name: [Kernel(**each) for each in kernels] for name, kernels in map(json.loads, lines)}


def lower(
    name: str, num_tokens: int, *, is_decode: bool, dtype: str = "bfloat16", tiles: Any = None, **variant: Any
) -> None:
    from pjengine.pallas_kernels.jax_triton_attention import decode_jax_triton, ragged_jax_triton

    shape, struct = SHAPES[name], jax.ShapeDtypeStruct
    pages = struct((4096, shape.num_kv_heads, shape.page_size, shape.head_dim), dtype)
    q = struct((num_tokens, shape.num_heads, shape.head_dim), dtype)
    num_seqs = num_tokens if is_decode else 4
    sizes = ((num_seqs, 64), (num_seqs,), *([] if is_decode else [(num_seqs + 1,)]), ())
    arrays = {key: struct((shape.num_heads,), "float32") for key, each in variant.items() if each is True}
    static = {key: each for key, each in variant.items() if each is not True}
    kernel: Callable[..., Any] = decode_jax_triton if is_decode else ragged_jax_triton
    attend = functools.partial(kernel, scale=0.1, tiles=tiles, **static)
    with cuda_target():
        traced = jax.jit(attend).trace(
            q, pages, pages, *(struct(size, jnp.int32) for size in sizes), **arrays
        )
        traced.lower(lowering_platforms=("cuda",))


decode, prefill = functools.partial(lower, is_decode=True), functools.partial(lower, is_decode=False)
ALL: Mapping[str, Any] = {"alibi_slopes": True, "sinks": True, "window": 300, "softcap": 30.0}
PROGRAMS: Mapping[str, Callable[[], None]] = {
    **{f"decode {name} 1": functools.partial(decode, name, 1) for name in SHAPES},
    "decode llama-8b 256": functools.partial(decode, "llama-8b", 256),
    "decode llama-8b float32": functools.partial(decode, "llama-8b", 1, dtype="float32"),
    "decode llama-8b variant": functools.partial(decode, "llama-8b", 1, **ALL),
    **{f"prefill {name} 512": functools.partial(prefill, name, 512) for name in SHAPES},
    "prefill llama-8b 32": functools.partial(prefill, "llama-8b", 32),
    "prefill llama-8b float32": functools.partial(prefill, "llama-8b", 512, dtype="float32"),
    "prefill llama-8b variant": functools.partial(prefill, "llama-8b", 512, **ALL),
}
WRONG: Mapping[str, Callable[[], None]] = {
    "prefill of 4 warps": functools.partial(
        prefill, "llama-8b", 512, tiles=PrefillTiles(block_m=128, block_kv=128, num_warps=4)
    )
}


def assemble(ptx: Path) -> Kernel:
    """Compiles PTX to the machine's code. Beside it lies what jax-triton knows of the kernel."""
    import triton

    text = ptx.read_text()
    done = subprocess.run(
        [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", os.devnull],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    info = ptx.with_suffix(".compile_info").read_text()
    return Kernel(
        name=ptx.stem,
        num_registers=max(map(int, re.findall(r"Used (\d+) registers", done.stderr))),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        shared_bytes=int(info.rpartition(":")[2]),
        num_wgmma=text.count("wgmma.mma_async"),
    )


if __name__ == "__main__":
    for name, run in {**PROGRAMS, **WRONG}.items():
        run()
        dumped = Path(os.environ["JAX_TRITON_DUMP_DIR"]).glob("*/*.ptx")
        found = sorted(dumped, key=lambda ptx: ptx.name)
        print(MARK + json.dumps([name, [dataclasses.asdict(assemble(ptx)) for ptx in found]]), flush=True)
        for ptx in found:
            ptx.unlink()
