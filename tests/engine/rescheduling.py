"""Other limits for an engine whose programs are compiled already."""

import dataclasses
from typing import Any


def reschedule(
    engine: Any, *, num_pages: int | None = None, num_window_pages: int | None = None, **limits: Any
) -> None:
    """Gives an idle engine a new scheduler: fields of `Scheduler`, and at most the pages that there are.

    Of these none are spared, so that few make it preempt.
    """
    from pjengine.page_pool import PagePool
    from pjengine.step_log import StepLog

    most = engine.runner.config.num_pages
    assert not engine.has_unfinished_requests()
    assert num_pages is None or num_pages <= most
    group = engine.runner.config.window_group
    assert num_window_pages is None or num_window_pages <= group.num_pages
    if group is not None:
        limits["window_pool"] = PagePool(num_window_pages or group.num_pages)
    for _ in range(2):
        engine.step()  # what is in flight is of the old one
    limits = {"num_spare_pages": 0, **limits}
    engine.scheduler = dataclasses.replace(engine.scheduler, pool=PagePool(num_pages or most), **limits)
    engine.step_log = StepLog(engine.step_log.num_steps)


def settle(engine: Any) -> None:
    """Reads what is in flight of requests that have ended; no page and no row is lost."""
    for _ in range(2):
        assert engine.step() == []
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_requests
    assert all(pool.num_free == pool.num_usable for pool in scheduler.pools)
