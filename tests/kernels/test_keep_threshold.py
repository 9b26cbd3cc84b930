"""min_p, top_k and top_p as a threshold: against a sort in numpy, for every backend."""

import jax.numpy as jnp
import numpy as np
import pytest

ROWS = [  # temperature, top_k (0: all), top_p, min_p
    (0.0, 5, 0.5, 0.1),  # greedy: nothing is filtered
    (1.0, 0, 1.0, 0.0),  # no filter
    (1.0, 1, 1.0, 0.0),
    (0.7, 40, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.5, 0, 0.05, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.6, 50, 0.8, 0.02),
    (2.0, 7, 0.999, 0.001),
]


def kept_by_sorting(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Which tokens stay, computed as the definitions say, in float64."""
    if temperature == 0:
        return np.ones(logits.shape, bool)
    x = logits.astype(np.float64) / temperature
    probs = np.exp(x - x.max())
    kept = probs >= min_p
    if top_k:
        kept &= x >= np.sort(x)[-top_k]
    order = np.argsort(-np.where(kept, x, -np.inf))
    mass = np.cumsum(np.where(kept, probs, 0)[order]) / np.where(kept, probs, 0).sum()
    inside = np.concatenate([[True], mass[:-1] < top_p])  # the token that reaches top_p is kept
    nucleus = np.zeros(logits.shape, bool)
    nucleus[order[inside]] = True
    return kept & nucleus


def run(backend: str, logits: np.ndarray, rows: list[tuple[float, int, float, float]]) -> np.ndarray:
    from pjengine.pallas_kernels.keep_threshold import keep_threshold

    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    top_k = np.where(top_k == 0, logits.shape[1], top_k)
    return np.asarray(
        keep_threshold(
            jnp.asarray(logits),
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(top_p, jnp.float32),
            jnp.asarray(min_p, jnp.float32),
            backend=backend,
        )
    )


@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("vocab_size", [97, 4096, 5000])
def test_the_threshold_keeps_what_a_sort_keeps(backend: str, vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).normal(0, 3, (len(ROWS), vocab_size)).astype(np.float32)
    thresholds = run(backend, logits, ROWS)
    for row, settings in enumerate(ROWS):
        wanted = kept_by_sorting(logits[row], *settings)
        assert np.array_equal(logits[row] >= thresholds[row], wanted), settings


@pytest.mark.parametrize(
    "backend", ["reference", "triton_interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_rows_without_filters_get_minus_infinity(backend: str) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 97)).astype(np.float32)
    assert np.all(run(backend, logits, ROWS[:2]) == -np.inf)


@pytest.mark.parametrize("backend", ["reference", "triton_interpret"])
def test_ties_with_the_last_token_kept_are_kept(backend: str) -> None:
    logits = np.array([[3.0, 2.0, 2.0, -1.0, 2.0]], np.float32)
    threshold = run(backend, logits, [(1.0, 2, 1.0, 0.0)])
    assert (logits >= threshold[:, None]).tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize("backend", ["reference", "triton_interpret"])
def test_negative_and_huge_logits_are_ordered(backend: str) -> None:
    logits = np.array([[-1e30, -5.0, -0.0, 1e30, 2e30]], np.float32)
    threshold = run(backend, logits, [(1.0, 3, 1.0, 0.0)])
    assert (logits >= threshold[:, None]).tolist() == [[False, False, True, True, True]]


def test_logits_other_than_float32_are_refused() -> None:
    from pjengine.pallas_kernels.keep_threshold import keep_threshold

    ones = jnp.ones(1, jnp.float32)
    with pytest.raises(NotImplementedError, match="wanted float32"):
        keep_threshold(
            jnp.ones((1, 64), jnp.bfloat16),
            ones,
            jnp.ones(1, jnp.int32),
            ones,
            ones,
            backend="triton_interpret",
        )
