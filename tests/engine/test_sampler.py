"""The sampler: right tokens, right frequencies, and noise that depends on seed and position alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def draw(logits: np.ndarray, positions: Any, **rows: Any) -> np.ndarray:
    from pjengine.sampler import sample

    num = len(logits)
    num_tokens = logits.shape[1]
    defaults = {
        "seed_high": 0, "seed_low": 0, "temperature": 1.0, "top_k": num_tokens, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    values = {name: np.broadcast_to(rows.get(name, default), num) for name, default in defaults.items()}
    dtypes = {"temperature": jnp.float32, "top_p": jnp.float32, "min_p": jnp.float32}
    arrays: dict[str, Any] = {
        name: jnp.asarray(value, dtypes.get(name, jnp.int32)) for name, value in values.items()
    }
    return np.asarray(sample(jnp.asarray(logits, jnp.float32), jnp.asarray(positions, jnp.int32), **arrays))


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 50))
    tokens = draw(logits, [0, 1, 2, 3], temperature=0.0, top_k=1, top_p=0.1)
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


def test_a_row_that_holds_nan_is_found_however_long_it_is() -> None:
    import jax

    from pjengine.sampler import has_nan

    for size in (7, 160, 4096, 128_256):
        logits = np.zeros((4, size), np.float32)
        logits[1], logits[2, size // 2], logits[3] = np.nan, np.nan, -np.inf
        assert jax.jit(has_nan)(jnp.asarray(logits)).tolist() == [False, True, True, False]


def test_frequencies_follow_the_softmax() -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    num = 20_000
    tokens = draw(np.tile(np.log(probs), (num, 1)), np.arange(num))
    counts = np.bincount(tokens, minlength=4)
    chi_squared = ((counts - num * probs) ** 2 / (num * probs)).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom: exceeded once in a thousand seeds


def test_temperature_sharpens() -> None:
    probs = np.array([0.6, 0.4])
    num = 20_000
    tokens = draw(np.tile(np.log(probs), (num, 1)), np.arange(num), temperature=0.5)
    wanted = 0.6**2 / (0.6**2 + 0.4**2)
    assert abs((tokens == 0).mean() - wanted) < 0.015


def test_filtered_tokens_are_never_drawn_and_the_rest_keep_their_ratio() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    num = 20_000
    for rows in ({"top_k": 2}, {"top_p": 0.65}, {"min_p": 0.6}):
        tokens = draw(np.tile(np.log(probs), (num, 1)), np.arange(num), **rows)
        assert set(tokens) == {0, 1}, rows
        assert abs((tokens == 0).mean() - 4 / 7) < 0.015, rows


def test_a_row_draws_the_same_whatever_the_batch() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (6, 300))
    seeds, positions = rng.integers(0, 2**31, 6), rng.integers(0, 1000, 6)
    top_k = np.array([300, 5, 300, 40, 1, 300])
    whole = draw(logits, positions, seed_low=seeds, top_k=top_k)
    order = rng.permutation(6)
    permuted = draw(logits[order], positions[order], seed_low=seeds[order], top_k=top_k[order])
    assert permuted.tolist() == whole[order].tolist()
    for row in range(6):
        alone = draw(logits[row : row + 1], positions[row : row + 1], seed_low=seeds[row], top_k=top_k[row])
        assert alone.tolist() == whole[row : row + 1].tolist()


def test_both_words_of_the_seed_and_the_position_matter() -> None:
    logits = np.zeros((64, 1000))
    base = draw(logits[:1], [5])
    for change in ({"seed_low": np.arange(1, 65)}, {"seed_high": np.arange(1, 65)}):
        assert len(set(draw(logits, [5] * 64, **change)) - set(base)) > 50
    assert len(set(draw(logits, np.arange(64)))) > 50


def noise(num_rows: int, size: int, **fields: Any) -> np.ndarray:
    from pjengine.sampler import gumbel_noise

    keys = {"seed_high": 0, "seed_low": 0, "positions": 0, **fields}
    rows = {name: jnp.asarray(np.broadcast_to(value, num_rows), jnp.int32) for name, value in keys.items()}
    return np.asarray(gumbel_noise(**rows, size=size))


def test_noise_is_gumbel_distributed_along_columns_and_along_rows() -> None:
    whole = noise(300, 1000, positions=np.arange(300), seed_low=7)
    probability = np.exp(-np.exp(-whole.astype(np.float64)))  # uniform, if the noise is Gumbel
    for sample in (probability.ravel(), probability[:, 0], probability[0]):
        steps = np.arange(1, sample.size + 1) / sample.size
        assert np.abs(np.sort(sample) - steps).max() < 1.95 / np.sqrt(
            sample.size
        )  # Kolmogorov-Smirnov, 0.1 %


def test_noise_of_neighbours_is_independent() -> None:
    rows = {"positions": np.arange(400), "seed_low": np.arange(400), "seed_high": np.arange(400)}
    for name, values in rows.items():
        whole = noise(400, 1000, **{name: values})
        probability = np.exp(-np.exp(-whole.astype(np.float64))) - 0.5
        pairs = [
            (probability[:, 1:], probability[:, :-1]),
            (probability[1:], probability[:-1]),
            (probability[16:], probability[:-16]),
            (probability[:, 256:], probability[:, :-256]),
            (probability[1:, 1:], probability[:-1, :-1]),
        ]
        for first, second in pairs:
            correlation = 12 * (first * second).mean()
            assert abs(correlation) < 4 / np.sqrt(first.size), name


def test_noise_is_always_finite_and_reaches_far_up() -> None:
    whole = noise(64, 2**16, seed_low=np.arange(64))
    assert np.isfinite(whole).all()
    assert np.log(whole.size) - 3 < whole.max() < np.log(whole.size) + 10
