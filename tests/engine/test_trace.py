"""A trace that Perfetto opens: the host's phases by step, and what the device ran."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest


def test_a_trace_has_the_phases_of_each_step_and_the_work_of_the_device(demo: Any, tmp_path: Path) -> None:
    from pjengine import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=4)
    demo.generate("import os", greedy, use_tqdm=False)
    with demo.trace(tmp_path / "new") as path:
        demo.generate("import sys", greedy, use_tqdm=False)
    numbers = [step.number for step in demo.explain_schedule().steps]
    assert path == tmp_path / "new" / "perfetto_trace.json.gz"
    told = json.loads(gzip.decompress(path.read_bytes()))
    assert "metadata" not in told  # which Perfetto does not take
    events = [event for event in told["traceEvents"] if event.get("ph") == "X"]
    for phase in ("schedule", "launch", "read", "output"):
        assert [int(own["args"]["step"]) for own in named(events, phase)][: len(numbers)] == numbers, phase
    launches, packs = named(events, "launch"), named(events, "pack")
    for launch, pack in zip(launches, packs, strict=False):
        assert launch["ts"] <= pack["ts"] <= pack["ts"] + pack["dur"] <= launch["ts"] + launch["dur"]
    assert len(packs) == len(named(events, "dispatch")) == len(numbers)
    others = {own["tid"] for own in events} - {launches[0]["tid"]}
    assert any("fusion" in own["name"] for own in events if own["tid"] in others)  # XLA's own threads


def named(events: list[Any], name: str) -> list[Any]:
    return sorted((own for own in events if own["name"] == name), key=lambda own: own["ts"])


def test_one_trace_at_a_time(demo: Any, tmp_path: Path) -> None:
    with demo.trace(tmp_path), pytest.raises(RuntimeError, match="Only one profile"), demo.trace(tmp_path):
        pass
