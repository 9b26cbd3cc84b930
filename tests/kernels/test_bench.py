"""The benchmark of the kernels runs, on a CPU too: tiny cases, in the interpreter."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pjengine.pallas_kernels import bench, timing
from pjengine.pallas_kernels.bench import OPS, kernel_rows
from pjengine.pallas_kernels.timing import Limits

LIMITS = Limits(copy_gb_per_s=4.0, product_tflop_per_s=8.0)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:  # the interpreter of Mosaic takes a second for a call
        patch.setattr(timing, "MEASUREMENTS", 1)
        patch.setattr(timing, "RUNS", 1)
        return list(kernel_rows("demo", interpret=True))


def test_every_kernel_has_a_rate_beside_its_limit(rows: list[dict[str, Any]]) -> None:
    ops = {row["op"] for row in rows}
    assert ops == {*OPS, "rope_kv_write", "keep_threshold"} - {"small"}
    for row in rows:
        unit = "gb_per_s" if "gb_per_s" in row else "tflop_per_s"
        assert row["us"] > 0 and row[f"limit_{unit}"] > 0
        assert row["share"] == pytest.approx(row[unit] / row[f"limit_{unit}"])


def test_products_are_timed_beside_the_library(rows: list[dict[str, Any]]) -> None:
    forms = [(row["product"], row["backend"], row["form"]) for row in rows if row["op"] == "product"]
    assert forms == [
        ("qkv", "triton", "norm, RoPE and KV write"),
        ("qkv", "triton", "product alone"),
        ("qkv", "library", "product alone"),
        ("gate_up", "triton", "norm and gates"),
        ("gate_up", "triton", "gates alone"),
        ("gate_up", "library", "product alone"),
    ]
    assert [row["backend"] for row in rows if row["op"] == "gated"] == ["mosaic", "library"]


def test_stacked_products_are_compared_with_the_library(rows: list[dict[str, Any]]) -> None:
    own = [row for row in rows if row["op"] == "stacked"]
    found = [(row["product"], row["rows"], row["backend"]) for row in own]
    backends, counts = ("mosaic", "mosaic", "library"), (8, 16)
    assert found == [(each, count, by) for each in ("qkv", "head") for count in counts for by in backends]
    assert all(row["has_equal_bits"] for row in own if row.get("is_batch_invariant"))
    assert all(row["has_equal_bits"] in (True, False) for row in own)


def test_rows_that_differ_between_shapes_are_told() -> None:
    def multiply(x: jax.Array, weights: jax.Array, layer: jax.Array) -> jax.Array:
        return x @ weights[0] + (0.5 if len(x) > 8 else 0.0)

    x, weights = jnp.ones((16, 4)), jnp.ones((1, 4, 4))
    assert not bench.has_equal_bits(multiply, x, weights, (8, 16))
    assert bench.has_equal_bits(multiply, x, weights, (9, 16))


def test_calls_go_through_more_than_a_cache_holds() -> None:
    from pjengine.pallas_kernels.timing import CALLS, COLD_BYTES, calls_for, layers_for

    for num_bytes in (300_000, 2 << 20, COLD_BYTES - 1, COLD_BYTES, 5 << 30):
        num_layers = layers_for(num_bytes, is_tiny=False)
        assert num_layers * num_bytes >= COLD_BYTES
        assert calls_for(num_layers, is_tiny=False) >= max(num_layers, CALLS)


def test_only_the_ops_that_are_asked_for_are_timed() -> None:
    assert {row["op"] for row in kernel_rows("demo", ("decode",), interpret=True)} == {"decode"}


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_it_says_what_to_do(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    with pytest.raises(NotImplementedError, match="--interpret"):
        next(kernel_rows("demo", (op,)))


def test_rates_are_per_second_and_shares_of_the_limit() -> None:
    row = LIMITS.row({"op": "x"}, lambda: 0.5, gb=1.0)
    assert (row["us"], row["gb_per_s"], row["share"]) == (5e5, 2.0, 0.5)
    row = LIMITS.row({"op": "x"}, lambda: 0.5, tflop=1.0)
    assert (row["tflop_per_s"], row["limit_tflop_per_s"], row["share"]) == (2.0, 8.0, 0.25)


def test_tiles_that_do_not_fit_are_reported_and_the_rest_goes_on() -> None:
    def too_large() -> float:
        raise jax.errors.JaxRuntimeError("out of shared memory\nmore")

    assert LIMITS.row({"op": "x"}, too_large, gb=1.0) == {"op": "x", "error": "out of shared memory"}
