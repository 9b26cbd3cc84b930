"""Whose turn a step is, where none holds both: prompts, or the rows that decode. Plain Python."""

from dataclasses import dataclass

MAX_PROMPT_TOKENS = 4096  # that are read in a row while others decode: 0.1 s of an 8B model on an H200
MAX_DECODES = 4  # steps of decodes that prompts wait for more of them, to fill their step


@dataclass
class StepTurns:
    """Prompts go first, as they free nobody's time later; but not for ever, and not nearly empty.

    Each kind of step costs the same however full it is: a prompt of a few tokens waits a moment for others.
    """

    num_prompt_tokens: int = 0  # in a row, up to now
    num_decodes: int = 0  # steps of them in a row, up to now

    def is_for_prompts(self, num_decoding: int, num_wanted: int, limit: int) -> bool:
        """Whether prompts are read in the next step, which has room for `limit` tokens.

        `num_wanted` tokens of prompts are there to be computed, and `num_decoding` rows decode.
        """
        if num_decoding == 0 or num_wanted == 0:
            return num_wanted > 0
        if self.num_prompt_tokens >= MAX_PROMPT_TOKENS:
            return False
        return num_wanted >= limit or self.num_prompt_tokens > 0 or self.num_decodes >= MAX_DECODES

    def see(self, num_prompt_tokens: int) -> None:
        """Takes what the step became; 0: one of decodes."""
        self.num_decodes = 0 if num_prompt_tokens else self.num_decodes + 1
        self.num_prompt_tokens = self.num_prompt_tokens + num_prompt_tokens if num_prompt_tokens else 0
