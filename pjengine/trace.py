"""A trace of the host and the devices, for https://ui.perfetto.dev."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

from pjengine.engine import LLMEngine

FILE_NAME = "perfetto_trace.json.gz"


@contextmanager
def trace(folder: str | os.PathLike[str], engines: Sequence[LLMEngine]) -> Iterator[Path]:
    """Profiles what runs in it, with the phases of the engines' steps; gives the path of the file to be.

    Steps launched before have ended when it begins, and those launched in it when it ends. What ends by an
    exception leaves no file.
    """
    path = Path(folder, FILE_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would hide the phases, and slow them
    _settle(engines)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch, create_perfetto_trace=True, profiler_options=options):
            yield path
            _settle(engines)
        [made] = Path(scratch).rglob(FILE_NAME)
        shutil.move(made, path)


def _settle(engines: Sequence[LLMEngine]) -> None:
    """Returns once no step is under way."""
    for engine in engines:
        jax.block_until_ready(engine.runner.cache)
