"""A seed means the same tokens, whatever else the engine does meanwhile."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.rescheduling import reschedule, settle

RNG = np.random.default_rng(8)
PROMPT: list[int] = RNG.integers(0, 160, 28).tolist()
OTHERS: list[list[int]] = RNG.integers(0, 160, (64, 3)).tolist()
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9, "min_p": 0.02},
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def engine(gqa_folder: Path) -> Iterator[Any]:
    from pjengine import LLM

    sizes = {"max_num_seqs": 65, "max_num_batched_tokens": 256, "max_model_len": 64}
    with LLM(gqa_folder, dtype="float32", warm_up=False, skip_tokenizer_init=True, **sizes) as llm:
        yield llm.engine


def run(engine: Any, sampling: dict[str, Any], others: Sequence[list[int]] = (), **limits: Any) -> Any:
    """The output of the request with the seed, which comes after the others."""
    from pjengine import SamplingParams

    reschedule(engine, **{"max_num_batched_tokens": 256, "is_caching": False, **limits})
    shape: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    for other in others:
        engine.add_request(other, SamplingParams(**shape, temperature=1.0))
    engine.add_request(PROMPT, SamplingParams(**shape, **sampling, seed=2**40 + 5), request_id="seeded")
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        engine.scheduler.check_integrity()
    settle(engine)
    return outputs["seeded"]


@pytest.fixture(scope="module")
def alone(engine: Any) -> list[list[int]]:
    tokens = [run(engine, sampling).outputs[0].token_ids for sampling in SAMPLING]
    assert len({tuple(own) for own in tokens}) == len(SAMPLING), "the parameters make no difference"
    return tokens


CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "again": {},
    "within 64 others": {"others": OTHERS},
    "after a preemption": {"others": [PROMPT[:20]], "num_pages": 6},
    "in chunks of 5": {"max_num_batched_tokens": 5},
    "in chunks of 17": {"max_num_batched_tokens": 17},
}


@pytest.mark.parametrize("circumstances", CIRCUMSTANCES.values(), ids=CIRCUMSTANCES)
def test_a_seed_gives_the_same_tokens(
    engine: Any, alone: list[list[int]], circumstances: dict[str, Any]
) -> None:
    for sampling, wanted in zip(SAMPLING, alone, strict=True):
        output = run(engine, sampling, **circumstances)
        assert output.outputs[0].token_ids == wanted
        assert (output.metrics.num_preemptions > 0) == ("num_pages" in circumstances)


def test_another_seed_gives_other_tokens(engine: Any, alone: list[list[int]]) -> None:
    from pjengine import SamplingParams

    settings = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=6)
    generation = engine.add_request(PROMPT, settings)
    while engine.has_unfinished_requests():
        engine.step()
    assert generation.output().outputs[0].token_ids != alone[0]
