import pytest

from pjengine.page_pool import CACHED, FREE, HELD, NULL_PAGE, PagePool, page_hashes


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
    assert pool.allocate(1) == first  # in the order in which they were freed


def hashes(*tokens: int, salt: str = "") -> list[bytes]:
    return page_hashes(tokens, 2, salt)


def test_names_agree_exactly_as_far_as_the_sequences_do() -> None:
    base = hashes(1, 2, 3, 4, 5)
    assert len(base) == 2  # the fifth token fills no page
    assert hashes(1, 2, 3, 9)[0] == base[0] and hashes(1, 2, 3, 9)[1] != base[1]
    assert hashes(9, 2, 3, 4)[1] != base[1]
    assert set(hashes(1, 2, 3, 4, salt="other")).isdisjoint(base)


def test_a_released_page_is_found_again_until_it_is_needed() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    for page, name in zip(pages, hashes(1, 2, 3, 4), strict=True):
        pool.register(page, name)
    pool.release(pages)
    assert pool.num_free == 3
    assert pool.match(hashes(1, 2, 3, 4)) == pages
    assert pool.match(hashes(1, 2, 7, 7)) == pages[:1]
    assert pool.allocate(1) == [3]  # the one without content goes first
    taken = pool.allocate(1)
    assert taken == pages[1:]  # then the end of the sequence, so that its beginning stays
    assert pool.match(hashes(1, 2, 3, 4)) == pages[:1]
    pool.retain(pages[:1])
    with pytest.raises(RuntimeError, match="1 pages asked for, 0 free"):
        pool.allocate(1)
    pool.check_integrity([[3], taken, pages[:1]])


def test_forgetting_leaves_held_pages_alone() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    for page, name in zip(pages, hashes(1, 2, 3, 4), strict=True):
        pool.register(page, name)
    pool.release(pages[1:])
    pool.forget()
    assert pool.match(hashes(1, 2)) == [] and pool.num_free == 2
    pool.check_integrity([pages[:1]])
    pool.release(pages[:1])
    pool.check_integrity([])


def test_a_content_is_named_once() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    [name] = hashes(1, 2)
    pool.register(pages[0], name)
    pool.register(pages[1], name)
    assert pool.match([name]) == pages[:1]
    pool.release(pages)
    pool.check_integrity([])


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
    with pytest.raises(RuntimeError, match="registered but not held"):
        pool.register(1, b"name")


def test_integrity_check_sees_a_lost_and_a_doubly_held_page() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(RuntimeError, match="0 holders, counted 1"):
        pool.check_integrity([pages[:1]])
    with pytest.raises(RuntimeError, match="2 holders, counted 1"):
        pool.check_integrity([pages, pages])
    with pytest.raises(RuntimeError, match="null page"):
        pool.check_integrity([pages, [NULL_PAGE]])


def test_states_say_where_each_page_is() -> None:
    pool = PagePool(6)
    assert list(pool.states) == [FREE] * 6
    pages = pool.allocate(3)
    pool.register(pages[0], hashes(1, 2)[0])
    pool.retain(pages[:2])
    pool.release(pages)
    assert list(pool.states) == [FREE, HELD, HELD, FREE, FREE, FREE]
    pool.release(pages[:2])
    assert list(pool.states) == [FREE, CACHED, FREE, FREE, FREE, FREE]
    pool.retain(pages[:1])
    assert pool.states[pages[0]] == HELD
    pool.release(pages[:1])
    pool.forget()
    assert list(pool.states) == [FREE] * 6
    pool.check_integrity([])
    pool.states[2] = HELD
    with pytest.raises(RuntimeError, match=r"pages \[2\]"):
        pool.check_integrity([])
