"""`best_of`: more continuations are generated than are shown, and the likeliest are shown."""

from collections.abc import Callable, Sequence
from typing import Any

from pjengine.outputs import CompletionOutput
from pjengine.sampling_params import MAX_N, SamplingParams
from pjengine.serving.errors import ApiError
from pjengine.serving.protocol import SamplingFields


def candidates(body: SamplingFields, defaults: SamplingParams) -> dict[str, Any]:
    """The parameters that `best_of` asks for: so many continuations, and the logprobs that rank them.

    Raises:
      ApiError: `best_of` is out of its range, or nothing could be chosen from what it asks for.
    """
    n, best_of = body.n or 1, body.best_of
    if best_of is None or best_of == n or body.use_beam_search:
        return {}
    if not n < best_of <= MAX_N:
        text = f"best_of must be at least n={n} and at most {MAX_N}, got {best_of}"
        raise ApiError(400, text, param="best_of")
    if body.stream:
        text = f"best_of={best_of} above n={n} is not streamed: what is shown is known at the end"
        raise ApiError(400, text, param="best_of")
    temperature = defaults.temperature if body.temperature is None else body.temperature
    if temperature == 0:
        text = f"best_of={best_of} greedy continuations are all the same: raise temperature, got 0"
        raise ApiError(400, text, param="best_of")
    return {"n": best_of, "logprobs": 0}  # 0: of the token itself


def likeliest(
    completions: Sequence[CompletionOutput], n: int, rank: Callable[[CompletionOutput], float]
) -> list[CompletionOutput]:
    """Those `n` that rank highest, the highest first, numbered in that order.

    All of them, as they are, if there are no more.
    """
    if len(completions) <= n:
        return list(completions)
    chosen = sorted(completions, key=rank, reverse=True)[:n]
    for index, completion in enumerate(chosen):
        completion.index = index
    return chosen


def mean_logprob(completion: CompletionOutput) -> float:
    """Of a token, as OpenAI's API ranks."""
    return summed_logprob(completion) / len(completion.token_ids)


def summed_logprob(completion: CompletionOutput) -> float:
    """Of all tokens, as `LLM.generate` ranks."""
    assert completion.cumulative_logprob is not None
    return completion.cumulative_logprob
