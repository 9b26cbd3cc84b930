"""`pjengine collect-env`: enough for a report of a fault, and nothing that must not be in one."""

import json
import platform
from pathlib import Path

import pytest

import tests.serving.test_cli as cli


def test_versions_and_hardware_are_reported_and_secrets_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    monkeypatch.delenv("PJENGINE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    monkeypatch.setenv("SOMETHING_ELSE", "of-no-interest")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert cli.pjengine("collect-env", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and "secret" not in out and "of-no-interest" not in out
    variables = report["environment variables"]
    assert variables["OPENAI_API_KEY"] == variables["HF_TOKEN"] == "set, not shown"
    assert variables["CUDA_VISIBLE_DEVICES"] == "7" and variables["NCCL_NVLS_ENABLE"] == "0"
    assert "PJENGINE_API_KEY" not in variables
    assert report["versions"]["jax"] == jax.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert "GiB" in report["machine"]["memory"] and "cores" in report["machine"]["CPU"]
    assert len(report["devices, as JAX sees them"]) == jax.device_count()
    num_devices = jax.device_count()
    this_one = f"0, with {num_devices} of {num_devices} devices"
    assert report["processes, as JAX sees them"] == {"processes": "1", "this one": this_one}
    assert cli.pjengine("collect-env") == 0
    text = capsys.readouterr().out
    assert all(f"{title}:\n" in text for title in report) and "secret" not in text


def test_the_driver_tells_of_its_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    card = "NVIDIA H200, 143771 MiB, 5 MiB, 9.0, 580.1"
    tool.write_text(f"#!/bin/sh\necho {card}\necho {card}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert cli.pjengine("collect-env", "--json") == 0
    cards = json.loads(capsys.readouterr().out)["GPUs, as the driver sees them"]
    first = "NVIDIA H200, memory 143771 MiB, used 5 MiB, compute capability 9.0, driver 580.1"
    assert cards["0"] == first and len(cards) == 2
    tool.write_text("#!/bin/sh\necho no driver >&2; exit 9\n")
    assert cli.pjengine("collect-env", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for title in ("GPUs, as the driver sees them", "links, as the driver sees them"):
        assert report[title] == {"none": "nvidia-smi failed: no driver"}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert cli.pjengine("collect-env", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["links, as the driver sees them"] == {"none": "there is no nvidia-smi"}


# As drivers print it: underlined, with a blank cell that stands in no column.
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-51,104-155\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t52-103\t1\t\tN/A
NIC0\tPIX\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def links_said(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> dict[str, str]:
    """What the report makes of what `nvidia-smi topo -m` prints."""
    tool, answer = folder / "nvidia-smi", folder / "topology"
    answer.write_text(text)
    tool.write_text(f'#!/bin/sh\n[ "$*" = "topo -m" ] && cat {answer}\nexit 0\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    assert cli.pjengine("collect-env", "--json") == 0
    links: dict[str, str] = json.loads(capsys.readouterr().out)["links, as the driver sees them"]
    return links


def test_the_driver_tells_how_cards_are_linked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert links_said(TOPOLOGY, capsys, monkeypatch, tmp_path) == {
        "GPU0": "NV18 to GPU1, PIX to NIC0, CPU Affinity 0-51,104-155, NUMA Affinity 0",
        "GPU1": "NV18 to GPU0, SYS to NIC0, CPU Affinity 52-103, NUMA Affinity 1",
        "NV#": "# NVLinks",
        "PIX": "one PCIe bridge",
        "SYS": "PCIe and CPUs of several NUMA nodes",
    }


@pytest.mark.parametrize("text", ["GPU0 reaches\tGPU1\n\nsomehow\n", "\tGPU0\nGPU0\n", "\tGPU0\tGPU1\n"])
def test_links_that_are_told_in_another_form_are_printed_as_they_are(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    links = links_said(text, capsys, monkeypatch, tmp_path)
    assert list(links.values()) == [line.expandtabs() for line in text.splitlines() if line]
