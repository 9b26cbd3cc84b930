"""Programs are made in the order of need, beside the caller; failures and the end are clean."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 30.0  # of a wait that only a fault lets run out


class GatedMaker:
    """Makes a program for a layout: the layout's own name. Waits at gates that the test opens."""

    def __init__(self, cached: set[str] | None = None) -> None:
        self.cached = cached or set()
        self.events: list[tuple[str, str]] = []
        self.gates = {"lower": threading.Semaphore(0), "compile": threading.Semaphore(0)}
        self.begun = threading.Semaphore(0)  # released as a trace begins
        self.broken: dict[str, BaseException] = {}

    def open_all(self) -> None:
        for gate in self.gates.values():
            gate.release(100)

    def load(self, layout: str) -> str | None:
        self.events.append(("load", layout))
        return layout if layout in self.cached else None

    def lower(self, layout: str) -> str:
        self.begun.release()
        assert self.gates["lower"].acquire(timeout=TIMEOUT_S)
        self.events.append(("lower", layout))
        if layout in self.broken:
            raise self.broken.pop(layout)
        return layout

    def compile(self, layout: str, lowered: str) -> str:
        assert layout == lowered
        assert self.gates["compile"].acquire(timeout=TIMEOUT_S)
        self.events.append(("compile", layout))
        return layout

    def lowered(self) -> list[str]:
        return [layout for stage, layout in self.events if stage == "lower"]


@pytest.fixture
def maker() -> GatedMaker:
    return GatedMaker()


@pytest.fixture
def programs(maker: GatedMaker) -> Iterator[Any]:
    from pjengine.programs import Programs

    made: Any = Programs(maker, num_threads=3)
    yield made
    maker.open_all()
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "pjengine-programs"]


def test_programs_are_traced_in_order_one_at_a_time(programs: Any, maker: GatedMaker) -> None:
    programs.start(list("abcd"))
    maker.gates["lower"].release(4)
    maker.gates["compile"].release(4)
    programs.wait(list("abcd"))
    assert programs.ready == {name: name for name in "abcd"}
    assert maker.lowered() == list("abcd")


def test_compiling_does_not_hold_up_tracing(programs: Any, maker: GatedMaker) -> None:
    programs.start(list("abc"))
    maker.gates["lower"].release(2)
    for _ in range(3):
        assert maker.begun.acquire(timeout=TIMEOUT_S), "the third trace must begin while two compile"
    assert not programs.ready


def test_what_is_waited_for_overtakes_the_rest(programs: Any, maker: GatedMaker) -> None:
    programs.start(list("abcd"))
    assert maker.begun.acquire(timeout=TIMEOUT_S)  # the trace of a is under way
    waiter = threading.Thread(target=programs.wait, args=[["d"]])
    waiter.start()
    with programs._changed:
        assert programs._changed.wait_for(lambda: programs._tasks[0].layout == "d", TIMEOUT_S)
    maker.gates["lower"].release(2)
    maker.gates["compile"].release(2)
    waiter.join(TIMEOUT_S)
    assert maker.lowered()[:2] == ["a", "d"]
    assert "d" in programs.ready and "b" not in programs.ready


def test_what_the_cache_holds_is_not_traced(programs: Any, maker: GatedMaker) -> None:
    maker.cached = {"a", "c"}
    maker.open_all()
    programs.start(list("abc"))
    programs.wait(list("abc"))
    assert maker.lowered() == ["b"]


def test_what_is_dropped_while_it_is_made_never_becomes_ready(programs: Any, maker: GatedMaker) -> None:
    programs.start(["a", "b"])
    assert maker.begun.acquire(timeout=TIMEOUT_S)  # the trace of a is under way
    programs.drop("a")
    maker.open_all()
    programs.wait(["b"])
    programs.drop("b")
    assert not programs.ready and not programs.is_under_way(["a", "b"])
    programs.wait(["a", "b"])  # they are made anew
    assert programs.ready.keys() == {"a", "b"}


def test_a_failure_is_told_to_who_waits_for_it_and_is_tried_again(
    programs: Any, maker: GatedMaker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.broken["b"] = MemoryError("b does not fit")
    maker.open_all()
    programs.start(list("ba"))
    programs.wait(["a"])  # is not told
    with programs._changed:
        assert programs._changed.wait_for(lambda: "b" in programs.failed, TIMEOUT_S)
    assert "the program for b could not be made" in caplog.text
    maker.broken["b"] = MemoryError("b still does not fit")
    with pytest.raises(MemoryError, match="b still does not fit"):
        programs.wait(list("ab"))
    assert not programs.failed
    programs.wait(list("ab"))
    assert maker.lowered().count("b") == 3


def test_close_ends_what_is_under_way_and_begins_nothing_more(programs: Any, maker: GatedMaker) -> None:
    programs.start(list("abc"))
    assert maker.begun.acquire(timeout=TIMEOUT_S)
    refused: list[BaseException] = []

    def wait() -> None:
        try:
            programs.wait(["c"])
        except RuntimeError as error:
            refused.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    closer = threading.Thread(target=programs.close)
    closer.start()
    waiter.join(TIMEOUT_S)  # it does not wait for the trace
    assert "closed" in str(refused[0])
    maker.open_all()
    closer.join(TIMEOUT_S)
    assert maker.lowered() in (["a"], ["c"]) and not programs.ready
    assert ("compile", "a") not in maker.events


def test_the_interpreter_exits_cleanly_while_programs_are_made() -> None:
    """Without close: the stage under way ends, nothing else begins, nothing is printed."""
    code = """
import threading
from pjengine.programs import Programs
class Maker:
    def load(self, layout): return None
    def lower(self, layout):
        begun.set()
        threading.main_thread().join()  # the interpreter is on its way out
        print("lowered", layout)
    def compile(self, layout, lowered): print("compiled", layout)
begun = threading.Event()
programs = Programs(Maker(), 4)
programs.start(["a", "b", "c"])
begun.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("lowered a\n", "")
