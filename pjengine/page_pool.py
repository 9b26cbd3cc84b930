"""The pages of KV cache: which are free, which are held and by how many. Plain Python."""

from collections import Counter, deque
from collections.abc import Iterable

NULL_PAGE = 0  # padding points here; never handed out


class PagePool:
    """A free list with reference counts.

    A page is in exactly one state: free (count 0, on the free list) or held (count > 0). Freed
    pages go to the end of the list, so that a page rests as long as possible before re-use.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (one is the null page), got {num_pages}")
        self.num_pages = num_pages
        self._ref_counts = [0] * num_pages
        self._free = deque(range(NULL_PAGE + 1, num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that requests can hold when all are free."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference.

        Raises:
          RuntimeError: fewer are free; the scheduler must ask `num_free` first.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are held already."""
        for page in pages:
            if self._ref_counts[page] < 1:
                raise RuntimeError(f"page {page} is free and cannot be shared")
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference of each page; the last one frees it."""
        for page in pages:
            if self._ref_counts[page] < 1:
                raise RuntimeError(f"page {page} is released but not held")
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Recounts everything: `holders` are the page lists of all that hold pages.

        Raises:
          RuntimeError: a page is lost, held twice as often as counted, or free and held.
        """
        held = Counter(page for pages in holders for page in pages)
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a page is on the free list twice")
        if NULL_PAGE in free or NULL_PAGE in held:
            raise RuntimeError("the null page is in use")
        for page in range(NULL_PAGE + 1, self.num_pages):
            count = self._ref_counts[page]
            if count != held[page]:
                raise RuntimeError(f"page {page} has {held[page]} holders, counted {count}")
            if (count == 0) != (page in free):
                where = "on" if page in free else "off"
                raise RuntimeError(f"page {page} is counted {count} times and {where} the free list")
