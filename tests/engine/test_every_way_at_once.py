"""Beams, continuations, forms, processors and drafts in one batch: each gets what it gets alone."""

import random
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pjengine import HiddenStatesParams, SamplingParams, StructuredOutputsParams, host_processor
from tests.engine.rescheduling import reschedule, settle

pytestmark = pytest.mark.slow

DRAFTING = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
PROMPTS = [
    "class Stack:",
    "import os\nimport sys\nimport os\n",
    "x = [1, 2, 3, 1, 2, 3,",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n",
]
DIGITS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 9},
    "minItems": 3,
    "maxItems": 5,
}


def never_twice(token_ids: Any, logits: Any) -> Any:
    return logits.at[jnp.where(token_ids < 0, len(logits), token_ids)].set(-jnp.inf, mode="drop")


@host_processor
def without_some(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
    logits[300:400] = -np.inf
    return logits


def requests() -> list[tuple[str, SamplingParams]]:
    words = StructuredOutputsParams(regex="[a-z]{3}( [a-z]{2}){4}")
    digits = StructuredOutputsParams(json=DIGITS, disable_any_whitespace=True)
    beams: dict[str, Any] = {"use_beam_search": True, "temperature": 0, "max_tokens": 16}
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    return [
        (PROMPTS[2], SamplingParams(**beams, best_of=2, early_stopping="never")),
        (PROMPTS[0], SamplingParams(**beams, best_of=4)),
        (PROMPTS[1], SamplingParams(structured_outputs=words, seed=3, n=2, max_tokens=24)),
        (PROMPTS[2], SamplingParams(structured_outputs=digits, seed=4, max_tokens=24)),
        (PROMPTS[2], SamplingParams(**greedy, logits_processors=[never_twice])),
        (PROMPTS[3], SamplingParams(**greedy, logits_processors=[without_some], logprobs=2)),
        (PROMPTS[2], SamplingParams(temperature=0, max_tokens=40)),
        (PROMPTS[3], SamplingParams(temperature=0.7, seed=9, n=2, best_of=3, stop=["return"], max_tokens=24)),
        (PROMPTS[3], SamplingParams(temperature=0.3, seed=9, repetition_penalty=1.1, max_tokens=40)),
        (
            PROMPTS[0],
            SamplingParams(temperature=0, max_tokens=1, hidden_states=HiddenStatesParams(layers=(2,))),
        ),
    ]


def answer(output: Any) -> list[Any]:
    return [(own.token_ids, own.text, own.finish_reason, own.stop_reason) for own in output.outputs]


@pytest.fixture(scope="module")
def drafting() -> Iterator[Any]:
    from pjengine import LLM

    sizes = {"max_num_seqs": 24, "max_num_batched_tokens": 64, "warm_up": False, "dtype": "float32"}
    with LLM("demo", **sizes, speculative_config=DRAFTING) as llm:
        yield llm


@pytest.fixture(scope="module")
def wanted(drafting: Any) -> list[list[Any]]:
    drafting.engine.scheduler.speculation._pays = lambda *_: False
    return [answer(drafting.generate(prompt, params, use_tqdm=False)[0]) for prompt, params in requests()]


@pytest.mark.parametrize("seed", range(4))
def test_each_of_a_mixture_gets_what_it_gets_alone(drafting: Any, wanted: list[list[Any]], seed: int) -> None:
    rng, engine = random.Random(seed), drafting.engine
    reschedule(engine, num_pages=rng.choice([24, 40, 64]))
    engine.scheduler.speculation._pays = lambda *_: rng.random() < 0.5
    num_drafted = engine.scheduler.speculation.num_draft_tokens
    waiting = list(enumerate(requests()))
    rng.shuffle(waiting)
    found: dict[int, Any] = {}
    aborted = set(rng.sample(range(len(waiting)), 2))
    while waiting or engine.has_unfinished_requests():
        if waiting and rng.random() < 0.4:
            index, (prompt, params) = waiting.pop()
            engine.add_request(prompt, params, request_id=str(index))
            continue
        if rng.random() < 0.05:
            engine.abort_request(str(rng.choice(sorted(aborted))))
        found |= {int(own.request_id): own for own in engine.step() if own.finished}
        engine.scheduler.check_integrity()
    for index, output in found.items():
        was_aborted = any(own.finish_reason == "abort" for own in output.outputs)
        assert (was_aborted and index in aborted) or answer(output) == wanted[index], index
    assert set(found) | aborted == set(range(len(wanted)))
    settle(engine)
    assert engine.scheduler.speculation.num_draft_tokens > num_drafted
