"""Hidden states that a forward pass keeps on its way, of layers that are known when it runs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pjengine.models.config import ModelConfig


class KeptStates(NamedTuple):
    """Room for the hidden states of a few layers, which one program fills whichever they are.

    They are numbered as Hugging Face's `output_hidden_states`: 0 is what goes into the first layer, i what
    layer i has made of it (from 1), and the last one has been through the last norm. What a model does
    behind that, as OPT-350M's projection, they have not been through.
    """

    states: Float[Array, "slots *t e"]  # of the layers wanted, in their order; the last slot: of the others
    slot_of: Int[Array, " numbers"]  # where those of each number go

    @classmethod
    def empty(
        cls, wanted: Int[Array, " k"], config: ModelConfig, num_tokens: int, dtype: jnp.dtype
    ) -> "KeptStates":
        """For the numbers in `wanted`, each one once; those out of range stand for nothing."""
        (k,) = wanted.shape
        slot_of = jnp.full(config.num_layers + 1, k, jnp.int32)
        slot_of = slot_of.at[wanted].set(jnp.arange(k, dtype=jnp.int32), mode="drop")
        return cls(jnp.zeros((k + 1, num_tokens, config.hidden_size), dtype), slot_of)

    def put(self, number: int, x: Float[Array, "*t e"]) -> "KeptStates":
        """In place, and as much work whether they are wanted or not."""
        slot = self.slot_of[number]
        return self._replace(states=lax.dynamic_update_index_in_dim(self.states, x, slot, axis=0))

    @property
    def wanted(self) -> Float[Array, "k *t e"]:
        return self.states[:-1]
