"""Other limits for an engine whose programs are compiled already."""

import dataclasses
from typing import Any


def reschedule(engine: Any, *, num_pages: int | None = None, **limits: Any) -> None:
    """Gives an idle engine a new scheduler: fields of `Scheduler`, and at most the pages that there are."""
    from pjengine.page_pool import PagePool

    most = engine.runner.config.num_pages
    assert not engine.has_unfinished_requests()
    assert num_pages is None or num_pages <= most
    for _ in range(2):
        engine.step()  # what is in flight is of the old one
    engine.scheduler = dataclasses.replace(engine.scheduler, pool=PagePool(num_pages or most), **limits)


def settle(engine: Any) -> None:
    """Reads what is in flight of requests that have ended; no page and no row is lost."""
    for _ in range(2):
        assert engine.step() == []
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_requests
    assert scheduler.pool.num_free == scheduler.pool.num_usable
