"""An engine whose devices compute each token together gives what one device gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import golden as goldens

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "skip_tokenizer_init": True}
SIZES |= {"dtype": "float32", "warm_up": False, "decode_steps": 1, "kv_cache_memory_bytes": 2**20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    goldens.write_checkpoint(goldens.load("gqa"), folder)
    return folder


def answers(llm: Any) -> list[Any]:
    """Of every way to decode, side by side."""
    from pjengine import HiddenStatesParams, SamplingParams

    some: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, **some),
        SamplingParams(temperature=0.8, seed=3, logprobs=2, repetition_penalty=1.2, **some),
        SamplingParams(temperature=0, use_beam_search=True, best_of=3, n=2, max_tokens=6),
        SamplingParams(temperature=1, seed=5, logit_bias={7: 5.0}, **some),
        SamplingParams(temperature=0, max_tokens=1, hidden_states=HiddenStatesParams(layers=(0, -1))),
    ]
    prompt = goldens.load("gqa").prompt
    return llm.generate([prompt[: 20 + i] for i in range(len(params))], params, use_tqdm=False)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[tuple[Any, Any]]:
    from pjengine import LLM

    with LLM(folder, **SIZES) as llm:
        yield llm.engine.memory_plan, answers(llm)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_every_way_to_decode_gives_the_tokens_of_one_device(
    num_devices: int, folder: Path, alone: tuple[Any, Any]
) -> None:
    from pjengine import LLM

    plan, wanted = alone
    drafting = {"method": "ngram", "num_speculative_tokens": 3}
    with LLM(folder, tensor_parallel_size=num_devices, speculative_config=drafting, **SIZES) as llm:
        found = answers(llm)
        cache, own = llm.engine.runner.cache, llm.engine.memory_plan
        held = [shard.data.nbytes for shard in cache.k.addressable_shards]
    assert [[one.token_ids for one in output.outputs] for output in found] == [
        [one.token_ids for one in output.outputs] for output in wanted
    ]
    np.testing.assert_allclose(found[-1].hidden_states, wanted[-1].hidden_states, atol=1e-4)
    assert own.weights_bytes < plan.weights_bytes
    assert len(held) == num_devices and sum(held) == num_devices * held[0]


def sampled_together(llm: Any) -> list[list[int]]:
    """Of decode steps as large as any: of rows without filters, then among others that have some."""
    from pjengine import SamplingParams

    plain: list[Any] = [{"temperature": 0}, {"temperature": 1}, {"temperature": 1.5}]
    filtered: list[Any] = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.5}]
    prompt, tokens = goldens.load("gqa").prompt, []
    for kinds in (plain, plain + filtered):
        params = [
            SamplingParams(seed=i, max_tokens=6, ignore_eos=True, **kinds[i % len(kinds)]) for i in range(16)
        ]
        outputs = llm.generate([prompt[: 3 + i % 5] for i in range(16)], params, use_tqdm=False)
        tokens += [output.outputs[0].token_ids for output in outputs]
    return tokens


def test_rows_with_and_without_filters_get_the_tokens_of_one_device(folder: Path) -> None:
    from pjengine import LLM

    sizes = SIZES | {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    with LLM(folder, **sizes) as llm:
        wanted = sampled_together(llm)
        assert all(layout.has_filters for layout in llm.engine.runner.layouts())
    with LLM(folder, tensor_parallel_size=4, **sizes) as llm:
        found, runner = sampled_together(llm), llm.engine.runner
        used = [layout for layout in runner.layouts() if layout in runner.programs]
        assert {layout.has_filters for layout in used if layout.is_decode} == {False, True}
        assert len(used) == len(runner.programs)
    assert found == wanted


def test_more_devices_than_there_are_and_draft_models_are_refused(folder: Path) -> None:
    from pjengine import LLM

    with pytest.raises(ValueError, match="tensor_parallel_size=5 needs as many devices, found 4"):
        LLM(folder, tensor_parallel_size=5, **SIZES)
    draft = {"model": str(folder), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="tensor_parallel_size=2 with a draft model is not supported"):
        LLM(folder, tensor_parallel_size=2, speculative_config=draft, **SIZES)
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number of at least 1"):
        LLM(folder, tensor_parallel_size=0, **SIZES)
