"""Models with windows answer as they do when no page is given back, and hold no more than the windows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.rescheduling import reschedule, settle
from tests.golden import golden as goldens

WINDOW = PAGE_SIZE = 16  # of the checkpoint, and of pages
MAX_LEN = 128
# Layers that see everything and layers that see a window take turns; or all see a window.
LAYERS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "all": {"layer_types": ["sliding_attention"] * 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.write_checkpoint(goldens.load("gemma2"), tmp_path_factory.mktemp("gemma2"))


def open_llm(folder: Path, layers: str, **settings: Any) -> Any:
    from pjengine import LLM

    return LLM(
        folder,
        dtype="float32",
        hf_overrides=LAYERS[layers],
        warm_up=False,
        skip_tokenizer_init=True,
        **{"max_num_seqs": 4, "max_num_batched_tokens": 24, "decode_steps": 3, **settings},
    )


@pytest.fixture(scope="module", params=["mixed", pytest.param("all", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, folder: Path, unchecked_types: None) -> Iterator[tuple[Any, Any]]:
    """Engines of the same model, with pages of windows apart and with one group of pages for all layers."""
    with pytest.MonkeyPatch.context() as patch, open_llm(folder, request.param) as apart:
        patch.setattr("pjengine.runner.PATIENCE", 1_000_000)  # the largest programs are enough
        assert apart.engine.runner.config.window_group.window == WINDOW
        patch.setattr("pjengine.models.config.ModelConfig.windowed_layers", lambda self, max_len: {})
        with open_llm(folder, request.param) as together:
            assert together.engine.runner.config.window_group is None
            prompts, params = make_requests(4)
            for kind in (params[3], params[0]):
                for llm in (apart, together):
                    llm.generate(prompts, kind, use_tqdm=False)
            yield apart, together


def make_requests(num: int) -> tuple[list[list[int]], list[Any]]:
    """Prompts of up to 80 tokens, whose beginnings agree, and one to three continuations of each."""
    from pjengine import SamplingParams

    rng = np.random.default_rng(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0},
        {"temperature": 0.8, "repetition_penalty": 1.5, "presence_penalty": 0.5},  # of all tokens before
    ]
    shared, prompts, params = rng.integers(0, 136, 80), [], []
    for i in range(num):
        own = rng.integers(0, 136, int(rng.integers(1, 40)))
        prompts.append([*shared[: int(rng.choice([0, 40, 70]))], *own][:80])
        max_tokens = int(rng.integers(1, MAX_LEN - 80))
        params.append(SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **kinds[i % 4]))
    return [[int(token) for token in prompt] for prompt in prompts], params


def tokens_of(outputs: list[Any]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def num_held(engine: Any) -> list[int]:
    return [pool.num_usable - pool.num_free for pool in engine.scheduler.pools]


def test_tokens_are_those_of_hugging_face_and_no_page_outlives_its_window(folder: Path) -> None:
    from pjengine import SamplingParams

    golden = goldens.load("gemma2")
    num_prompt, num_tokens = len(golden.prompt), len(golden.tokens)
    assert num_prompt > 2 * WINDOW
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    with open_llm(folder, "mixed", decode_steps=1, kernel_backend="triton_interpret") as llm:
        engine, most = llm.engine, [0, 0]
        generation = engine.add_request(golden.prompt, params)
        while engine.has_unfinished_requests():
            engine.step()
            engine.scheduler.check_integrity()
            is_decoding = engine.scheduler.rows.computed[0] > num_prompt
            held = num_held(engine)
            most = [max(pair) for pair in zip(most, held, strict=True)]
            # The window of the token to come, across two pages; and before it the chunk of the step.
            assert held[1] <= (2 if is_decoding else 4)
        assert generation.completions[0].request.output_token_ids == golden.tokens
        assert most[0] == -(-(num_prompt + num_tokens - 1) // PAGE_SIZE) > 4
        settle(engine)


def test_answers_equal_those_of_pages_that_are_kept(pair: tuple[Any, Any]) -> None:
    apart, together = pair
    prompts, params = make_requests(10)
    wanted = tokens_of(together.generate(prompts, params, use_tqdm=False))
    for limits in (
        {},
        {"is_caching": False, "max_num_batched_tokens": 5},
        {"num_pages": 9, "decode_steps": 1},  # one request may need 8
        {"num_window_pages": 5},  # one request may need 4
    ):
        reschedule(apart.engine, **{"num_pages": 33, **SETTINGS, **limits})
        outputs = apart.generate(prompts, params, use_tqdm=False)
        assert tokens_of(outputs) == wanted
        num_preempted = sum(output.metrics.num_preemptions for output in outputs)
        assert num_preempted > 0 or not {"num_pages", "num_window_pages"} & limits.keys()
        settle(apart.engine)


SETTINGS: dict[str, Any] = {"is_caching": True, "max_num_batched_tokens": 24, "decode_steps": 3}


def test_what_is_cached_behind_a_window_is_used_and_gives_the_same(pair: tuple[Any, Any]) -> None:
    apart, together = pair
    prompts, params = make_requests(8)
    wanted = tokens_of(together.generate(prompts, params, use_tqdm=False))
    reschedule(apart.engine, num_pages=33, **SETTINGS)
    apart.generate(prompts[-1:], params[-1:], use_tqdm=False)
    num_cached = []
    for prompt, own, tokens in zip(prompts, params, wanted, strict=True):
        for _ in range(2):
            [output] = apart.generate(prompt, own, use_tqdm=False)
            assert tokens_of([output]) == [tokens]
        num_cached.append(output.num_cached_tokens)
    full = [(len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE for prompt in prompts]
    assert num_cached == full and max(full) > 2 * WINDOW
    settle(apart.engine)
