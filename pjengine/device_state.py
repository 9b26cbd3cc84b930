"""What stays on the devices between steps, and how programs are launched on it: alike on every host."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from pjengine.batching import Layout, Rows, update_page_table
from pjengine.beam_selection import BeamOutput
from pjengine.config import RunnerConfig
from pjengine.draw import DrawLayout, Undrawn
from pjengine.inboxes import Inboxes
from pjengine.logprobs import Logprobs
from pjengine.models.decoder import Decoder, Params
from pjengine.models.pair import empty_cache
from pjengine.models.parameters import by_path
from pjengine.models.state import KVCache
from pjengine.sharding.partition import KV_PAGES

type AnyLayout = Layout | DrawLayout
type Program = Callable[..., Any]  # as `step`, `compute_logits` or `draw`, its settings bound

EARLY_UPDATES = 1024  # page updates entered at once by the program that runs before a step


@runtime_checkable
class Held(Protocol):
    """Who holds what stays on the devices."""

    params: Params
    cache: KVCache
    rows: Rows

    @property
    def programs(self) -> Mapping[AnyLayout, Program]: ...


def new_state(
    model: Decoder, config: RunnerConfig, sharding: NamedSharding, inboxes: Inboxes | None = None
) -> tuple[KVCache, Rows]:
    """Empty pages and rows; and empties the inboxes."""

    def make() -> tuple[KVCache, Rows]:
        cache = empty_cache(model, config.num_pages, config.page_size, config.window_group)
        return cache, Rows.empty(config.max_num_seqs, config.num_groups * config.pages_per_seq)

    pages = NamedSharding(sharding.mesh, KV_PAGES)
    shardings: Any = (pages, pages, sharding, pages, pages)
    cache, rows = jax.jit(make, out_shardings=(KVCache(*shardings), sharding))()
    return cache._replace(inboxes=None if inboxes is None else inboxes.renew()), rows


def page_updater(rows: Rows, sharding: NamedSharding) -> Program:
    """The program that enters EARLY_UPDATES page updates into rows, which it donates."""
    early = jax.ShapeDtypeStruct((3, EARLY_UPDATES), jnp.int32, sharding=sharding)
    entered = jax.jit(update_page_table, donate_argnums=0, out_shardings=sharding)
    return entered.lower(rows, early).compile()


def replicate(vector: Int[np.ndarray, "..."], sharding: NamedSharding) -> Int[Array, "..."]:
    """Puts numbers on all devices of this process; every other does so with its own copy of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(vector, sharding)
    # `device_put` would ask all processes whether they have the same.
    return jax.make_array_from_callback(vector.shape, sharding, lambda _: vector)


def run_model(held: Held, layout: Layout, *vectors: Int[Array, "..."]) -> list[Any]:
    """Launches a program with the model; what it leaves beside the state.

    Raises:
      RuntimeError: somebody has deleted parameters.
    """
    try:
        held.cache, held.rows, *results = held.programs[layout](held.params, held.cache, held.rows, *vectors)
    except Exception as error:
        if gone := [path for path, leaf in by_path(held.params).items() if leaf.is_deleted()]:
            raise RuntimeError(
                f"the parameters were deleted ({gone[0]} and {len(gone) - 1} more): they were donated to "
                "another program, or deleted by hand. Give the engine new ones with update_params"
            ) from error
        raise
    return results


def run_draw(
    held: Held, layout: DrawLayout, undrawn: Undrawn, vector: Int[Array, " size"]
) -> tuple[Any, Logprobs | None, BeamOutput | None, Any]:
    """Launches a program that draws; tokens, logprobs, beams, and the counts of drafts."""
    program, beams, drafted = held.programs[layout], None, None
    if layout.edits.num_beams:
        held.cache, held.rows, tokens, logprobs, beams = program(held.cache, held.rows, undrawn, vector)
    else:
        held.rows, tokens, logprobs, drafted = program(held.rows, held.cache.token_ids, undrawn, vector)
    return tokens, logprobs, beams, drafted


class Owned:
    """What the engine deletes when it is closed, beside the state. Parameters that are not among it are the
    caller's.
    """

    def __init__(self, params: Params, inboxes: Inboxes) -> None:
        self.inboxes = inboxes
        # What it has loaded itself: a caller may go on with them when others have taken their place.
        self._loaded = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
        self._donated: list[Array] = []  # deleted as soon as others take their place

    def exchange(self, params: Params, given: Params, *, is_donated: bool) -> None:
        """Learns that `params` are in force from now on, of which `given` are new."""
        new = jax.tree.leaves(given)
        of_caller, in_force = set(map(id, new)), set(map(id, jax.tree.leaves(params)))
        ours = in_force - of_caller
        self._loaded = [own for own in self._loaded if id(own()) in ours]
        free([own for own in self._donated if id(own) not in of_caller])
        self._donated = new if is_donated else []

    def free(self) -> None:
        self.inboxes.free()
        free([own() for own in self._loaded], self._donated)


def free(*trees: Any) -> None:
    """Gives device memory back."""
    for leaf in jax.tree.leaves(trees):
        if not leaf.is_deleted():
            leaf.delete()
