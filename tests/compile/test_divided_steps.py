"""What XLA makes of a model that two H200s divide, found without them."""

import math
import re
from collections.abc import Mapping

import jax
import pytest

from pjengine.pallas_kernels.skinny_linear import MAX_ROWS
from tests.compile.divided_steps import DRAWS, NUM_DEVICES, STEPS
from tests.compile.hlo import collectives, float_sums
from tests.compile.test_steps import (
    CUBLAS_BYTES,
    assert_copies_nothing,
    assert_finds_room,
    assert_makes_products_in_cublas,
)
from tests.compile.worker import Report

# The first test to ask for `compiled` waits for all programs.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]
every_program = pytest.mark.parametrize("program", STEPS)


@every_program
def test_a_divided_step_compiles_and_updates_in_place(compiled: Mapping[str, Report], program: str) -> None:
    step, report = STEPS[program], compiled[program]
    assert not report.error
    assert set(report.spilled_bytes) <= {0}
    donated = jax.tree.leaves(step.state()[1:])
    assert report.alias_bytes >= sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in donated)
    assert_copies_nothing(step, report)
    assert_makes_products_in_cublas(step, report)
    assert "fusion-start(" not in report.hlo, "XLA sums in kernels of its own, which no CUDA graph takes"
    assert_finds_room(step, report)


@every_program
def test_devices_tell_each_other_what_adds_up_and_no_row_of_logits_but_to_filter_it(
    compiled: Mapping[str, Report], program: str
) -> None:
    step = STEPS[program]
    config, num_rows = step.model.config, step.num_tokens
    part = num_rows * config.vocab_size // NUM_DEVICES
    if step.has_filters:
        drawn = [("all-to-all", "f32", part), ("all-gather", "s32", num_rows)]
    else:
        drawn = [("all-gather", "s32", 2 * NUM_DEVICES * num_rows)]
    sums = [("all-reduce", "bf16", num_rows * config.hidden_size)] * (1 + 2 * config.num_layers)
    assert collectives(compiled[program].hlo) == (drawn if step.has_inboxes else sums + drawn)
    assert "conditional(" not in compiled[program].hlo  # the host would look which way it goes
    # The product has a device's part of the logits; what filters has as many beside them, of other rows.
    assert compiled[program].temp_bytes <= CUBLAS_BYTES + 4 * part * (1 + step.has_filters)


@every_program
def test_devices_sum_through_their_memory_after_the_embedding_and_twice_a_layer(
    compiled: Mapping[str, Report], program: str
) -> None:
    step = STEPS[program]
    kernels = re.findall(r" custom-call\(.*/(peer_sum\w*)/mpmd_map\b", compiled[program].hlo)
    kind = "peer_sum_residual" if step.num_tokens <= MAX_ROWS else "peer_sum_norm"
    wanted = ["peer_sum", *[kind] * 2 * step.model.config.num_layers]
    assert kernels == (wanted if step.has_inboxes else [])


def test_a_step_has_few_arrays_each_of_which_the_host_hands_to_every_device() -> None:
    """At most 24 were wanted; there were 28."""
    state = STEPS["llama-8b decode 8, divided"].state()
    assert len(jax.tree.leaves(state)) + 1 <= 19  # with the schedule's vector


@every_program
def test_only_a_divided_step_that_filters_looks_for_thresholds(
    compiled: Mapping[str, Report], program: str
) -> None:
    scopes = re.findall(r"/(\w+)/(?:pallas_call|mpmd_map|run_scoped)\b", compiled[program].hlo)
    assert ("keep_threshold" in scopes) == STEPS[program].has_filters


@pytest.mark.parametrize("program", DRAWS)
def test_logprobs_add_up_in_one_order_whatever_else_a_draw_does(
    compiled: Mapping[str, Report], program: str
) -> None:
    """They did not on two: XLA had one kernel add up and look for the token that is drawn."""
    sums = float_sums(compiled[program].hlo)
    assert len(sums) == 2, "of parts of a row, and of these"
    assert sums == float_sums(compiled[next(iter(DRAWS))].hlo)
