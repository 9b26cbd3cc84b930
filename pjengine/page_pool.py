"""The pages of KV cache: free, held and by how many, and what they contain. Plain Python."""

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

NULL_PAGE = 0  # padding points here; never handed out

FREE, CACHED, HELD = range(3)  # the state of a page

type PageHash = bytes


def page_hashes(
    token_ids: Sequence[int], page_size: int, salt: str, before: PageHash | None = None
) -> list[PageHash]:
    """A name for the content of each full page: its own tokens and all before them, under `salt`.

    Two sequences share a name exactly where they agree up to the end of that page (SHA-256).
    `before` is the name of the page before `token_ids`; None: they begin the sequence.
    """
    name = hashlib.sha256(salt.encode()).digest() if before is None else before
    names = []
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        name = hashlib.sha256(name + array("q", token_ids[start : start + page_size]).tobytes()).digest()
        names.append(name)
    return names


class PagePool:
    """Reference counts, free pages, and the prefix cache.

    A page is in exactly one state: held (count > 0), free without content, or free with content that
    a later request may want (cached). Pages without content go first; then the cached ones, least
    recently freed first. Registered pages keep their name while they are held, too.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (one is the null page), got {num_pages}")
        self.num_pages = num_pages
        # Of each page, to be looked at by any thread: FREE, HELD, or CACHED; the null page's is FREE.
        self.states = bytearray(num_pages)
        self._ref_counts = [0] * num_pages
        self._free = deque(range(NULL_PAGE + 1, num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[PageHash, int] = {}
        self._hash_of: dict[int, PageHash] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated, cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_usable(self) -> int:
        """Pages that requests can hold when all are free."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference; what they contained is forgotten.

        Raises:
          RuntimeError: fewer are free; the scheduler must ask `num_free` first.
        """
        if count > self.num_free:
            raise RuntimeError(f"{count} pages asked for, {self.num_free} free")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._ref_counts[page] = 1
            self.states[page] = HELD
            pages.append(page)
        return pages

    def match(self, hashes: Iterable[PageHash]) -> list[int]:
        """The pages that hold the longest known beginning. Takes no references: `retain` them at once."""
        pages = []
        for name in hashes:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_cached(self, pages: Iterable[int]) -> int:
        """How many of `pages` are free now and would not be once they are retained."""
        return sum(page in self._cached for page in pages)

    def retain(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are held or cached."""
        for page in pages:
            if self._ref_counts[page] < 1 and page not in self._cached:
                raise RuntimeError(f"page {page} is free and cannot be shared")
            self._cached.pop(page, None)
            self._ref_counts[page] += 1
            self.states[page] = HELD

    def register(self, page: int, name: PageHash) -> None:
        """Names the content of a held page, once the step that writes it has been launched.

        A page whose content another page has already stays unnamed.
        """
        if self._ref_counts[page] < 1:
            raise RuntimeError(f"page {page} is registered but not held")
        if name not in self._page_of and page not in self._hash_of:
            self._page_of[name] = page
            self._hash_of[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference of each page; the last frees it. A sequence's first pages stay longest."""
        for page in reversed(pages):
            if self._ref_counts[page] < 1:
                raise RuntimeError(f"page {page} is released but not held")
            self._ref_counts[page] -= 1
            if self._ref_counts[page] > 0:
                continue
            if page in self._hash_of:
                self._cached[page] = None
                self.states[page] = CACHED
            else:
                self._free.append(page)
                self.states[page] = FREE

    def forget(self) -> None:
        """Empties the prefix cache; held pages stay held."""
        self._free.extend(self._cached)
        for page in self._cached:
            self.states[page] = FREE
        self._cached.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Recounts everything: `holders` are the page lists of all that hold pages.

        Raises:
          RuntimeError: a page is lost, held more or less often than counted, or free and held.
        """
        held = Counter(page for pages in holders for page in pages)
        free = Counter([*self._free, *self._cached])
        if NULL_PAGE in free or NULL_PAGE in held:
            raise RuntimeError("the null page is in use")
        for page in range(NULL_PAGE + 1, self.num_pages):
            count = self._ref_counts[page]
            if count != held[page]:
                raise RuntimeError(f"page {page} has {held[page]} holders, counted {count}")
            if free[page] != (count == 0):
                raise RuntimeError(f"page {page} has {count} holders and is {free[page]} times free")
        states = bytearray([HELD if count else FREE for count in self._ref_counts])
        for page in self._cached:
            states[page] = CACHED
        if states != self.states:
            wrong = [page for page in range(self.num_pages) if states[page] != self.states[page]]
            raise RuntimeError(f"pages {wrong} are shown in a state that they are not in")
        if {page: name for name, page in self._page_of.items()} != self._hash_of:
            raise RuntimeError("names and pages of the prefix cache differ")
        if not set(self._cached) <= set(self._hash_of):
            raise RuntimeError("a cached page has no name")
