"""Embeddings: a hidden state that stands for a whole prompt. Plain Python."""

from dataclasses import dataclass

import numpy as np

from pjengine.hidden_states import POOLINGS, HiddenStatesParams
from pjengine.outputs import RequestOutput
from pjengine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class EmbeddingOutput:
    """A prompt and its embedding."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: np.ndarray  # float32 [width]
    num_cached_tokens: int  # of the prompt, whose pages the prefix cache had


def embedding_params(
    *, pooling: str, layer: int, truncate_prompt_tokens: int | None = None
) -> SamplingParams:
    """What the engine is asked for: beside the state one token, which nobody sees.

    Raises:
      ValueError: a value is not possible; the text names it and its range.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be 'mean' or 'last', got {pooling!r:.80}")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"layer must be a whole number, got {layer!r:.80}")
    return SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        truncate_prompt_tokens=truncate_prompt_tokens,
        hidden_states=HiddenStatesParams(layers=(layer,), pooling=pooling),
    )


def embedding_of(output: RequestOutput, *, normalize: bool) -> EmbeddingOutput:
    """From what the engine has given; `normalize` makes its length 1.

    Raises:
      RuntimeError: the request did not end by itself.
    """
    completion = output.outputs[0]
    if output.hidden_states is None or completion.finish_reason in ("error", "abort"):
        reason = completion.stop_reason or completion.finish_reason
        raise RuntimeError(f"request {output.request_id} has no embedding: {reason}")
    embedding = output.hidden_states[0]
    if normalize:
        length = float(np.linalg.norm(embedding.astype(np.float64)))
        embedding = (embedding / np.float32(length or 1.0)).astype(np.float32)
    return EmbeddingOutput(
        prompt=output.prompt,
        prompt_token_ids=output.prompt_token_ids,
        embedding=embedding,
        num_cached_tokens=output.num_cached_tokens,
    )
