"""A model and a smaller one that drafts tokens for it.

The draft model has pages of the same ids, and computes every batch that the model computes: where the one
has K and V of a token, the other has its own. So pages that are shared or given back are so for both.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pjengine.models.attention import Attend, PagedAttend
from pjengine.models.decoder import Decoder, Params, StateEdit
from pjengine.models.kept_states import KeptStates
from pjengine.models.share import padded
from pjengine.models.state import KVCache, kv_shape
from pjengine.models.window_group import WindowGroup


@dataclass(frozen=True)
class Pair(Decoder):
    """Computes what `target` does; `draft` follows. Parameters are {"target": ..., "draft": ...}.

    Both are divided among the same devices.
    """

    target: Decoder
    draft: Decoder

    @classmethod
    def of(cls, target: Decoder, draft: Decoder) -> "Pair":
        return cls(target.config, target.dtype, target, draft, num_devices=target.num_devices)

    def init(self, key: Array) -> Params:
        return {"target": self.target.init(key), "draft": self.draft.init(jax.random.fold_in(key, 1))}

    def run_keeping(
        self,
        params: Params,
        tokens: Int[Array, "*t"],
        positions: Int[Array, "*t"],
        rope_lens: Int[Array, "*t"],
        cache: KVCache | None,
        attend: Attend,
        kept: KeptStates | None,
        edit: StateEdit | None = None,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "*t e"], KVCache | None, KeptStates | None]:
        """As the target alone; over pages, the draft model writes its own K and V of the tokens, unedited."""
        inputs = tokens, positions, rope_lens
        hidden, cache, kept = self.target.run_keeping(
            params["target"], *inputs, cache, attend, kept, edit, remat=remat
        )
        if cache is not None and isinstance(attend, PagedAttend):
            _, cache = self.run_draft(params, *inputs, cache, attend)
        return hidden, cache, kept

    def run_draft(
        self,
        params: Params,
        tokens: Int[Array, " t"],
        positions: Int[Array, " t"],
        rope_lens: Int[Array, " t"],
        cache: KVCache,
        attend: PagedAttend,
    ) -> tuple[Float[Array, "t d"], KVCache]:
        """Token ids to the draft model's final hidden states."""
        assert cache.draft_k is not None and cache.draft_v is not None
        own = KVCache(cache.draft_k, cache.draft_v, cache.token_ids)
        # Its layers that see a window keep the pages before it, as those that see everything.
        attend = replace(attend, window_group=None)
        hidden, updated = self.draft.run(params["draft"], tokens, positions, rope_lens, own, attend)
        assert updated is not None
        return hidden, cache._replace(draft_k=updated.k, draft_v=updated.v)

    def own_logits(self, params: Params, hidden: Float[Array, "*t e"]) -> Float[Array, "*t own"]:
        return self.target.own_logits(params["target"], hidden)

    def draft_logits(self, params: Params, hidden: Float[Array, "*t d"]) -> Float[Array, "*t v"]:
        return self.draft.logits(params["draft"], hidden)


def target_of(model: Decoder) -> Decoder:
    """Of a pair the target, else the model itself."""
    return model.target if isinstance(model, Pair) else model


def target_params(model: Decoder, params: Params) -> Params:
    """Of a pair the target's, else all."""
    own: Params = params["target"] if isinstance(model, Pair) else params
    return own


def empty_cache(
    model: Decoder, num_pages: int, page_size: int, window_group: WindowGroup | None = None
) -> KVCache:
    """Pages of zeros, of a pair for both models."""

    def pages(own: Decoder, window_group: WindowGroup | None) -> Array:
        whole = padded(own.config, own.num_devices)
        return jnp.zeros(kv_shape(whole, num_pages, page_size, window_group), own.dtype)

    token_ids = jnp.zeros((num_pages, page_size), jnp.int32)
    cache = KVCache(pages(model, window_group), pages(model, window_group), token_ids)
    if not isinstance(model, Pair):
        return cache
    return cache._replace(draft_k=pages(model.draft, None), draft_v=pages(model.draft, None))
