"""How a device's memory is divided: weights, what programs need, and the rest for KV pages."""

import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pjengine.logits import history_bytes
from pjengine.logprob_sizes import (
    largest_num_asked,
    largest_num_top,
    max_prompt_tokens,
    prompt_bytes,
    sampled_bytes,
)
from pjengine.logprobs import BLOCK
from pjengine.models.config import ModelConfig
from pjengine.models.window_group import WindowGroup
from pjengine.page_counts import count_pages
from pjengine.page_groups import window_pages
from pjengine.pallas_kernels.peer_sum import inbox_bytes
from pjengine.speculation_config import SpeculationConfig
from pjengine.state_sizes import max_states, state_bytes

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 512 * 2**20  # a CPU shares its memory with everything else


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device, and what they leave room for."""

    weights_bytes: int
    activations_bytes: int  # of the model, and logits
    temp_bytes: int  # of programs, beside them: histories, logprobs, page tables, compilation
    page_bytes: int  # one page, all layers; or all that see everything, and token ids, where others do not
    page_size: int
    num_pages: int  # the null page among them
    max_model_len: int  # shortened to what fits, where the caller left it open
    max_prompt_logprob_tokens: int | None = None  # as in `RunnerConfig`
    max_states: int | None = None  # the same
    window_group: WindowGroup | None = None  # layers with pages of their own
    window_page_bytes: int = 0  # one of their pages, all of these layers
    draft_weights_bytes: int = 0  # of a draft model; part of `weights_bytes`
    draft_page_bytes: int = 0  # of a draft model; part of `page_bytes`

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.num_pages + self.window_bytes

    @property
    def window_bytes(self) -> int:
        return 0 if self.window_group is None else self.window_page_bytes * self.window_group.num_pages

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activations_bytes + self.temp_bytes + self.kv_bytes

    @property
    def num_kv_tokens(self) -> int:
        return (self.num_pages - 1) * self.page_size

    @property
    def num_full_requests(self) -> int:
        """Requests of `max_model_len` tokens that there is room for at once, while they decode."""
        numbers = [self.num_kv_tokens // self.max_model_len]
        if (group := self.window_group) is not None:
            each = window_pages(group.window, self.max_model_len, self.page_size, num_new=1)
            numbers.append((group.num_pages - 1) // int(each))
        return min(numbers)

    def beside_kv(self) -> str:
        """What else there is, for a text."""
        others = self.activations_bytes + self.temp_bytes
        return f"{self.weights_bytes:,} of weights and {others:,} of activations and program temp"

    def table(self) -> str:
        """The plan for a person to read."""
        size, group = self.page_size, self.window_group
        pages = f"{self.num_pages:,} pages of {size} tokens, {self.page_bytes // size:,} B a token"
        of_draft = ""
        if self.draft_page_bytes:
            of_draft = f"of them {self.draft_weights_bytes / 2**30:.2f} GiB the draft model's"
            pages += f", of them {self.draft_page_bytes // size:,} B the draft model's"
        rows = [
            ("weights", self.weights_bytes, of_draft),
            ("activations", self.activations_bytes, "the largest program's, at most"),
            (
                "program temp",
                self.temp_bytes,
                "for penalties, logprobs, grammars, hidden states, sums and compilation, at most",
            ),
            ("KV pages", self.kv_bytes - self.window_bytes, pages),
        ]
        if group is not None:
            per_token = f"{self.window_page_bytes // size:,} B a token that one of {group.window:,} sees"
            rows.append(("window pages", self.window_bytes, f"{group.num_pages:,} pages, {per_token}"))
        rows.append(("total", self.total_bytes, ""))
        lines = [f"{name:14}{size / 2**30:10.2f} GiB   {note}".rstrip() for name, size, note in rows]
        full = f"{self.num_full_requests:,} requests of max_model_len={self.max_model_len}"
        tokens = f"{self.num_kv_tokens:,} tokens, which is " if group is None else ""
        lines.append(f"room for {tokens}{full} at once")
        if self.max_prompt_logprob_tokens is not None:
            lines.append(f"prompt logprobs in steps of at most {self.max_prompt_logprob_tokens:,} tokens")
        return "\n".join(lines)


def activation_bytes(config: ModelConfig, dtype: jnp.dtype, num_tokens: int, num_seqs: int) -> int:
    """An upper estimate of what layers, or logits, need in the largest program.

    Layers, sampling and a block of a prompt's logprobs do not overlap, so the largest counts; but raw logits
    that another program samples from are beside the layers. Sampling
    holds logits in float32: raw, edited, filtered and noisy, and what the edits need (four copies were
    measured without edits, on one NVIDIA H200). A block holds them raw; to sort them all takes keys and
    ids, before and after, and scratch.
    """
    itemsize = jnp.dtype(dtype).itemsize
    heads = (2 * config.num_heads + 4 * config.num_kv_heads) * config.head_dim
    mlp = 3 * config.intermediate_size
    if config.experts is not None:  # of each choice what goes into the second product, and what comes out
        experts = config.experts.num_choices * (config.experts.inner_size + config.hidden_size)
        mlp = max(mlp, experts) if config.dense_layers else experts
    layer = num_tokens * itemsize * (4 * config.hidden_size + max(mlp, heads))
    logits = max(num_seqs, BLOCK) * config.vocab_size * 4
    return max(layer + logits, 6 * logits)


def program_temp_bytes(
    vocab_size: int,
    max_logprobs: int,
    num_prompt_tokens: int,
    num_seqs: int,
    max_len: int,
    page_size: int,
    num_groups: int,
) -> int:
    """What the programs of rare requests need beside that, and what two steps at a time leave for the host.

    Args:
      num_prompt_tokens: of the longest step with logprobs of prompts.
    """
    num_top = largest_num_top(max_logprobs, vocab_size)
    num_asked = largest_num_asked(max_logprobs, vocab_size)
    masks = 2 * 4 * num_seqs * -(-vocab_size // 32)  # of both steps
    # That of all rows, and the step's own.
    page_tables = 2 * 4 * num_seqs * num_groups * -(-max_len // page_size)
    logprobs = prompt_bytes(num_prompt_tokens, num_top) + sampled_bytes(num_seqs, num_top, num_asked)
    return logprobs + history_bytes(num_seqs, max_len, page_size) + page_tables + masks


def tuning_bytes(config: ModelConfig, dtype: jnp.dtype, num_seqs: int) -> int:
    """What XLA takes of a GPU while it compiles, beside a step that runs: it times products on copies.

    The largest weight, and where that is the vocabulary's also the logits.
    """
    itemsize = jnp.dtype(dtype).itemsize
    head = config.vocab_size * (config.hidden_size * itemsize + num_seqs * 4)
    return max(head, 2 * config.hidden_size * config.intermediate_size * itemsize)


def plan_memory(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    weights_bytes: int,
    budget_bytes: int | None,
    kv_cache_memory_bytes: int | None,
    page_size: int,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_logprobs: int,
    speculation: SpeculationConfig | None = None,
    draft: ModelConfig | None = None,
) -> MemoryPlan:
    """Sizes the page pool, the same way with a device and without.

    Args:
      budget_bytes: for weights, activations, program temp and KV pages together; None on a CPU.
      kv_cache_memory_bytes: for KV pages, instead of what the budget leaves.
      max_model_len: None: as long as the model supports, or as long as fits if that is less.
      draft: the draft model, whose weights are part of `weights_bytes`.

    Raises:
      ValueError: the pages that fit cannot hold one request of `max_model_len` tokens, or none at all; or
        all together is more than `budget_bytes`.
    """
    wanted_len = max_model_len or config.max_model_len
    limits: dict[str, Any] = {
        "max_len": wanted_len,
        "page_size": page_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "draft": draft,
    }
    of_programs = _program_bytes(config, dtype, budget_bytes, max_logprobs, speculation, **limits)
    activations, temp, bound, states = of_programs
    kv_bytes = kv_cache_memory_bytes
    if kv_bytes is None:
        kv_bytes = CPU_KV_BYTES if budget_bytes is None else budget_bytes - weights_bytes - activations - temp
    kv_bytes = max(kv_bytes, 0)
    counts = count_pages(config, dtype, kv_bytes, **limits)
    room = (counts.num_pages - 1) * page_size  # tokens
    plan = MemoryPlan(
        weights_bytes=weights_bytes,
        activations_bytes=activations,
        temp_bytes=temp,
        page_size=page_size,
        max_model_len=min(wanted_len, room),
        max_prompt_logprob_tokens=bound,
        max_states=states,
        **counts._asdict(),
    )
    is_given = kv_cache_memory_bytes is not None
    _check_room(plan, kv_bytes, max_model_len, max_num_batched_tokens, is_given=is_given)
    _check_budget(plan, budget_bytes)
    if room < wanted_len:
        logger.warning("max_model_len=%d does not fit into the KV cache; it is now %d", wanted_len, room)
    return plan


def _program_bytes(
    config: ModelConfig,
    dtype: jnp.dtype,
    budget_bytes: int | None,
    max_logprobs: int,
    speculation: SpeculationConfig | None,
    *,
    max_len: int,
    page_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    draft: ModelConfig | None,
) -> tuple[int, int, int | None, int]:
    """Of activations and temp, and the steps that these are for: tokens with logprobs of prompts, and hidden
    states that are kept.
    """
    num_seqs = min(max_num_seqs, max_num_batched_tokens)
    vocab_size = config.vocab_size
    num_top = largest_num_top(max_logprobs, vocab_size)
    bound = max_prompt_tokens(budget_bytes, num_top, max_num_batched_tokens, num_seqs)
    models = [config] if draft is None else [config, draft]  # one computes after the other
    activations = max(activation_bytes(own, dtype, max_num_batched_tokens, num_seqs) for own in models)
    num_prompt_tokens = bound or max_num_batched_tokens
    temp = program_temp_bytes(
        vocab_size,
        max_logprobs,
        num_prompt_tokens,
        num_seqs if speculation is None else max(num_seqs, speculation.num_verified(max_num_seqs)),
        max_len,
        page_size,
        num_groups=2 if config.windowed_layers(max_len) else 1,
    )
    if speculation is not None:
        temp += speculation.lookup_bytes(max_num_seqs, max_len)
    if budget_bytes is not None:
        temp += max(tuning_bytes(own, dtype, num_seqs) for own in models)
        if config.share is not None:
            temp += inbox_bytes(config.share.num_devices)
    states = max_states(config, dtype, budget_bytes, max_num_batched_tokens)
    return activations, temp + states * state_bytes(config, dtype), bound, states


def _check_room(
    plan: MemoryPlan, kv_bytes: int, max_model_len: int | None, max_num_new: int, *, is_given: bool
) -> None:
    """Raises ValueError where the pages do not hold one request, of `max_num_new` tokens in a step."""
    least = max_model_len or plan.page_size
    if plan.num_kv_tokens < least:
        group = plan.window_group
        needed_bytes = (-(-least // plan.page_size) + 1) * plan.page_bytes
        if group is not None:
            pages = window_pages(group.window, least, plan.page_size, num_new=max_num_new)
            needed_bytes += (pages + 1) * plan.window_page_bytes
        raise ValueError(
            f"the KV cache gets {kv_bytes:,} bytes beside {plan.beside_kv()}, which hold "
            f"{max(plan.num_kv_tokens, 0)} tokens; one request of {least} tokens needs "
            f"{needed_bytes:,} bytes: "
            + ("lower max_model_len, or " if max_model_len else "")
            + ("" if group is None else "lower max_num_batched_tokens, or ")
            + ("raise kv_cache_memory_bytes" if is_given else "raise gpu_memory_utilization")
        )


def _check_budget(plan: MemoryPlan, budget_bytes: int | None) -> None:
    """Raises ValueError where all together is more than there is."""
    if budget_bytes is not None and plan.total_bytes > budget_bytes:
        raise ValueError(
            f"{plan.kv_bytes:,} bytes of KV pages are too many beside {plan.beside_kv()}: there are "
            f"{budget_bytes:,} in all. Lower kv_cache_memory_bytes, or raise gpu_memory_utilization"
        )


def device_budget(device: jax.Device, share: float) -> int | None:
    """What weights, activations and KV pages may take together; None on a CPU.

    `share` is of the memory that JAX holds; what others use of it already is taken off.
    """
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats:
        return None
    return int(stats["bytes_limit"] * min(share, 1.0)) - stats["bytes_in_use"]
