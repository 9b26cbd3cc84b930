"""Looking into a model: what its layers would answer, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TEXT = "def add(a, b):\n    return a +"


@pytest.fixture(scope="module")
def ids(demo: Any) -> list[int]:
    tokens: list[int] = demo.engine.tokenizer.encode(TEXT)
    return tokens


def test_the_lens_of_the_last_layer_is_what_the_model_says(demo: Any, ids: list[int]) -> None:
    from pjengine.inside import logit_lens

    lens = logit_lens(demo.model, demo.params, ids, layers=(-1, 3), top=4)
    assert lens.layers == (8, 3) and lens.token_ids.shape == (2, len(ids), 4)
    logits = jax.jit(demo.model.forward)(demo.params, jnp.asarray([ids], jnp.int32))[0]
    logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), 4)
    np.testing.assert_array_equal(lens.token_ids[0], tokens)
    np.testing.assert_allclose(lens.logprobs[0], logprobs, atol=1e-4)
    assert (lens.token_ids[0] != lens.token_ids[1]).any() and (np.diff(lens.logprobs) <= 0).all()


def test_the_lens_of_a_served_request_is_that_of_its_tokens(demo: Any, ids: list[int]) -> None:
    from pjengine import HiddenStatesParams, SamplingParams
    from pjengine.inside import logit_lens, logit_lens_of

    layers = (0, 5, -1)
    own = SamplingParams(temperature=0, max_tokens=1, hidden_states=HiddenStatesParams(layers=layers))
    [output] = demo.generate({"prompt_token_ids": ids}, own, use_tqdm=False)
    served = logit_lens_of(demo.model, demo.params, output.hidden_states, layers=layers)
    dense = logit_lens(demo.model, demo.params, ids, layers=layers)
    np.testing.assert_array_equal(served.token_ids[:, -1, 0], dense.token_ids[:, -1, 0])
    np.testing.assert_allclose(served.logprobs, dense.logprobs, atol=1e-3)
    assert served.token_ids[-1, -1, 0] == output.outputs[0].token_ids[0]


def patterns(llm: Any, tokens: Any = (1, 2), **fields: Any) -> Any:
    from pjengine.inside import attention_patterns

    return attention_patterns(llm.model, llm.params, tokens, **{"layers": [0], **fields})


def lens(llm: Any, tokens: Any = (1, 2), **fields: Any) -> Any:
    from pjengine.inside import logit_lens

    return logit_lens(llm.model, llm.params, tokens, **fields)


def lens_of(llm: Any, *shape: int, **fields: Any) -> Any:
    from pjengine.inside import logit_lens_of

    states = np.zeros(shape, np.float32)
    return logit_lens_of(llm.model, llm.params, states, **{"layers": (0, 1), **fields})


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no layers": (lambda llm: patterns(llm, layers=[]), r"layers must be at least one, within \[-8, 7\]"),
    "layer": (lambda llm: patterns(llm, layers=[0, 8]), r"layers must be .* within \[-8, 7\], got \[0, 8\]"),
    "head": (lambda llm: patterns(llm, heads=[64]), "heads must be"),
    "no tokens": (lambda llm: patterns(llm, []), "tokens must be the ids of one sequence, at least one"),
    "vocabulary": (lambda llm: lens(llm, [1, 4096]), "within the vocabulary of 4096"),
    "layer of a lens": (lambda llm: lens(llm, layers=[9]), r"within \[-9, 8\]"),
    "top": (lambda llm: lens_of(llm, 2, 256, top=0), r"top must be within \[1, 4096\], got 0"),
    "other width": (
        lambda llm: lens_of(llm, 2, 3, 128),
        r"states must be \[2 layers, ..., 256\], got \[2, 3",
    ),
    "other layers": (lambda llm: lens_of(llm, 3, 256), r"states must be \[2 layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_to_look_at_is_refused(demo: Any, name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(demo)


def test_more_tokens_than_learned_positions_are_refused_as_by_forward() -> None:
    from pjengine.inside import attention_patterns, logit_lens
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES

    config = replace(SHAPES["tiny"], has_learned_positions=True, max_position_embeddings=9)
    model = build_model(config, jnp.dtype("float32"), 1)
    message = "^the model has 9 positions, got 10 tokens in a row$"
    with pytest.raises(ValueError, match=message):
        model.forward({}, jnp.zeros((1, 10), jnp.int32))
    with pytest.raises(ValueError, match=message):
        attention_patterns(model, {}, [0] * 10, layers=[0])
    with pytest.raises(ValueError, match=message):
        logit_lens(model, {}, [0] * 10)


def test_a_model_on_several_devices_is_refused() -> None:
    from pjengine.inside import attention_patterns
    from pjengine.models.registry import build_model
    from pjengine.models.shapes import SHAPES

    model = build_model(SHAPES["tiny"], jnp.dtype("float32"), 2)
    with pytest.raises(ValueError, match="divided among 2: use tensor_parallel_size=1"):
        attention_patterns(model, {}, [1], layers=[0])
