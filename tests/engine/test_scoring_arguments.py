"""What cannot be scored or encoded is refused by name, whatever its type, and nothing has been run then."""

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("unchecked_types")  # it is our own refusals that are looked at

LONG = [5] * 75


@pytest.fixture(scope="module")
def llm(gqa_folder: Any) -> Iterator[Any]:
    from pjengine import LLM

    with LLM(gqa_folder, dtype="float32", warm_up=False, skip_tokenizer_init=True, max_model_len=96) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompts", "completions", "error", "message"),
    [
        ([1, 2], [], ValueError, "completions is empty"),
        ([1, 2], [[]], ValueError, r"a completion is empty: at least one token is needed, got \[\]"),
        ([1, 2], "text", TypeError, "completions must be a list of texts or of token ids, got 'text'"),
        ([1, 2], [3], TypeError, "completions must be a list .* got 3 in it"),
        ([1, 2], [[160]], ValueError, "token id 160 is out of the vocabulary of 160"),
        ([[1], [2]], [[[1]]], ValueError, "a list for each of the 2 prompts, got 1"),
        ([], [[1]], ValueError, "a list for each of the 0 prompts, got 1"),
        ([[]], [[[1]]], ValueError, "the prompt is empty"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_runs(
    llm: Any, prompts: Any, completions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.score(prompts, completions)
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ([1], {}, "at least two tokens to have a perplexity, got 1"),
        ([1, 2], {"max_window": 97}, r"max_window must be in \[2, 96\].* got 97"),
        ([1, 2], {"max_window": 8, "stride": 8}, r"stride must be in \[1, 7\].* got 8"),
        ([1, 2], {"stride": 0}, r"stride must be in \[1, 95\].* got 0"),
        ([1, 2], {"stride": True}, r"stride must be in \[1, 95\].* got True"),
    ],
)
def test_what_has_no_perplexity_is_refused(llm: Any, text: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.perplexity(text, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, r"layers must be a list of at least one number, got \(\)"),
        ({"layers": 3}, "layers must be a list of at least one number, got 3"),
        ({"layers": (True,)}, "layers must hold whole numbers, got True"),
        ({"pooling": "max"}, "pooling must be 'mean', 'last' or None, got 'max'"),
    ],
)
def test_what_is_no_wish_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    from pjengine import HiddenStatesParams

    with pytest.raises(ValueError, match=message):
        HiddenStatesParams(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, r"layers must be within \[-4, 3\] with this model, got 4"),
        ({"layer": -5}, r"layers must be within \[-4, 3\] with this model, got -5"),
        ({"layer": 1.0}, "layer must be a whole number, got 1.0"),
        ({"pooling": None}, "pooling must be 'mean' or 'last', got None"),
        ({"truncate_prompt_tokens": 97}, "truncate_prompt_tokens=97 is more than max_model_len=96"),
    ],
)
def test_an_embedding_that_is_not_possible_is_refused_before_anything_runs(
    llm: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.encode([LONG], **arguments)
    assert not llm.engine.has_unfinished_requests()


def test_states_of_every_token_go_not_with_cached_pages() -> None:
    from pjengine import HiddenStatesParams, SamplingParams

    with pytest.raises(ValueError, match="hidden_states needs the whole prompt computed"):
        SamplingParams(hidden_states=HiddenStatesParams(), skip_reading_prefix_cache=False)
