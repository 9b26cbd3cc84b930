"""pjengine: LLM inference and serving in JAX, for NVIDIA GPUs."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pjengine.activation_edits import ActivationEdit as ActivationEdit
    from pjengine.activation_edits import EditedToken as EditedToken
    from pjengine.async_llm import AsyncLLM as AsyncLLM
    from pjengine.async_llm import EngineDeadError as EngineDeadError
    from pjengine.async_llm import EngineGenerateError as EngineGenerateError
    from pjengine.beams import BeamSearchOutput as BeamSearchOutput
    from pjengine.beams import BeamSearchParams as BeamSearchParams
    from pjengine.beams import BeamSearchSequence as BeamSearchSequence
    from pjengine.chunks import CompletionChunk as CompletionChunk
    from pjengine.config import EngineConfig as EngineConfig
    from pjengine.embeddings import EmbeddingOutput as EmbeddingOutput
    from pjengine.engine import LLMEngine as LLMEngine
    from pjengine.hidden_states import HiddenStatesParams as HiddenStatesParams
    from pjengine.jsonl import generate_to_jsonl as generate_to_jsonl
    from pjengine.llm import LLM as LLM
    from pjengine.models.hf_names import from_hf as from_hf
    from pjengine.models.hf_names import to_hf as to_hf
    from pjengine.outputs import CompletionOutput as CompletionOutput
    from pjengine.outputs import RequestMetrics as RequestMetrics
    from pjengine.outputs import RequestOutput as RequestOutput
    from pjengine.processors import HostProcessor as HostProcessor
    from pjengine.processors import host_processor as host_processor
    from pjengine.sampling_params import RequestOutputKind as RequestOutputKind
    from pjengine.sampling_params import SamplingParams as SamplingParams
    from pjengine.scoring import CompletionScore as CompletionScore
    from pjengine.scoring import PerplexityOutput as PerplexityOutput
    from pjengine.scoring import ScoreOutput as ScoreOutput
    from pjengine.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
    from pjengine.token_logprobs import FlatLogprobs as FlatLogprobs
    from pjengine.token_logprobs import Logprob as Logprob

# Loaded when first used, so that `import pjengine` and the command line's --help are quick.
_HOMES = {
    "ActivationEdit": "pjengine.activation_edits",
    "EditedToken": "pjengine.activation_edits",
    "AsyncLLM": "pjengine.async_llm",
    "EngineDeadError": "pjengine.async_llm",
    "EngineGenerateError": "pjengine.async_llm",
    "BeamSearchOutput": "pjengine.beams",
    "BeamSearchParams": "pjengine.beams",
    "BeamSearchSequence": "pjengine.beams",
    "EngineConfig": "pjengine.config",
    "LLMEngine": "pjengine.engine",
    "EmbeddingOutput": "pjengine.embeddings",
    "HiddenStatesParams": "pjengine.hidden_states",
    "CompletionScore": "pjengine.scoring",
    "PerplexityOutput": "pjengine.scoring",
    "ScoreOutput": "pjengine.scoring",
    "generate_to_jsonl": "pjengine.jsonl",
    "LLM": "pjengine.llm",
    "CompletionChunk": "pjengine.chunks",
    "CompletionOutput": "pjengine.outputs",
    "RequestMetrics": "pjengine.outputs",
    "RequestOutput": "pjengine.outputs",
    "HostProcessor": "pjengine.processors",
    "host_processor": "pjengine.processors",
    "RequestOutputKind": "pjengine.sampling_params",
    "SamplingParams": "pjengine.sampling_params",
    "StructuredOutputsParams": "pjengine.structured_outputs",
    "FlatLogprobs": "pjengine.token_logprobs",
    "Logprob": "pjengine.token_logprobs",
    "from_hf": "pjengine.models.hf_names",
    "to_hf": "pjengine.models.hf_names",
}
__all__ = [
    "LLM",
    "ActivationEdit",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionChunk",
    "CompletionOutput",
    "CompletionScore",
    "EditedToken",
    "EmbeddingOutput",
    "EngineConfig",
    "EngineDeadError",
    "EngineGenerateError",
    "FlatLogprobs",
    "HiddenStatesParams",
    "HostProcessor",
    "LLMEngine",
    "Logprob",
    "PerplexityOutput",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "from_hf",
    "generate_to_jsonl",
    "host_processor",
    "to_hf",
]

try:
    __version__ = version("pjengine")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+checkout"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pjengine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
