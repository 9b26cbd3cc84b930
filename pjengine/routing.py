"""Which of several engines a request goes to. Plain Python.

Where there is least to do: an engine's load is the sum of what its unfinished requests count. A request
counts the tokens of its prompt that the engine's prefix cache has not, and for each of its rows the tokens
that it may generate, at most ANSWER_TOKENS: how long an answer gets, nobody knows before.

An engine that has c tokens of the prompt cached may be ahead of the others by c: that is what it saves. Of
equals the first one is taken.
"""

from collections.abc import Sequence

from pjengine.request import Request

ANSWER_TOKENS = 256  # the most that a row's answer counts


def choose_engine(loads: Sequence[int], cached: Sequence[int]) -> int:
    """The index of the engine for a request of whose prompt they have so many tokens cached."""
    return min(range(len(loads)), key=lambda index: (loads[index] - cached[index], index))


def tokens_of(request: Request, num_continuations: int, num_cached: int) -> int:
    """What a request counts where `num_cached` tokens of its prompt are cached."""
    num_prompt, num_rows = len(request.prompt_token_ids), max(num_continuations, len(request.row_requests))
    return num_prompt - num_cached + num_rows * min(request.max_total_tokens - num_prompt, ANSWER_TOKENS)
