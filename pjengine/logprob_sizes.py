"""What the logprobs of a step take on the device, and how long a step may be that has those of prompts."""

import numpy as np

from pjengine.edit_sizes import prompt_top_for, sizes_for
from pjengine.edits import Edits, max_asked, most_logprobs
from pjengine.logprobs import num_rows

SHARE = 0.1  # of the device's budget, for the logprobs of prompts


def largest_num_top(max_logprobs: int, vocab_size: int) -> int:
    """The likeliest tokens of each position, in the largest program that requests may ask for."""
    needs = np.array(Edits(num_prompt_logprobs=most_logprobs(max_logprobs, vocab_size)).needs)
    return prompt_top_for(needs, vocab_size) or 0


def largest_num_asked(max_logprobs: int, vocab_size: int) -> int:
    """The tokens of each sequence that are asked for by id, in the largest program."""
    asked = tuple(range(max_asked(max_logprobs, vocab_size)))
    return sizes_for(np.array(Edits(logprob_ids=asked).needs), vocab_size).num_asked


def position_bytes(num_top: int) -> int:
    """One position of `Logprobs`, without tokens that were asked for by id."""
    return 4 * (2 + 2 * num_top)


def sampled_bytes(num_seqs: int, num_top: int, num_asked: int) -> int:
    """Those of sampled tokens: of a step under way, and of the one before it, which the host reads.

    Ids that were asked for go up with the step, and their logprobs come down.
    """
    return 2 * num_seqs * (position_bytes(num_top) + 8 * num_asked)


def prompt_bytes(num_tokens: int, num_top: int) -> int:
    """Those of prompts, the same; they are copied where a part of the last block is cut off."""
    rows = num_rows(num_tokens)
    return (2 * num_tokens + (rows if rows > num_tokens else 0)) * position_bytes(num_top)


def max_prompt_tokens(budget_bytes: int | None, num_top: int, num_tokens: int, num_seqs: int) -> int | None:
    """How long a step with logprobs of prompts may be, so that they keep to their share; None: `num_tokens`.

    A power of two. Not less than `num_seqs`, whatever the share is: each row gets its token in every step.
    """
    if budget_bytes is None or prompt_bytes(num_tokens, num_top) <= SHARE * budget_bytes:
        return None
    length = 1 << (max(32, num_seqs) - 1).bit_length()
    while prompt_bytes(2 * length, num_top) <= SHARE * budget_bytes:
        length *= 2
    return length if length < num_tokens else None
