"""What a caller gives as a prompt -> token ids, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pjengine.tokenizer import Tokenizer

# A text, token ids, or a dict with "prompt" or "prompt_token_ids", and "cache_salt" if wanted; None is as
# good as absent.
# What a list of ids holds is checked one by one.
type Prompt = str | Sequence[Any] | np.ndarray | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """Token ids, and what else the prompt said."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""  # cached pages are shared only under the same salt


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    max_tokens: int,
    keep_last: int | None = None,
) -> EncodedPrompt:
    """Turns a prompt into at most `max_tokens` token ids of the vocabulary.

    Of a longer one than `keep_last`, keeps so many tokens, the last; -1: `max_tokens`.

    Raises:
      ValueError: it is empty, too long, out of the vocabulary, or needs a tokenizer where there is none.
      TypeError: it is no prompt at all.
    """
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    is_encoded = isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None
    if tokenizer is not None and isinstance(text, str) and not is_encoded and keep_last is None:
        tokenizer.check_length(text, max_tokens)
    encoded = _encode(prompt, tokenizer)
    if keep_last is not None:
        kept = encoded.token_ids[-(max_tokens if keep_last == -1 else keep_last) :]
        encoded = dataclasses.replace(encoded, token_ids=kept)
    num_tokens = len(encoded.token_ids)
    if num_tokens == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    if num_tokens > max_tokens:
        raise ValueError(
            f"the prompt has {num_tokens} tokens; with max_model_len={max_tokens + 1} at most {max_tokens} "
            "leave room for an answer. Shorten it or raise max_model_len"
        )
    for token in (min(encoded.token_ids), max(encoded.token_ids)):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is out of the vocabulary of {vocab_size} tokens")
    return encoded


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> a list of prompts. A list of whole numbers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise TypeError(
            f"prompts must be a str, token ids, a dict or a list of them, got {type(prompts).__name__} "
            "(LLM.generate also takes an iterator, which iter(...) makes)"
        )
    is_one = len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
    return [prompts] if is_one else list(prompts)


def one_each(name: str, values: Any, count: int) -> list[Any]:
    """One value for all, or one for each, as a list of `count`."""
    each = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(each) != count:
        raise ValueError(f"{name} must be one, or one for each of the {count} prompts, got {len(each)}")
    return each


def _encode(prompt: Prompt, tokenizer: Tokenizer | None) -> EncodedPrompt:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and skip_tokenizer_init=True: pass token ids")
        return EncodedPrompt(token_ids=tokenizer.encode(prompt), text=prompt)
    if isinstance(prompt, Mapping):
        return _encode_dict(prompt, tokenizer)
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"a prompt is a str, a list of token ids or a dict, got {type(prompt).__name__}")
    kinds = set(map(type, prompt))  # few, where tokens are many
    if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        raise TypeError(f"token ids must be whole numbers in one list, got {prompt!r:.80}")
    return EncodedPrompt(token_ids=list(map(int, prompt)))


def _encode_dict(prompt: Mapping[str, Any], tokenizer: Tokenizer | None) -> EncodedPrompt:
    known = {"prompt", "prompt_token_ids", "cache_salt"}
    given = {name: value for name, value in prompt.items() if value is not None}
    if not set(given) <= known or not {"prompt", "prompt_token_ids"} & set(given):
        got = ", ".join(map(repr, prompt)) or "nothing"
        raise ValueError(
            f"a prompt dict holds 'prompt' or 'prompt_token_ids', and 'cache_salt' if wanted; got {got}"
        )
    salt = given.get("cache_salt", "")
    text, ids = given.get("prompt", ""), given.get("prompt_token_ids", ())
    if not isinstance(salt, str) or not isinstance(text, str):
        raise TypeError(f"prompt and cache_salt must be str, got {text!r:.80} and {salt!r:.80}")
    if isinstance(ids, str | Mapping):
        raise TypeError(f"prompt_token_ids must be whole numbers in one list, got {ids!r:.80}")
    if any("\ud800" <= letter <= "\udfff" for letter in salt):
        raise ValueError(f"cache_salt holds half of a surrogate pair: {salt!r:.80}")
    if "prompt_token_ids" in given:
        token_ids = _encode(ids, tokenizer).token_ids
        return EncodedPrompt(token_ids=token_ids, text=given.get("prompt"), cache_salt=salt)
    encoded = _encode(text, tokenizer)
    return EncodedPrompt(token_ids=encoded.token_ids, text=encoded.text, cache_salt=salt)
