import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.client import Client, make_client

# Few programs, and small: compiling is what these tests would spend their time with.
TINY: dict[str, Any] = {
    "load_format": "dummy",
    "hf_overrides": {"num_hidden_layers": 1},
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "decode_steps": 1,
    "warm_up": False,
}


@pytest.fixture(scope="session")
def llm() -> Iterator[Any]:
    """One layer of random weights under the packaged tokenizer, for all tests in this process."""
    from pjengine import AsyncLLM

    llm = AsyncLLM("demo", **TINY)
    yield llm
    llm.close()


@pytest.fixture
def client(llm: Any) -> Iterator[Client]:
    """Calls the application with its default settings; a test leaves nothing behind."""
    client = make_client(llm)
    yield client
    client.assert_idle()


@pytest.fixture
def takes_interrupts() -> Iterator[None]:
    """SIGINT reaches what a test starts, even if the tests run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
