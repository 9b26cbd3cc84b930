"""What XLA makes of the engine's programs on an H200, found without one."""

import math
import re
from collections.abc import Callable, Mapping

import jax
import pytest

from pjengine.logits import history_bytes
from pjengine.logprobs import BLOCK
from pjengine.memory import activation_bytes
from tests.compile.hlo import copies
from tests.compile.steps import BEAMS, DRAW, DTYPE, PROGRAMS, STEPS, WRONG_STEPS, Step
from tests.compile.target import chosen
from tests.compile.worker import Report

pytestmark = pytest.mark.timeout(1200)  # the first test to ask for `compiled` waits for all programs
every_program = pytest.mark.parametrize("program", chosen(STEPS))

CUBLAS_BYTES = 32 * 2**20  # its workspace
FUSED = {"skinny_qkv", "paged_decode", "skinny_linear", "keep_threshold"}
LARGE = {"rope_kv_write", "paged_decode", "gated_linear_mosaic"}
MIXED = {"rope_kv_write", "ragged_paged_attention_mosaic", "gated_linear_mosaic", "keep_threshold"}
EXPERTS_DECODE = {"rope_kv_write", "paged_decode", "plan_experts", "grouped_linear", "keep_threshold"}
EXPERTS_MIXED = {"rope_kv_write", "ragged_paged_attention_mosaic", "grouped_linear", "keep_threshold"}
KERNELS = {
    "llama-8b decode 1": FUSED,
    "llama-8b decode 32": FUSED,
    "llama-8b decode 32 to logits": FUSED - {"keep_threshold"},
    "llama-8b decode 256, deterministic": LARGE | {"stacked_linear_mosaic"},
    "llama-8b draw 256, deterministic": {"keep_threshold"},
    "llama-8b draw 64": {"keep_threshold"},
    "llama-8b draw 8 beams": {"keep_threshold"},
    "llama-8b decode 128": LARGE | {"stacked_linear_mosaic", "keep_threshold"},
    "llama-8b decode 256": LARGE | {"keep_threshold"},
    "llama-8b decode 4 with drafts": FUSED,
    "llama-8b mixed 1024": MIXED,
    "gemma2-9b decode 1": {"rope_kv_write", "paged_decode", "keep_threshold"},
    "bloom-7b decode 32": {"paged_decode", "keep_threshold"},
    "falcon-7b decode 1": {"rope_kv_write", "paged_decode", "paged_decode_merge", "keep_threshold"},
    "qwen3-30b-a3b decode 32": EXPERTS_DECODE,
    "qwen3-30b-a3b mixed 768": EXPERTS_MIXED,
    "qwen3-30b-a3b decode 32 on two": EXPERTS_DECODE | {"peer_sum"},
    "qwen3-30b-a3b mixed 768 on two": EXPERTS_MIXED | {"peer_sum"},
    "opt-125m-llama decode 32 times 4": FUSED,
    "opt-125m-llama mixed 1024": MIXED,
    "opt-125m-llama mixed 32 to logits": {"rope_kv_write", "ragged_paged_attention_mosaic"},  # few rows
}


def temp_bound(step: Step) -> int:
    """The larger of what a layer keeps and what sampling does, and cuBLAS's workspace.

    Sampling is fused around one array of logits, and one more where they are gathered; a prompt's logprobs
    have up to the six that the memory plan counts. A layer's weights would not fit.
    """
    config, layout, num_copies = step.own, step.layout, min(2, step.model.num_devices)
    if step.num_prompt_top is not None:
        num_copies = 6
    layer = layout.num_tokens * DTYPE.itemsize * (4 * config.hidden_size + 3 * config.intermediate_size)
    num_rows = layout.num_seqs if step.num_prompt_top is None else BLOCK
    return CUBLAS_BYTES + max(layer, num_copies * num_rows * config.vocab_size * 4)


def assert_updated_in_place(step: Step, report: Report) -> None:
    _, *donated = step.state()
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated))
    assert report.alias_bytes >= num_bytes, "what is donated does not come back in the same memory"
    assert report.temp_bytes <= temp_bound(step)


def assert_copies_nothing(step: Step, report: Report) -> None:
    """Neither K nor V, nor the weights of all layers or of one."""
    params, cache, _ = step.state()
    # Routers are left out: activations have as many elements.
    weights = [leaf for name, leaf in params["layers"].items() if name != "router" and len(leaf.shape) > 2]
    stacks = [math.prod(leaf.shape) for leaf in weights]
    layers = [size // step.model.config.num_layers for size in stacks]
    large = {("bf16", size) for size in (math.prod(cache.k.shape), *stacks, *layers)}
    assert copies(report.hlo, large) == []


def assert_makes_products_in_cublas(_: Step, report: Report) -> None:
    assert not re.findall(r'"kind":"__triton\w*gemm\w*"', report.hlo), "XLA makes products in Triton"
    assert "__cublas" in report.hlo


def assert_finds_room(_: Step, report: Report) -> None:
    assert "hlo_rematerialization" not in report.printed, "XLA takes the cache for two"


@pytest.mark.parametrize("program", chosen(PROGRAMS))
def test_a_step_compiles_and_spills_no_registers(compiled: Mapping[str, Report], program: str) -> None:
    assert not compiled[program].error
    assert set(compiled[program].spilled_bytes) <= {0}


@every_program
def test_cache_and_rows_are_updated_in_place(compiled: Mapping[str, Report], program: str) -> None:
    assert_updated_in_place(STEPS[program], compiled[program])


@every_program
def test_neither_cache_nor_weights_are_copied(compiled: Mapping[str, Report], program: str) -> None:
    assert_copies_nothing(STEPS[program], compiled[program])


@every_program
def test_the_memory_plan_holds(compiled: Mapping[str, Report], program: str) -> None:
    layout, config = STEPS[program].layout, STEPS[program].own
    planned = activation_bytes(config, DTYPE, layout.num_tokens, layout.num_seqs)
    assert compiled[program].temp_bytes <= planned


@every_program
def test_xla_has_the_options_of_the_engine(compiled: Mapping[str, Report], program: str) -> None:
    assert_makes_products_in_cublas(STEPS[program], compiled[program])
    assert_finds_room(STEPS[program], compiled[program])


@pytest.mark.parametrize("program", chosen(PROGRAMS))
def test_the_kernels_are_the_ones_meant_for_it(compiled: Mapping[str, Report], program: str) -> None:
    scopes = re.findall(r"/(\w+)/(?:pallas_call|mpmd_map|run_scoped)\b", compiled[program].hlo)
    assert set(scopes) == KERNELS[program]


@pytest.mark.parametrize("kind", ["decode", "draw"])
def test_deterministic_steps_have_no_sums_whose_order_depends_on_the_number_of_rows(
    compiled: Mapping[str, Report], kind: str
) -> None:
    """As XLA's products have, and its reductions in Triton: others have those."""
    fixed, others = compiled[f"llama-8b {kind} 256, deterministic"].hlo, compiled["llama-8b decode 256"].hlo
    for made_by in ("__cublas", '"kind":"__triton"'):
        assert made_by in others and made_by not in fixed


@pytest.mark.parametrize("program", ["llama-8b draw 64"])
def test_drawing_updates_rows_in_place_and_copies_no_token_ids(
    compiled: Mapping[str, Report], program: str
) -> None:
    step, report = STEPS["llama-8b decode 32 to logits"], compiled[program]
    config, (_, cache, rows) = step.model.config, step.state()
    assert report.alias_bytes >= sum(4 * math.prod(leaf.shape) for leaf in rows)
    assert (
        copies(report.hlo, {("s32", math.prod(leaf.shape)) for leaf in (cache.token_ids, rows.page_table)})
        == []
    )
    logits = activation_bytes(config, DTYPE, 1, DRAW.num_seqs)
    history = history_bytes(DRAW.num_seqs, config.max_model_len, step.config.page_size)
    assert report.temp_bytes <= logits + history


@pytest.mark.parametrize("program", ["llama-8b draw 8 beams"])
def test_beams_copy_a_page_each_in_place(compiled: Mapping[str, Report], program: str) -> None:
    step, report = STEPS["llama-8b decode 32 to logits"], compiled[program]
    _, cache, rows = step.state()
    donated = jax.tree.leaves((cache, rows))
    assert report.alias_bytes >= sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in donated)
    large = {("bf16", math.prod(cache.k.shape)), ("s32", math.prod(cache.token_ids.shape))}
    assert copies(report.hlo, large) == []
    assert " while(" not in report.hlo  # the host would drive it
    pages = 2 * BEAMS.num_seqs * step.model.config.num_layers * math.prod(cache.k.shape[1:]) * DTYPE.itemsize
    assert report.temp_bytes <= 3 * 4 * BEAMS.num_seqs * step.model.config.vocab_size + pages


@pytest.mark.parametrize(
    ("program", "check", "message"),
    [
        ("undonated", assert_updated_in_place, "does not come back in the same memory"),
        ("undonated", assert_copies_nothing, r"copy\(%cache_k"),
        ("sliced", assert_copies_nothing, "concatenate"),
        ("plain", assert_makes_products_in_cublas, "products in Triton"),
        ("plain", assert_finds_room, "the cache for two"),
    ],
)
def test_a_step_that_is_made_wrong_is_found(
    compiled: Mapping[str, Report], program: str, check: Callable[[Step, Report], None], message: str
) -> None:
    assert not compiled[program].error
    with pytest.raises(AssertionError, match=message):
        check(WRONG_STEPS[program], compiled[program])
