import pytest

from pjengine.page_pool import NULL_PAGE, PagePool


def test_every_page_but_the_null_page_can_be_held() -> None:
    pool = PagePool(5)
    pages = pool.allocate(4)
    assert sorted(pages) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity([pages])
    pool.release(pages)
    assert pool.num_free == pool.num_usable == 4
    pool.check_integrity([])


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    pool.release(pages)
    assert pool.num_free == 2
    pool.check_integrity([pages[:1]])
    pool.release(pages[:1])
    assert pool.num_free == 3


def test_freed_pages_rest_as_long_as_possible() -> None:
    pool = PagePool(4)
    first = pool.allocate(1)
    pool.release(first)
    assert pool.allocate(2) == [2, 3]
    assert pool.allocate(1) == first


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)
    pool = PagePool(3)
    with pytest.raises(RuntimeError, match="3 pages asked for, 2 free"):
        pool.allocate(3)
    with pytest.raises(RuntimeError, match="not held"):
        pool.release([1])
    with pytest.raises(RuntimeError, match="cannot be shared"):
        pool.retain([1])


def test_integrity_check_sees_a_lost_and_a_doubly_held_page() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(RuntimeError, match="0 holders, counted 1"):
        pool.check_integrity([pages[:1]])
    with pytest.raises(RuntimeError, match="2 holders, counted 1"):
        pool.check_integrity([pages, pages])
    with pytest.raises(RuntimeError, match="null page"):
        pool.check_integrity([pages, [NULL_PAGE]])
