"""Compiles for an H200 in a process of its own.

JAX finds its CUDA compiler when it is imported; the compiler takes its settings, and prints, by the process.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from tests.compile.target import compiler_path

MARK = "compiled: "  # begins a line that is a Report; what comes before it was printed by the compiler
# As in pyproject: every warning is an error, but for one.
WARNINGS = ("-Werror", "-Wignore:The Pallas Triton:DeprecationWarning")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # which other tests do without
    "XLA_FLAGS": "--xla_gpu_fail_ptx_compilation_on_register_spilling=true",
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # Mosaic has an assembler of its own
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a program."""

    error: str = ""
    printed: str = ""
    hlo: str = ""
    alias_bytes: int = 0
    temp_bytes: int = 0

    @property
    def spilled_bytes(self) -> list[int]:
        """Of each function that Mosaic's assembler made."""
        return [int(size) for size in re.findall(r"(\d+) bytes spill stores", self.printed)]


def compile_apart(names: Sequence[str]) -> dict[str, Report]:
    """Compiles in a process of its own."""
    path = [*(compiler_path() or ()), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-m", __name__, *names],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    reports: dict[str, Report] = {}
    printed: list[str] = []
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            name, fields = json.loads(line.removeprefix(MARK))
            reports[name] = Report(**fields, printed="\n".join(printed))
            printed = []
        else:
            printed.append(line)
    if done.returncode or len(reports) < len(names):
        raise RuntimeError(f"exit {done.returncode} after {list(reports)}: " + "\n".join(printed[-40:]))
    return reports


def report(name: str) -> Report:
    """Compiles here."""
    from tests.compile import divided_steps, functional_programs, kernels, steps, timed

    programs = {**kernels.PROGRAMS, **kernels.FEATURED_MOSAIC, **kernels.WRONG}
    programs |= {**steps.PROGRAMS, **steps.WRONG, **divided_steps.PROGRAMS, **functional_programs.PROGRAMS}
    compile_it = {**programs, **timed.PROGRAMS}[name]
    try:
        program = compile_it()
    except Exception as error:  # which is the result
        return Report(error=f"{type(error).__name__}: {error}")
    memory = program.memory_analysis()
    assert memory is not None
    return Report(
        hlo=program.as_text() or "",
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fields = dataclasses.asdict(report(name))
        del fields["printed"]
        print(MARK + json.dumps([name, fields]), flush=True)
