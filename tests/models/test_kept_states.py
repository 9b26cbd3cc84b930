"""Hidden states on the way through the layers, against what transformers computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine.models.attention import dense_attend
from pjengine.models.checkpoint import open_checkpoint
from pjengine.models.kept_states import KeptStates
from pjengine.models.loader import load_params
from pjengine.models.registry import build_model, parse_config
from tests.golden import golden as goldens


@pytest.mark.parametrize("name", sorted(goldens.STATES))
def test_hidden_states_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    golden = goldens.load(name)
    with np.load(goldens.FOLDER / "hidden_states.npz") as file:
        wanted = file[name]  # of the last four tokens, and the mean of all
    model = build_model(parse_config(golden.config), jnp.dtype("float32"))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    table, num_layers = model.weight_table(), model.config.num_layers
    checkpoint = open_checkpoint(goldens.write_checkpoint(golden, tmp_path))
    params = load_params(checkpoint, table, abstract, num_layers=num_layers)
    tokens = jnp.asarray(golden.prompt, jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    numbers = jnp.arange(num_layers + 1, dtype=jnp.int32)[::-1]  # any order will do
    room = KeptStates.empty(numbers, model.config, len(tokens), model.dtype)
    rope_lens = jnp.full_like(positions, len(tokens))
    _, _, kept = jax.jit(
        lambda params, room: model.run_keeping(params, tokens, positions, rope_lens, None, dense_attend, room)
    )(params, room)
    states = np.asarray(kept.wanted)[::-1]
    found = np.concatenate([states[:, -4:], states.mean(axis=1, keepdims=True)], axis=1)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)


def test_layers_that_nobody_wants_are_not_among_those_kept() -> None:
    from pjengine.models.shapes import SHAPES

    config = SHAPES["tiny"]
    kept = KeptStates.empty(jnp.asarray([1, 2**30], jnp.int32), config, 3, jnp.dtype("float32"))
    for number in range(config.num_layers + 1):
        kept = kept.put(number, jnp.full((3, config.hidden_size), float(number + 1)))
    assert np.unique(kept.wanted[0]).tolist() == [2.0] and not kept.wanted[1].any()
