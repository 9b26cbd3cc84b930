"""The pages of windows alone: which are given back, which a hit of the prefix cache needs."""

import numpy as np
import pytest

from pjengine.page_groups import Found, PageGroups, PageUpdates, window_pages
from pjengine.page_pool import NULL_PAGE, PagePool, page_hashes
from pjengine.request import Request
from pjengine.row_table import RowTable
from tests.engine.test_scheduler import make_request

SIZE, WINDOW = 4, 6


class Setting:
    """Both pools, their rows, and what a step of the scheduler does with them."""

    def __init__(self) -> None:
        self.rows, self.pool, self.window_pool = RowTable(4), PagePool(32), PagePool(12)
        self.groups = PageGroups(
            self.pool,
            self.rows,
            page_size=SIZE,
            max_new_tokens=16,
            is_caching=True,
            window_pool=self.window_pool,
            window=WINDOW,
        )

    def start(self, request: Request) -> Found:
        found, updates = self.groups.find(request), PageUpdates([], [])
        num_cached = len(found.pages) * SIZE
        request.row = self.rows.admit(request, num_cached, room=num_cached)
        self.groups.take(request, found, updates)
        first = len(found.pages) - len(found.window_pages)
        assert updates.full == [(request.row, i, page) for i, page in enumerate(found.pages)]
        assert updates.window == [(request.row, i, page) for i, page in enumerate(found.window_pages, first)]
        return found

    def compute(self, request: Request, num_tokens: int) -> None:
        self.groups.give_back_unseen()
        needed = -(-int(self.rows.computed[request.row] + num_tokens) // SIZE)
        self.groups.grow(request, needed - len(request.pages), PageUpdates([], []))
        self.rows.computed[request.row] += num_tokens
        self.groups.register(request)
        self.groups.check_integrity([request])


def test_a_page_is_given_back_when_the_next_token_sees_nothing_of_it() -> None:
    setting, request = Setting(), make_request("a", 40, 4)
    groups = setting.groups
    setting.start(request)
    num_held = []
    for _ in range(18):
        setting.compute(request, 1)
        num_held.append(sum(page != NULL_PAGE for page in request.window_pages))
    # Token 9, the tenth, sees slots from 4 on; token 8 sees slot 3.
    assert num_held == [1, 1, 1, 1, 2, 2, 2, 2, 3, 2, 2, 2, 3, 2, 2, 2, 3, 2]
    assert len(request.pages) == len(request.window_pages) == 5
    groups.release(request)
    assert all(pool.num_free == pool.num_usable for pool in groups.pools)


def test_no_page_is_given_back_before_the_step_after_the_one_that_reads_it() -> None:
    setting, request = Setting(), make_request("a", 40, 4)
    groups = setting.groups
    setting.start(request)
    setting.compute(request, 16)
    assert NULL_PAGE not in request.window_pages
    groups.give_back_unseen()
    assert [page == NULL_PAGE for page in request.window_pages] == [True, True, False, False]


@pytest.mark.parametrize(
    ("lost", "num_cached"),
    [
        ([], 24),  # token 24 sees slots from 19 on: columns 4 and 5
        ([0, 1, 2, 3], 24),
        ([4], 16),  # columns 2 and 3
        ([5], 20),
        ([3, 5], 12),
        ([1, 2, 3, 4, 5], 4),
        ([0, 1, 2, 3, 4, 5], 0),
    ],
)
def test_a_hit_has_every_page_of_one_pool_and_a_window_of_the_other(lost: list[int], num_cached: int) -> None:
    setting, request = Setting(), make_request("a", 25, 4)
    names = page_hashes(request.prompt_token_ids, SIZE, request.salt)
    pages, window_pages = setting.pool.allocate(6), setting.window_pool.allocate(6)
    for column, name in enumerate(names):
        setting.pool.register(pages[column], name)
        if column not in lost:
            setting.window_pool.register(window_pages[column], name)
    setting.pool.release(pages)
    setting.window_pool.release(window_pages)
    found = setting.start(request)
    end = num_cached // SIZE
    assert found == Found(pages[:end], window_pages[max(0, num_cached - WINDOW + 1) // SIZE : end])
    setting.compute(request, min(16, 25 - num_cached))


def test_a_request_holds_no_more_pages_than_are_counted_for_it_and_sometimes_as_many() -> None:
    for window in range(1, 12):
        for num_new in range(1, 12):
            spans = [
                (start + num_new - 1) // SIZE - max(0, start - window + 1) // SIZE + 1
                for start in range(100 - num_new)
            ]
            assert max(spans) == window_pages(window, 100, SIZE, num_new=num_new)
    assert window_pages(50, np.array([3, 8, 100]), SIZE, num_new=1).tolist() == [1, 2, 14]


def test_what_is_given_back_too_early_or_in_one_pool_only_is_found() -> None:
    setting, request = Setting(), make_request("a", 40, 4)
    groups = setting.groups
    setting.start(request)
    setting.compute(request, 8)
    setting.rows.window_start[request.row] = SIZE
    setting.window_pool.release(request.window_pages[:1])
    with pytest.raises(RuntimeError, match="has given back 4 slots, and its token at 8 sees 6"):
        groups.check_integrity([request])
    setting.pool.release([request.pages.pop()])
    with pytest.raises(RuntimeError, match="has 1 columns of one pool and 2 of the other"):
        groups.check_integrity([request])


def test_a_window_without_a_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="window_pool and window go together"):
        PageGroups(PagePool(4), RowTable(1), page_size=4, max_new_tokens=4, is_caching=True, window=4)
