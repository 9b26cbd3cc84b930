"""Progress bars of what takes its time, for callers who ask for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

type Show = Callable[[int, int], None]  # how many are done, of how many


@contextmanager
def progress_bar(description: str, *, unit: str, is_shown: bool) -> Iterator[Show]:
    """Gives what shows how far something is, on standard error; it shows nothing unless `is_shown`."""
    with tqdm(desc=description, unit=unit, dynamic_ncols=True, disable=not is_shown) as bar:

        def show(num_done: int, total: int) -> None:
            bar.total = total
            bar.update(num_done - bar.n)

        yield show


def prompts_bar(use_tqdm: bool | Callable[..., Any], total: int | None) -> Any:
    """A bar that counts prompts; `use_tqdm` shows one, shows none, or makes one."""
    make = tqdm if isinstance(use_tqdm, bool) else use_tqdm
    hidden = {"disable": True} if use_tqdm is False else {}
    return make(total=total, desc="Processed prompts", dynamic_ncols=True, **hidden)
