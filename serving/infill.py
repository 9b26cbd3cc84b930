"""`suffix`: a prompt and what follows it -> the token ids after which a model writes what is between.

Models that were trained for it have marker tokens for the three parts. Which they are, and in which order
they come, is read from the tokenizer's vocabulary. That a tokenizer has them does not say that its model was
trained with them.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import NamedTuple

from pjengine.sampling_params import SamplingParams
from pjengine.serving.errors import ApiError
from pjengine.serving.prompt_reader import GivenPrompt
from pjengine.tokenizer import Tokenizer


class _Family(NamedTuple):
    """Its markers in their order: prefix, suffix, middle; without a middle, the suffix comes first."""

    prefix: str
    suffix: str
    middle: str | None
    ends: tuple[str, ...] = ()  # what they write after the middle, beside EOS and the markers


_FAMILIES = (
    # Qwen-Coder, CodeGemma, Granite 4
    _Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, StableCode, Granite Code
    _Family("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<repo_name>", "<file_sep>")),
    _Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<fim-pad>",)),  # SantaCoder
    _Family("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),  # CodeLlama
    # DeepSeek-Coder: the hole is before the suffix
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<|EOT|>",)),  # noqa: RUF001
    _Family("[PREFIX]", "[SUFFIX]", None, ("[MIDDLE]",)),  # Codestral
)

_LETTER = "☺"  # in no word of a vocabulary, so that no merge goes beyond it


@dataclass(frozen=True, kw_only=True)
class Infill:
    """Asks a model for what is between a prompt and a suffix."""

    tokenizer: Tokenizer
    prefix_id: int
    suffix_id: int
    middle_id: int | None
    end_ids: tuple[int, ...]  # after any of these the middle is complete
    markers: tuple[str, ...]
    max_tokens: int | None = None  # of all together; none: any number

    def read(self, prompt: str, suffix: str, *, add_special_tokens: bool) -> GivenPrompt:
        """Raises ApiError if one of the texts is too long, or cannot be encoded."""
        before = [self.prefix_id, *self._encode(prompt, "prompt")]
        after = [self.suffix_id, *self._encode(suffix, "suffix", is_continuation=True)]
        bos = self._bos() if add_special_tokens else []
        if self.middle_id is None:
            token_ids = [*bos, *after, *before]
        else:
            token_ids = [*bos, *before, *after, self.middle_id]
        return {"prompt": prompt, "prompt_token_ids": token_ids}

    def ended(self, params: SamplingParams) -> SamplingParams:
        """The parameters, under which the end of the middle ends the text as EOS does."""
        if params.ignore_eos:
            return params
        return dataclasses.replace(params, stop_token_ids=[*(params.stop_token_ids or ()), *self.end_ids])

    def _encode(self, text: str, name: str, *, is_continuation: bool = False) -> list[int]:
        """A marker that is written in the text is text: it is encoded in two parts, neither of them a marker.

        Other special tokens are what they are in every prompt.
        """
        try:
            if self.max_tokens is not None:
                self.tokenizer.check_length(text, self.max_tokens)
            first, *others = re.split("|".join(map(_inside, self.markers)), text)
            token_ids = self._continued(first) if is_continuation else self._plain(first)
            for part in others:
                token_ids += self._continued(part)
        except ValueError as error:
            raise ApiError(400, f"{name}: {error}", param=name) from error
        return token_ids

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _continued(self, text: str) -> list[int]:
        """Without the space that SentencePiece puts before a text."""
        before = self._plain(_LETTER)
        if not self.tokenizer.hf.convert_ids_to_tokens(before[0]).startswith("▁"):
            return self._plain(text)
        return self._plain(_LETTER + text)[len(before) :]

    def _bos(self) -> list[int]:
        """What the tokenizer itself puts before a text, and nothing that it puts after one."""
        special = self.tokenizer.encode("")
        return special[:1] if special[:1] == [self.tokenizer.hf.bos_token_id] else []


def find_infill(tokenizer: Tokenizer | None, max_tokens: int | None = None) -> Infill:
    """How the model of this tokenizer is asked; a prompt has at most `max_tokens`.

    Raises:
      ApiError: it has no marker tokens, or there is no tokenizer.
    """
    if tokenizer is None:
        raise ApiError(400, "suffix needs a tokenizer, and this server runs without", param="suffix")
    for family in _FAMILIES:
        markers = tuple(name for name in family[:3] if name is not None)
        ids = [_id_of(tokenizer, name) for name in markers]
        known = [token for token in ids if token is not None]
        if len(known) < len(markers):
            continue
        prefix_id, suffix_id, *middle = known
        ends = (_id_of(tokenizer, name) for name in family.ends)
        return Infill(
            tokenizer=tokenizer,
            prefix_id=prefix_id,
            suffix_id=suffix_id,
            middle_id=middle[0] if middle else None,
            end_ids=(*known, *(token for token in ends if token is not None)),
            markers=markers,
            max_tokens=max_tokens,
        )
    tried = ", ".join(family.prefix for family in _FAMILIES)
    raise ApiError(
        400,
        f"suffix is refused: this model's tokenizer has no tokens for filling text in (none of {tried})",
        param="suffix",
    )


def _inside(marker: str) -> str:
    """Matches after the first letter of a marker, which SentencePiece may write as a space."""
    letter = "[ ▁]" if marker[0] == "▁" else re.escape(marker[0])
    return f"(?<={letter})(?={re.escape(marker[1:])})"


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    token: int | None = tokenizer.hf.convert_tokens_to_ids(name)
    return token if token is not None and tokenizer.hf.convert_ids_to_tokens(token) == name else None
