"""GPUs of one process sum through memory that they lend each other, and others do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.config import RunnerConfig
from pjengine.inboxes import Inboxes, tables_of
from pjengine.memory import plan_memory
from pjengine.models.shapes import SHAPES
from pjengine.models.share import share_of
from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.peer_sum import inbox_bytes
from pjengine.sharding.mesh import choose_devices, make_mesh, replicated

SIZES = RunnerConfig(num_pages=2, page_size=16, max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16)


def test_a_table_has_every_inbox_then_the_own_one_and_its_place() -> None:
    inboxes = [jnp.zeros(4, jnp.uint32), jnp.ones(4, jnp.uint32)]
    addresses = [inbox.unsafe_buffer_pointer() for inbox in inboxes]
    for place, table in enumerate(tables_of(inboxes)):
        words = [int(low) + (int(high) << 32) for low, high in table]
        assert words == [*addresses, addresses[place], place]


def test_devices_that_do_not_see_each_others_memory_have_no_inboxes() -> None:
    sharding = replicated(make_mesh(choose_devices(2)))
    inboxes = Inboxes(sharding, SIZES)
    assert inboxes.renew() is None
    inboxes.free()


def test_inboxes_are_in_the_plan_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def temp_bytes() -> int:
        plan = plan_memory(
            share_of(SHAPES["llama-8b"], 2), jnp.dtype("bfloat16"), weights_bytes=2**33,
            budget_bytes=2**37, kv_cache_memory_bytes=2**34, page_size=16, max_model_len=8192,
            max_num_seqs=256, max_num_batched_tokens=4096, max_logprobs=0,
        )  # fmt: skip
        return plan.temp_bytes

    with_inboxes = temp_bytes()
    monkeypatch.setattr("pjengine.memory.inbox_bytes", lambda num_gpus: 0)
    assert with_inboxes - temp_bytes() == inbox_bytes(2) > 0


@pytest.mark.gpu
@pytest.mark.skipif(len(jax.devices()) < 2, reason="two GPUs sum with each other; here is one")
def test_sums_through_inboxes_give_what_the_collective_library_gives() -> None:
    from pjengine import LLM, SamplingParams

    prompts = [list(range(10 + i, 60 + 7 * i)) for i in range(40)]  # more rows than the fused kernels take
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=1, detokenize=False)
    settings: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "warm_up": False}
    settings |= {"tensor_parallel_size": 2, "max_num_seqs": 64, "max_num_batched_tokens": 1024}
    found = []
    for is_disabled in (False, True):
        # Without inboxes no norm is asked for with its sum: that record is of an engine before.
        ops = ["peer_sum", "peer_sum_residual", *(["peer_sum_norm"] if not is_disabled else [])]
        with LLM("llama-1b", disable_custom_all_reduce=is_disabled, **settings) as llm:
            for few in (prompts[:3], prompts):
                outputs = llm.generate(few, params, use_tqdm=False)
        assert {chosen_backends()[op] for op in ops} == {"reference" if is_disabled else "mosaic"}
        logprobs: list[Any] = [each.prompt_logprobs for each in outputs]
        values = [next(iter(at.values())).logprob for of_prompt in logprobs for at in of_prompt[1:]]
        found.append(np.asarray(values))
    np.testing.assert_allclose(found[0], found[1], atol=0.1)
    assert np.abs(found[0] - found[1]).mean() < 0.01
