"""Fields of OpenAI's and vLLM's APIs that are not supported: each is refused by name, none is ignored."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pjengine.serving.errors import ApiError


class Refusal(NamedTuple):
    reason: str
    neutral: object = False  # a value that asks for nothing: taken, as null is


_FUNCTIONS = Refusal("functions are called by their newer name: use tools and tool_choice")
_CHAT = Refusal("tools and reasoning are part of /v1/chat/completions")
_GUIDED = Refusal("its place has been taken by structured_outputs, with json, regex, choice or grammar in it")
_EFFORT = Refusal("how long a model thinks is up to it; chat_template_kwargs may say more")
_TEXT_ONLY = Refusal("only text is supported")
_PYTHON_ONLY = Refusal("a function does not travel; LLM and AsyncLLM take them in Python")
_STORED = Refusal("this server stores no requests")
_TRANSFERS = Refusal("KV pages are not transferred between engines")

REFUSED_FIELDS: Mapping[str, Refusal] = {
    **dict.fromkeys(("functions", "function_call"), _FUNCTIONS),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _GUIDED),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag"), _GUIDED),
    **dict.fromkeys(("reasoning", "reasoning_effort", "thinking_token_budget"), _EFFORT),
    **dict.fromkeys(("modalities", "audio", "media_io_kwargs", "mm_processor_kwargs"), _TEXT_ONLY),
    **dict.fromkeys(("store", "safety_identifier", "prompt_cache_key"), _STORED),
    "metadata": _STORED._replace(neutral={}),
    **dict.fromkeys(("logits_processors", "activation_edits"), _PYTHON_ONLY),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "kv_transfer_params": _TRANSFERS,
    "vllm_xargs": Refusal("there are no plugins to pass arguments to"),
    "repetition_detection": Refusal("repetitions are not looked for; repetition_penalty makes them rarer"),
    "return_prompt_text": Refusal("the prompt is shown as token ids, with return_token_ids"),
    "prediction": Refusal("predicted outputs are not used"),
    "service_tier": Refusal("there is one tier; priority orders requests", neutral="auto"),
    "verbosity": Refusal("no model here knows verbosity"),
    "web_search_options": Refusal("nothing is searched for"),
}

REFUSED_OUTSIDE_CHAT: Mapping[str, Refusal] = {
    **REFUSED_FIELDS,
    "tools": _CHAT,
    "tool_choice": _CHAT._replace(neutral="none"),
    **dict.fromkeys(("parallel_tool_calls", "include_reasoning"), _CHAT._replace(neutral=True)),
}

REFUSED_WITH_EMBEDDINGS: Mapping[str, Refusal] = {
    "dimensions": Refusal("embeddings have the width of the model"),
    "embed_dtype": Refusal("embeddings are float32", neutral="float32"),
    "use_activation": Refusal("it is called normalize here"),
    "messages": Refusal("embeddings are of texts and of token ids, in input"),
}

REFUSED_MESSAGE_FIELDS: Mapping[str, Refusal] = {
    "function_call": _FUNCTIONS,
    "audio": _TEXT_ONLY,
    "refusal": Refusal("a refusal is part of the content"),
    "annotations": Refusal("annotations are not shown to the model", neutral=[]),
}


REFUSED_PART_FIELDS: Mapping[str, Refusal] = dict.fromkeys(
    ("image_url", "input_audio", "audio_url", "video_url", "file", "refusal"), _TEXT_ONLY
)


def check_fields(
    data: Mapping[str, Any], names: Mapping[str, Any], refused: Mapping[str, Refusal]
) -> dict[str, Any]:
    """What is left of `data` without nulls, and without refused fields that ask for nothing.

    Raises:
      ApiError: a field is refused, or there is none of that name.
    """
    kept = {}
    for name, value in data.items():
        if name in names:
            if value is not None:
                kept[name] = value
        elif (refusal := refused.get(name)) is not None:
            if value is not None and (type(value) is not type(refusal.neutral) or value != refusal.neutral):
                raise ApiError(400, f"{name} is refused: {refusal.reason}", param=name)
        else:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ApiError(400, f"there is no field {name!r:.80}{hint}", param=name[:80])
    return kept
