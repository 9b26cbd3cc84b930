"""Profiles of steps: what is read from one, and whose steps are in it."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests.engine.test_bench import TINY

PROFILE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 }
    events { metadata_id: 2 duration_ps: 3000000 }
    events { metadata_id: 3 duration_ps: 5000000 }
  }
  lines { name: "XLA Modules" events { metadata_id: 3 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_fusion_12" } }
  event_metadata { key: 2 value { id: 2 name: "loop_fusion_3" } }
  event_metadata { key: 3 value { id: 3 name: "paged_decode" } }
}
planes {
  name: "/host:CPU"
  lines {
    name: "python"
    events { metadata_id: 1 duration_ps: 1000000 }
    events { metadata_id: 1 duration_ps: 1000000 }
    events { metadata_id: 2 duration_ps: 1000000 }
    events { metadata_id: 3 duration_ps: 7000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "cuGraphLaunch" } }
  event_metadata { key: 2 value { id: 2 name: "cuLaunchKernelEx" } }
  event_metadata { key: 3 value { id: 3 name: "paged_decode" } }
}
"""


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    from pjengine import LLM

    with LLM(**TINY, warm_up=False) as llm:
        yield llm


def test_kernels_are_those_on_streams_and_launches_those_of_the_host() -> None:
    from pjengine.step_profile import Trace

    row = Trace.read(jax.profiler.ProfileData.from_text_proto(PROFILE)).per_step(2)
    assert row == {
        "busy_ms": pytest.approx(0.005),
        "num_kernels": 1.5,
        "num_graph_launches": 1.0,
        "num_kernel_launches": 0.5,
        "kernels_us": {"loop_fusion_N": 2.5, "paged_decode": 2.5},
    }


def test_steps_are_timed_and_leave_no_request_behind(tiny: Any) -> None:
    from pjengine.step_profile import profile_decode, profile_mixed

    decode = profile_decode(tiny, 2, prompt_len=5, num_steps=2)
    mixed = profile_mixed(tiny, 20, prompt_len=16, num_steps=2)
    for row in (decode, mixed):
        assert row["step_ms"] > 0 and row["num_steps"] == 2
        assert (row["num_kernels"] > 0) == (jax.default_backend() == "gpu")
    assert not tiny.engine.has_unfinished_requests()
    assert tiny.engine.runner.recompiles_after_warmup == 0


def test_a_workload_is_profiled_to_its_end(tiny: Any) -> None:
    from pjengine.bench import Workload
    from pjengine.step_profile import profile_workload

    row = profile_workload(tiny, Workload([[11] * 5, [12] * 20, [13] * 9], [4, 2, 7]))
    assert (row["kind"], row["num_requests"], row["num_steps"]) == ("workload", 3, 1)
    assert row["step_ms"] > 0 and (row["num_kernels"] > 0) == (jax.default_backend() == "gpu")
    with pytest.raises(ValueError, match="max_model_len"):
        profile_workload(tiny, Workload([[11] * 510], [4]))


def test_kernels_of_two_gpus_are_a_mean_and_launches_a_sum() -> None:
    from pjengine.step_profile import Trace

    other = PROFILE[: PROFILE.index('planes {\n  name: "/host')].replace("GPU:0", "GPU:1")
    row = Trace.read(jax.profiler.ProfileData.from_text_proto(PROFILE + other)).per_step(1)
    assert (row["num_kernels"], row["num_graph_launches"]) == (3.0, 2.0)
    assert row["kernels_us"] == {"loop_fusion_N": 5.0, "paged_decode": 5.0}


def test_what_is_no_single_step_is_refused(tiny: Any) -> None:
    from pjengine.step_profile import profile_decode, profile_mixed

    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        profile_mixed(tiny, 33)
    with pytest.raises(ValueError, match="max_num_seqs"):
        profile_mixed(tiny, 30, prompt_len=10)
    with pytest.raises(ValueError, match="max_num_seqs"):
        profile_decode(tiny, 3)
    with pytest.raises(ValueError, match="max_model_len"):
        profile_decode(tiny, 1, prompt_len=500)
