from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import pytest

from tests.golden import golden as goldens


@pytest.fixture(scope="session")
def gqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with well separated logits, float32, no tokenizer."""
    return goldens.write_checkpoint(goldens.load("gqa"), tmp_path_factory.mktemp("gqa"))


@pytest.fixture(scope="session")
def demo() -> Iterator[Any]:
    """The packaged model, shared: a test leaves no request behind."""
    from pjengine import LLM

    with LLM("demo", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, warm_up=False) as llm:
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def full_compile(quick_compile: None) -> Iterator[None]:
    """XLA's optimizations, for programs that run so often that they pay."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def unchecked_types() -> Iterator[None]:
    """No checks of annotations: for host code that runs a million times, of which they take nine tenths."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
