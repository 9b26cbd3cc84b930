"""Kernels of an LLM server, as functions of JAX arrays: attention, products, experts, filters, sums of GPUs.

They need nothing of the engine. `pallas_kernels/README.md` says of each what it takes, where it runs and what
was measured, with an example. A name here is the function, also where a module has the same name: what else
is in a module is reached as `from pjengine.pallas_kernels.paged_attention import reference`.
"""

from pjengine.pallas_kernels.attention_variant import AttentionVariant
from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.gated_linear import gated_linear
from pjengine.pallas_kernels.grouped_linear import ExpertWeights, Gate, Routing, routed_mlp
from pjengine.pallas_kernels.keep_threshold import keep_threshold
from pjengine.pallas_kernels.kv_update import write_kv
from pjengine.pallas_kernels.last_split import Counters
from pjengine.pallas_kernels.paged_attention import paged_attention
from pjengine.pallas_kernels.peer_sum import inbox_bytes, peer_sum, peer_sum_norm, peer_sum_residual
from pjengine.pallas_kernels.ragged_prefill import ragged_paged_attention
from pjengine.pallas_kernels.rope_kv_write import rope_kv_write, rotate
from pjengine.pallas_kernels.skinny_linear import (
    Normed,
    Residual,
    skinny_linear,
    skinny_residual,
    start_norm,
)
from pjengine.pallas_kernels.skinny_qkv import Destination, skinny_qkv
from pjengine.pallas_kernels.stacked_linear import stacked_linear

if __name__ != "pjengine.pallas_kernels":
    raise ImportError(
        "import pjengine.pallas_kernels, not pallas_kernels: a second copy of every class would be loaded"
    )

__all__ = [
    "AttentionVariant",
    "Counters",
    "Destination",
    "ExpertWeights",
    "Gate",
    "Normed",
    "Residual",
    "Routing",
    "chosen_backends",
    "gated_linear",
    "inbox_bytes",
    "keep_threshold",
    "paged_attention",
    "peer_sum",
    "peer_sum_norm",
    "peer_sum_residual",
    "ragged_paged_attention",
    "rope_kv_write",
    "rotate",
    "routed_mlp",
    "skinny_linear",
    "skinny_qkv",
    "skinny_residual",
    "stacked_linear",
    "start_norm",
    "write_kv",
]
