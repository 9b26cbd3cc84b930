"""Logprobs that rollouts bring back are those that the trainer computes, in float32 to 1e-5."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import golden as goldens

PROMPT_LENS, NUM_SAMPLED, LENGTH = (3, 18, 33, 60), 2, 80


def differences(folder: Path) -> np.ndarray:
    """Of every sampled token: chunks, decodes, and a batch that changes, against one dense pass."""
    import jax
    import jax.numpy as jnp

    from pjengine import LLM, SamplingParams

    sizes: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": LENGTH}
    with LLM(str(folder), dtype="float32", warm_up=False, skip_tokenizer_init=True, **sizes) as llm:
        rng, vocab_size = np.random.default_rng(2), llm.model.config.vocab_size
        prompts = [rng.integers(4, vocab_size, length).tolist() for length in PROMPT_LENS]
        params = SamplingParams(n=NUM_SAMPLED, max_tokens=12, seed=5, ignore_eos=True, logprobs=0)
        rollouts, prompt_lens, sampled = [], [], []
        for output in llm.generate(prompts, params, use_tqdm=False):
            for own in output.outputs:
                rollouts.append(output.prompt_token_ids + own.token_ids)
                prompt_lens.append(len(output.prompt_token_ids))
                likely: Any = own.logprobs
                chosen = zip(likely, own.token_ids, strict=True)
                sampled.append([position[token].logprob for position, token in chosen])
        tokens = jnp.asarray([own + [0] * (LENGTH - len(own)) for own in rollouts], jnp.int32)
        logprobs = jax.jit(llm.model.logprobs)(llm.params, tokens, prompt_lens=jnp.asarray(prompt_lens))
        found = np.asarray(logprobs)
    pairs = [
        own - found[row, start - 1 :][: len(own)]
        for row, (start, own) in enumerate(zip(prompt_lens, sampled, strict=True))
    ]
    return np.concatenate(pairs)


@pytest.mark.parametrize(
    "name",
    [
        "gqa",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt2", "gemma2", "mixtral", "bloom", "gpt_oss", "phi3_longrope_long")
        ),
    ],
)
def test_rollout_and_trainer_agree_on_the_logprobs_of_sampled_tokens(name: str, tmp_path: Path) -> None:
    # Projections of twice the neutral scale make 2e-5 of a float32's rounding, in either of the two.
    golden = replace(goldens.load(name), projection_scale=1.0)
    found = differences(goldens.write_checkpoint(golden, tmp_path))
    assert found.shape == (len(PROMPT_LENS) * NUM_SAMPLED * 12,)
    assert np.abs(found).max() < 1e-5, np.abs(found).max()
