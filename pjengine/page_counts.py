"""How many KV pages fit into some bytes, of each group."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from pjengine.models.config import ModelConfig
from pjengine.models.state import layer_page_bytes
from pjengine.models.window_group import WindowGroup
from pjengine.page_groups import window_pages

TOKEN_ID_BYTES = 4


class PageCounts(NamedTuple):
    """The pages of each group; names as in `MemoryPlan`."""

    num_pages: int
    page_bytes: int
    window_group: WindowGroup | None = None
    window_page_bytes: int = 0
    draft_page_bytes: int = 0


def count_pages(
    config: ModelConfig,
    dtype: jnp.dtype,
    kv_bytes: int,
    *,
    page_size: int,
    max_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    draft: ModelConfig | None = None,
) -> PageCounts:
    """Divides `kv_bytes`: no more pages than requests can use, and no group less than one request needs.

    Layers that see less than `max_len` tokens have pages of their own. The bytes are divided as if requests
    were half of `max_len` long, but at most four windows; beside that, a step's new tokens have room.
    A draft model's layers lie in the pages of those that see everything.
    """
    layer_bytes = layer_page_bytes(config, page_size, dtype)
    draft_bytes = 0 if draft is None else draft.num_layers * layer_page_bytes(draft, page_size, dtype)
    most_pages = max_num_seqs * -(-max_len // page_size) + 1
    windows = config.windowed_layers(max_len)
    if not windows:
        page_bytes = config.num_layers * layer_bytes + draft_bytes
        return PageCounts(min(most_pages, kv_bytes // page_bytes), page_bytes, draft_page_bytes=draft_bytes)
    window, window_page_bytes = max(windows.values()), len(windows) * layer_bytes
    page_bytes = (config.num_layers - len(windows)) * layer_bytes + page_size * TOKEN_ID_BYTES + draft_bytes
    num_new_pages = -(-max_num_batched_tokens // page_size)

    def held(num_tokens: int, num_new: int) -> int:
        """By a request of the window's pages."""
        return int(window_pages(window, num_tokens, page_size, num_new=num_new))

    most = min(most_pages, 1 + max_num_seqs * held(max_len, 1) + num_new_pages)
    least = 1 + held(max_len, max_num_batched_tokens)
    expected_len = max(page_size, min(max_len // 2, 4 * window))
    expected = held(expected_len, 1)
    request_bytes = -(-expected_len // page_size) * page_bytes + expected * window_page_bytes
    num_requests = max(0, kv_bytes - (1 + num_new_pages) * window_page_bytes) / request_bytes
    wanted = 1 + num_new_pages + math.ceil(num_requests * expected)
    beside_one = (kv_bytes - (1 + -(-max_len // page_size)) * page_bytes) // window_page_bytes
    num_window_pages = min(most, max(least, min(wanted, beside_one)))
    num_pages = max(0, min(most_pages, (kv_bytes - num_window_pages * window_page_bytes) // page_bytes))
    left = kv_bytes - num_pages * page_bytes
    num_window_pages = min(most, max(least, left // window_page_bytes))
    group = WindowGroup(layers=tuple(windows), window=window, num_pages=num_window_pages)
    return PageCounts(num_pages, page_bytes, group, window_page_bytes, draft_bytes)
