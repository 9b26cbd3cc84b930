"""What devices draw together, each with its part of the logits, is what one draws with all of them."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pjengine.models.config import ModelConfig
from pjengine.models.share import share_of
from pjengine.sharding.mesh import TENSOR, make_mesh
from tests.golden import golden as goldens

VOCAB_SIZE = 37  # two devices have one entry of padding between them, four have three
NUM_ROWS = 21  # nor do rows divide
NUM_FEW = 5

type Sampler = Callable[[Any, dict[str, Any]], Any]


def whole(logits: Any, rows: dict[str, Any]) -> Any:
    from pjengine.sampler import sample
    from pjengine.schedule import BROKEN

    return jnp.where(jnp.isnan(jnp.max(logits, axis=-1)), BROKEN, sample(logits, **rows))


def config() -> ModelConfig:
    from dataclasses import replace

    from pjengine.models.registry import parse_config

    return replace(parse_config(goldens.load("gqa").config), vocab_size=VOCAB_SIZE)


@cache
def divided(num_devices: int, has_filters: bool) -> Sampler:
    """Takes logits of the whole vocabulary, with whatever in place of padding."""
    from pjengine.divided_sampler import draw_divided

    draw = partial(draw_divided, share_of(config(), num_devices), whole=whole if has_filters else None)
    parts = PartitionSpec(None, TENSOR), PartitionSpec()
    mesh = make_mesh(jax.devices()[:num_devices])
    return jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=parts, out_specs=PartitionSpec(), check_vma=False))


alone = jax.jit(whole)


def random_logits(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    """Rows with ties, with many -inf, of -inf alone, with NaN, and with an infinite one."""
    logits = rng.normal(0, 3, (num_rows, VOCAB_SIZE)).astype(np.float32)
    kinds = rng.integers(0, 6, num_rows)
    logits[kinds == 0] = np.round(logits[kinds == 0] / 4)
    logits[(kinds == 1)[:, None] & (rng.random(logits.shape) < 0.8)] = -np.inf
    for row, kind in enumerate(kinds):
        if kind == 2:
            logits[row] = rng.choice([-np.inf, 0.0])
        if kind == 3:
            logits[row, rng.integers(VOCAB_SIZE)] = rng.choice([np.nan, np.inf])
    return logits


def random_rows(rng: np.random.Generator, num_rows: int, *, has_filters: bool) -> dict[str, Any]:
    def chosen(*values: float) -> Any:
        return jnp.asarray(rng.choice(values, num_rows), jnp.float32)

    def numbers(low: int, high: int) -> Any:
        return jnp.asarray(rng.integers(low, high, num_rows), jnp.int32)

    rows = {name: numbers(-(2**31), 2**31) for name in ("seed_high", "seed_low")}
    rows |= {"positions": numbers(0, 1000), "temperature": chosen(0, 0.3, 1, 5)}
    if not has_filters:
        neutral = {"top_k": numbers(VOCAB_SIZE, VOCAB_SIZE + 1), "top_p": chosen(1), "min_p": chosen(0)}
        return {**rows, **neutral}
    filters = {"top_p": chosen(1e-6, 0.1, 0.5, 0.9, 1 - 2**-24, 1), "min_p": chosen(0, 0.05, 1)}
    return {**rows, "top_k": numbers(1, VOCAB_SIZE + 1), **filters}


def with_padding(logits: np.ndarray, num_devices: int, padding: float) -> np.ndarray:
    return np.pad(logits, ((0, 0), (0, -VOCAB_SIZE % num_devices)), constant_values=padding)


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize(("has_filters", "num_rows"), [(False, NUM_ROWS), (True, NUM_ROWS), (True, NUM_FEW)])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), padding=st.sampled_from([0.0, 1e9, np.inf, np.nan]))
def test_devices_draw_the_tokens_of_one_whatever_the_logits(
    num_devices: int, has_filters: bool, num_rows: int, seed: int, padding: float
) -> None:
    rng = np.random.default_rng(seed)
    logits, rows = random_logits(rng, num_rows), random_rows(rng, num_rows, has_filters=has_filters)
    found = divided(num_devices, has_filters)(with_padding(logits, num_devices, padding), rows)
    assert np.asarray(found).tolist() == np.asarray(alone(logits, rows)).tolist()


@pytest.mark.parametrize("num_devices", [2, 4])
def test_without_filters_devices_tell_each_other_no_logits(num_devices: int) -> None:
    rng = np.random.default_rng(0)
    logits = with_padding(random_logits(rng, NUM_ROWS), num_devices, 0)
    for has_filters in (False, True):
        rows = random_rows(rng, NUM_ROWS, has_filters=has_filters)
        hlo = divided(num_devices, has_filters).lower(logits, rows).as_text()  # type: ignore[attr-defined]
        assert ("all_to_all" in hlo) == has_filters
        assert hlo.count('"stablehlo.all_gather"') == 1  # of tokens, or of the parts' best
