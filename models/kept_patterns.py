"""Attention that keeps its weights: who looks at whom, of layers that are known when it runs."""

from dataclasses import dataclass, field

from jaxtyping import Array, Float

from pjengine.models.attention import Rotary, dense_attend_weighing
from pjengine.models.state import KVCache
from pjengine.pallas_kernels.attention_variant import PLAIN, AttentionVariant


@dataclass(frozen=True)
class PatternAttend:
    """Attends as `dense_attend` does, and puts the weights of some layers into `patterns`.

    Of one forward pass: what is in there is of the trace that it ran in.
    """

    layers: tuple[int, ...]
    patterns: dict[int, Float[Array, "*b h t t"]] = field(default_factory=dict)

    def __call__(
        self,
        qkv: Float[Array, "*b t hk g d"],
        cache: KVCache | None,
        *,
        layer: int,
        rotary: Rotary | None,
        scale: float,
        variant: AttentionVariant = PLAIN,
    ) -> tuple[Float[Array, "*b t h d"], KVCache | None]:
        out, weights = dense_attend_weighing(qkv, rotary=rotary, scale=scale, variant=variant)
        if layer in self.layers:
            *batch, kv_heads, group, length, _ = weights.shape
            self.patterns[layer] = weights.reshape(*batch, kv_heads * group, length, length)
        return out, cache
