"""The KV group of layers that see a window. No JAX."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WindowGroup:
    """Layers that see a window only, and have pages of their own, which are given back behind it."""

    layers: tuple[int, ...]  # their numbers, in order
    window: int  # slots that a token sees, its own included, in the layer that sees most
    num_pages: int  # of one layer, the null page among them
