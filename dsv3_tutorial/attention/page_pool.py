"""Who has which page: numbers only, no tensor. A page is free or taken, and never both."""

import bisect
from collections.abc import Iterable

from dsv3_tutorial.attention.cache import CacheError


class PoolFull(CacheError):
    """There are not enough free pages now; nothing was taken."""


class PagePool:
    """Which of `n_pages` pages are free: the allocator, numbers only."""

    def __init__(self, n_pages: int):
        if n_pages < 1:
            raise CacheError(
                f"A pool of {n_pages} pages holds no token, so no text could ever start. "
                "Give 1 page or more."
            )
        self.n_pages = n_pages
        self._free = list(range(n_pages))  # ascending
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """Reserve n pages: the first n that follow each other, else the n lowest.

        A CPU reads pages that follow each other in place. Costs a walk over the free list. Raises
        PoolFull, and takes nothing, where fewer than n are free.
        """
        if n < 1:
            raise CacheError(f"{n} pages were asked for: a text holds 1 or more. Ask for as many.")
        if n > len(self._free):
            raise PoolFull(
                f"{n} pages are needed and {len(self._free)} of {self.n_pages} are free: a text "
                "that started now could not be finished. Wait until another gives its pages back, "
                "or make the pool larger."
            )
        ends = enumerate(self._free[n - 1 :])
        start = next((i for i, last in ends if last - self._free[i] == n - 1), 0)
        taken = self._free[start : start + n]
        del self._free[start : start + n]
        self._taken.update(taken)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Free these pages. Raises CacheError, and frees none, unless all are taken, once each."""
        pages = list(pages)
        wrong = [page for page in pages if page not in self._taken]
        if wrong or len(set(pages)) < len(pages):
            what = f"page {wrong[0]} is not taken" if wrong else "a page is named twice"
            raise CacheError(
                f"Pages {pages} cannot be given back: {what}. A page that is freed twice is handed "
                "to two texts, which then overwrite each other. Give back what take() gave, once."
            )
        self._taken.difference_update(pages)
        for page in pages:
            bisect.insort(self._free, page)
