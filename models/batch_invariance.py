"""Which models compute a decode of a sequence to the same bits in steps of any number of rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pjengine.models.block import Block
from pjengine.models.decoder import Decoder
from pjengine.pallas_kernels.dispatch import check_hopper, platform
from pjengine.pallas_kernels.gated_linear import GatedTiles, check_gated_can
from pjengine.pallas_kernels.paged_attention import DecodeTiles, check_kernel_can
from pjengine.pallas_kernels.stacked_linear import check_stacked_can


def is_batch_invariant(
    model: Decoder, row_counts: Sequence[int], *, max_slots: int, backend: str | None = None
) -> bool:
    """Whether kernels whose sums do not depend on the number of rows make all products of these steps.

    And whether decode attention cuts a sequence alike in all of them. Norms, and what is computed element by
    element, is left to XLA: see `step_compiler.FIXED_OPTIONS`, and `determinism.verify_determinism`.

    Args:
      max_slots: of a sequence's pages.
      backend: the engine's `kernel_backend`.
    """
    if (
        platform() != "gpu"
        or backend is not None
        or model.num_devices > 1
        or not _is_made_of_known_pieces(model)
    ):
        return False
    try:
        check_hopper()
        for num_rows in row_counts:
            _check_products(model, num_rows)
    except NotImplementedError:
        return False
    return len({_attention_tiles(model, num_rows, max_slots) for num_rows in row_counts}) == 1


def _is_made_of_known_pieces(model: Decoder) -> bool:
    """Those of Llama: other norms, scales and orders were not tried."""
    kind = type(model)
    has_own_pieces = kind.block is not Block or any(
        getattr(kind, name) is not getattr(Decoder, name)
        for name in ("run_keeping", "embed", "own_logits", "normalize")
    )
    return model.config.is_like_llama and not model.config.mlp_bias and not has_own_pieces


def _check_products(model: Decoder, num_rows: int) -> None:
    """Raises NotImplementedError where a kernel does not take a product."""
    c = model.own
    heads = c.num_heads * c.head_dim
    qkv = heads + 2 * c.num_kv_heads * c.head_dim

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, model.dtype)

    for k, n in ((c.hidden_size, qkv), (heads, c.hidden_size), (c.intermediate_size, c.hidden_size)):
        check_stacked_can(struct(num_rows, k), struct(1, k, n), model.dtype, is_transposed=False)
    head = struct(1, c.vocab_size, c.hidden_size)
    check_stacked_can(struct(num_rows, c.hidden_size), head, jnp.float32, is_transposed=True)
    check_gated_can(struct(num_rows, c.hidden_size), struct(1, c.hidden_size, 2, c.intermediate_size))
    GatedTiles.choose(num_rows=num_rows, n=c.intermediate_size)
    pages = struct(1, c.num_kv_heads, 16, c.head_dim)
    check_kernel_can(struct(num_rows, c.num_heads, c.head_dim), pages, pages)


def _attention_tiles(model: Decoder, num_rows: int, max_slots: int) -> tuple[DecodeTiles, ...]:
    """Of all layers: those with a window see fewer slots."""
    c = model.own
    lengths = {min(max_slots, c.window_of(number) or max_slots) for number in range(c.num_layers)}
    return tuple(
        DecodeTiles.choose(
            batch=num_rows,
            num_kv_heads=c.num_kv_heads,
            group=c.group,
            head_dim=c.head_dim,
            max_slots=length,
            itemsize=model.dtype.itemsize,
        )
        for length in sorted(lengths)
    )
