"""The benchmark runs, on a CPU too, and prints JSON."""

import json

import pytest

from pjengine.pallas_kernels import bench
from tests.kernels.cases import quick_compile


def test_every_line_is_a_json_object_with_its_tiles_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with quick_compile():
        bench.main(["--interpret", "--shape", "demo"])
    machine, decode, prefill = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine["copy_gb_per_s"] > 0
    assert decode["op"] == "decode" and decode["us"] > 0 and decode["tiles"]["block_kv"] == 64
    assert prefill["op"] == "prefill" and prefill["us"] > 0 and "tflop_per_s" in prefill
