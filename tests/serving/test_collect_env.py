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
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert cli.pjengine("collect-env", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and "secret" not in out and "of-no-interest" not in out
    variables = report["environment variables"]
    assert variables["OPENAI_API_KEY"] == variables["HF_TOKEN"] == "set, not shown"
    assert variables["CUDA_VISIBLE_DEVICES"] == "7" and "PJENGINE_API_KEY" not in variables
    assert report["versions"]["jax"] == jax.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert "GiB" in report["machine"]["memory"] and "cores" in report["machine"]["CPU"]
    assert len(report["devices, as JAX sees them"]) == jax.device_count()
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
    cards = json.loads(capsys.readouterr().out)["GPUs, as the driver sees them"]
    assert cards == {"none": "nvidia-smi failed: no driver"}
