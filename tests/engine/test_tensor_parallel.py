"""An engine whose devices compute each token together gives what one device gives."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import golden as goldens
from tests.models.test_share import EACH, ODD, QUICK

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "skip_tokenizer_init": True}
SIZES |= {"dtype": "float32", "warm_up": False, "decode_steps": 1, "kv_cache_memory_bytes": 2**20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    goldens.write_checkpoint(goldens.load("gqa"), folder)
    return folder


def steer(state: Any, token: Any, direction: Any, strength: Any) -> Any:
    return state + strength * direction


def answers(llm: Any) -> list[Any]:
    """Of every way to decode, side by side."""
    from pjengine import ActivationEdit, HiddenStatesParams, SamplingParams

    some: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, **some),
        SamplingParams(temperature=0.8, seed=3, logprobs=2, repetition_penalty=1.2, **some),
        SamplingParams(temperature=0, use_beam_search=True, best_of=3, n=2, max_tokens=6),
        SamplingParams(temperature=1, seed=5, logit_bias={7: 5.0}, **some),
        SamplingParams(temperature=0, max_tokens=1, hidden_states=HiddenStatesParams(layers=(0, -1))),
        SamplingParams(
            temperature=0, activation_edits=[ActivationEdit(1, steer, (np.ones(64), 0.5))], **some
        ),
    ]
    prompt = goldens.load("gqa").prompt
    return llm.generate([prompt[: 20 + i] for i in range(len(params))], params, use_tqdm=False)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[tuple[Any, Any]]:
    from pjengine import LLM

    with LLM(folder, **SIZES) as llm:
        yield llm.engine.memory_plan, answers(llm)


@pytest.mark.parametrize("num_devices", [2, pytest.param(4, marks=pytest.mark.slow)])
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
    np.testing.assert_allclose(found[4].hidden_states, wanted[4].hidden_states, atol=1e-4)
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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mqa", {}),  # its only KV head is on both devices
        pytest.param("gpt_oss", {"enable_expert_parallel": True}, marks=pytest.mark.slow),
    ],
)
def test_a_draft_model_is_divided_as_the_model_is(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """It is the model: so every draft holds."""
    from pjengine import SamplingParams
    from tests.engine.test_draft_model import open_llm

    golden = goldens.load(name)
    folder = goldens.write_checkpoint(golden, tmp_path)
    some: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    params = [SamplingParams(temperature=0, **some), SamplingParams(temperature=0.9, seed=5, **some)]
    prompts = [golden.prompt[:20], golden.prompt[:13]]
    with open_llm(folder, None, **SIZES) as llm:
        wanted = llm.generate(prompts, params, use_tqdm=False)
    with open_llm(folder, folder, tensor_parallel_size=2, **settings, **SIZES) as llm:
        found = llm.generate(prompts, params, use_tqdm=False)
        speculation, cache = llm.engine.scheduler.speculation, llm.engine.runner.cache
        held = [shard.data.shape for shard in cache.draft_k.addressable_shards]
    assert [own.outputs for own in found] == [own.outputs for own in wanted]
    assert 0 < speculation.num_draft_tokens == speculation.num_accepted_tokens
    assert len(held) == 2 and held[0][1] == 1  # KV head


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in [*EACH, *ODD]),
        *(
            pytest.param(name, 2, marks=pytest.mark.slow if name in QUICK else pytest.mark.sweep)
            for name in [*EACH, *ODD]
        ),
    ],
)
def test_devices_that_divide_any_architecture_generate_what_transformers_does(
    name: str, num_devices: int, tmp_path: Path
) -> None:
    """One device does, too: `tests/models/test_architectures.py`."""
    from pjengine import LLM, SamplingParams

    golden = goldens.load(name)
    folder = goldens.write_checkpoint(golden, tmp_path)
    sizes = SIZES | {"kv_cache_memory_bytes": 2**22, "compile_cache_dir": ""}
    with LLM(folder, tensor_parallel_size=num_devices, **sizes) as llm:
        params = SamplingParams(temperature=0, max_tokens=len(golden.tokens), ignore_eos=True)
        [output] = llm.generate([golden.prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids == golden.tokens


LARGER = [("gpt_oss", 4), ("qwen3_moe", 2), ("qwen3_moe", 4)]


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [
        ("mixtral", 2),
        *(pytest.param(name, num, marks=pytest.mark.slow) for name, num in LARGER),
    ],
)
def test_devices_with_whole_experts_generate_what_transformers_does(
    name: str, num_devices: int, tmp_path: Path
) -> None:
    from pjengine import LLM, SamplingParams

    golden = goldens.load(name)
    folder, parallel = goldens.write_checkpoint(golden, tmp_path), {"enable_expert_parallel": True}
    with LLM(folder, tensor_parallel_size=num_devices, **parallel, **SIZES) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        [output] = llm.generate([golden.prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids == golden.tokens[:12]


def test_experts_that_are_not_there_to_be_divided_are_refused(folder: Path) -> None:
    from pjengine import LLM

    with pytest.raises(ValueError, match="enable_expert_parallel=True divides experts among the devices of"):
        LLM(folder, enable_expert_parallel=True, **SIZES)
    with pytest.raises(ValueError, match=r"wants a mixture of experts, and .* has none \(LlamaForCausalLM\)"):
        LLM(folder, enable_expert_parallel=True, tensor_parallel_size=2, **SIZES)


def test_numbers_of_devices_that_cannot_be_are_refused(folder: Path) -> None:
    from pjengine import LLM

    with pytest.raises(ValueError, match="tensor_parallel_size=5 needs as many devices, found 4"):
        LLM(folder, tensor_parallel_size=5, **SIZES)
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number of at least 1"):
        LLM(folder, tensor_parallel_size=0, **SIZES)


def test_no_program_takes_an_input_without_elements(folder: Path) -> None:
    """JAX 0.11's compiler crashes on one that several devices read."""
    from pjengine import LLM
    from pjengine.draw import DrawLayout
    from pjengine.edit_sizes import EditSizes

    with LLM(str(folder), tensor_parallel_size=2, **SIZES) as llm:
        text = llm.engine.runner.compiler.lower(DrawLayout(4, EditSizes(num_top=2))).as_text()
    assert re.findall(r"%arg\d+: tensor<4x", text) and not re.findall(r"%arg\d+: tensor<0x", text)


EIGHT = """
import json
from pjengine import LLM, SamplingParams

sizes = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "warm_up": False}
prompts, params = ["import os", "class Stack:"], SamplingParams(temperature=0, max_tokens=12)
for devices in ({}, {"tensor_parallel_size": 8}, {"tensor_parallel_size": 4, "data_parallel_size": 2}):
    with LLM("demo", **devices, **sizes) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""


@pytest.mark.slow
def test_eight_devices_together_or_in_two_engines_give_the_tokens_of_one() -> None:
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"  # the last one counts
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone, *others = map(json.loads, done.stdout.splitlines())
    assert [len(tokens) for tokens in alone] == [12, 12] and others == [alone, alone]
