"""Edits of logits and log-probabilities against numpy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

PAGE, NUM_SEQS, VOCAB = 4, 5, 23
LENS = [1, 7, 12, 0, 5]  # 0: a padding row
PROMPT_LENS = [1, 3, 12, 0, 2]


def make_history(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Pages of token ids, a page table, and the tokens of each sequence; unused slots hold junk."""
    token_ids = rng.integers(0, VOCAB, (20, PAGE)).astype(np.int32)
    table = rng.permutation(np.arange(1, 16)).reshape(NUM_SEQS, 3).astype(np.int32)
    sequences = [token_ids[table[i]].reshape(-1)[:length].tolist() for i, length in enumerate(LENS)]
    return token_ids, table, sequences


def apply(wishes: list[Any], logits: np.ndarray, token_ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    from pjengine.batching import PENALTIES
    from pjengine.edit_sizes import pack_edits, sizes_for
    from pjengine.edits import join_needs
    from pjengine.logits import History, apply_edits

    sizes = sizes_for(join_needs(np.array([edits.needs for edits in wishes])), VOCAB)
    parts = {name: np.full(shape, 77, np.int32) for name, shape in sizes.parts(NUM_SEQS).items()}
    outputs = [max(0, length - prompt) for length, prompt in zip(LENS, PROMPT_LENS, strict=True)]
    pack_edits(parts, list(zip(range(NUM_SEQS), wishes, outputs, strict=True)), NUM_SEQS)
    on_device = {name: jnp.asarray(part) for name, part in parts.items()}
    lens, prompt_lens = jnp.asarray(LENS, jnp.int32), jnp.asarray(PROMPT_LENS, jnp.int32)
    history = History(jnp.asarray(token_ids), jnp.asarray(table), lens, prompt_lens)
    penalties = [jnp.asarray([getattr(edits, name) for edits in wishes], jnp.float32) for name in PENALTIES]
    return np.asarray(apply_edits(jnp.asarray(logits), on_device, sizes, penalties, history))


def by_definition(edits: Any, logits: np.ndarray, sequence: list[int], prompt_len: int) -> np.ndarray:
    """One row, in float64, token by token."""
    row = logits.astype(np.float64)
    outputs = sequence[prompt_len:]
    for token in range(VOCAB):
        if edits.allowed and token not in edits.allowed:
            row[token] = -np.inf
    for *before, last in edits.bad_words:
        if not before or outputs[-len(before) :] == before:
            row[last] = -np.inf
    for token, value in edits.bias.items():
        row[token] += value
    if len(outputs) < edits.min_tokens:
        row[list(edits.stops)] = -np.inf
    for token in set(sequence):
        factor = edits.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(outputs):
        row[token] -= edits.frequency_penalty * outputs.count(token) + edits.presence_penalty
    return row


def random_edits(rng: np.random.Generator, sequence: list[int]) -> Any:
    from pjengine.edits import NO_EDITS, Edits

    if rng.random() < 0.3:
        return NO_EDITS
    tail = sequence[-int(rng.integers(1, 4)) :]
    words = [
        (*tail, int(rng.integers(VOCAB))),  # matches
        (*tail[:-1], (tail[-1] + 1) % VOCAB if tail else 0, 3),  # does not
        (int(rng.integers(VOCAB)),),
    ]
    return Edits(
        bias={int(token): float(rng.normal()) for token in rng.choice(VOCAB, 3, replace=False)},
        allowed=tuple(map(int, rng.choice(VOCAB, 9, replace=False))) if rng.random() < 0.5 else (),
        bad_words=tuple(words[: int(rng.integers(0, 4))]),
        min_tokens=int(rng.integers(0, 6)),
        stops=(2, 5),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        frequency_penalty=float(rng.choice([0.0, 0.7])),
        presence_penalty=float(rng.choice([0.0, -0.4])),
    )


@pytest.mark.parametrize("block", [8, 2**20], ids=["pages one by one", "all at once"])
@pytest.mark.parametrize("seed", range(12))
def test_edits_in_a_mixed_batch_equal_their_definitions(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pjengine import logits as module
    from pjengine.edits import NO_EDITS

    monkeypatch.setattr(module, "HISTORY_BLOCK", block)
    rng = np.random.default_rng(seed)
    token_ids, table, sequences = make_history(rng)
    logits = rng.normal(0, 3, (NUM_SEQS, VOCAB)).astype(np.float32)
    wishes = [random_edits(rng, sequence) for sequence in sequences]
    wishes[3] = NO_EDITS  # the padding row
    got = apply(wishes, logits, token_ids, table)
    for i, edits in enumerate(wishes):
        wanted = by_definition(edits, logits[i], sequences[i], PROMPT_LENS[i])
        np.testing.assert_allclose(got[i], wanted, rtol=1e-5, atol=1e-5, err_msg=str(edits))


@pytest.mark.parametrize("vocab", [VOCAB, 64, 65])
def test_a_mask_forbids_what_it_has_no_bit_for_in_its_own_sequence_alone(vocab: int) -> None:
    from pjengine.edit_sizes import pack_masks, sizes_for
    from pjengine.edits import Edits, join_needs
    from pjengine.logits import History, apply_edits
    from pjengine.schedule import Masks

    rng = np.random.default_rng(vocab)
    seqs = [4, 0, 2]
    sizes = sizes_for(join_needs(np.array([Edits(has_mask=True).needs] * len(seqs))), vocab)
    assert (sizes.num_masks, sizes.mask_words) == (4, -(-vocab // 32)) and sizes.can_forbid
    words = rng.integers(-(2**31), 2**31, (len(seqs), sizes.mask_words)).astype(np.int32)
    parts = {name: np.full(shape, 77, np.int32) for name, shape in sizes.parts(NUM_SEQS).items()}
    pack_masks(parts, Masks(seqs, words))
    logits = rng.normal(0, 3, (NUM_SEQS, vocab)).astype(np.float32)
    lens = jnp.zeros(NUM_SEQS, jnp.int32)
    history = History(jnp.zeros((1, PAGE), jnp.int32), lens[:, None], lens, lens)
    on_device = {name: jnp.asarray(part) for name, part in parts.items()}
    penalties = [jnp.ones(NUM_SEQS, jnp.float32)] * 3
    got = apply_edits(jnp.asarray(logits), on_device, sizes, penalties, history)
    wanted = logits.copy()
    for seq, mask in zip(seqs, words, strict=True):
        wanted[seq, [token for token in range(vocab) if not mask[token // 32] >> token % 32 & 1]] = -np.inf
    np.testing.assert_array_equal(np.asarray(got), wanted)


def test_a_program_without_edits_has_no_room_for_any() -> None:
    from pjengine.batching import Layout
    from pjengine.edit_sizes import NO_SIZES, sizes_for
    from pjengine.edits import NO_EDITS, join_needs

    assert sizes_for(join_needs(np.array([NO_EDITS.needs] * 3)), VOCAB) == NO_SIZES
    layout = Layout(num_tokens=8, num_rows=4, page_size=16, is_decode=True)
    assert set(layout.parts) == {"rows", "page_updates"}


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
def test_logprobs_and_ranks_equal_numpy(num_top: int) -> None:
    from pjengine.logprobs import logprobs_of

    rng = np.random.default_rng(num_top)
    logits = rng.normal(0, 3, (6, VOCAB)).astype(np.float32)
    tokens, asked = rng.integers(0, VOCAB, 6), rng.integers(0, VOCAB, (6, 2))
    got = logprobs_of(
        jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), num_top, jnp.asarray(asked, jnp.int32)
    )
    wide = logits.astype(np.float64)
    wanted = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    order = np.argsort(-wide, axis=1)
    np.testing.assert_allclose(got.chosen, wanted[np.arange(6), tokens], atol=1e-5)
    np.testing.assert_allclose(got.asked, np.take_along_axis(wanted, asked, 1), atol=1e-5)
    np.testing.assert_allclose(got.top, -np.sort(-wanted, axis=1)[:, :num_top], atol=1e-5)
    assert np.asarray(got.top_ids).tolist() == order[:, :num_top].tolist()
    assert np.asarray(got.rank).tolist() == [1 + order[i].tolist().index(t) for i, t in enumerate(tokens)]


def test_prompt_logprobs_come_in_blocks_and_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pjengine import logprobs

    monkeypatch.setattr(logprobs, "BLOCK", 4)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(11, 6)).astype(np.float32), rng.normal(size=(6, VOCAB)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, 11), jnp.int32)
    got = logprobs.prompt_logprobs_of(jnp.asarray(hidden), targets, 3, lambda rows: rows @ head)
    none = jnp.zeros((11, 0), jnp.int32)
    wanted = logprobs.logprobs_of(jnp.asarray(hidden @ head), targets, 3, none)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
