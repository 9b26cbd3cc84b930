"""`pjengine collect-env`: what a report of a fault should say about the machine. No secrets."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pjengine
from pjengine.config import compile_cache_folder, leave_device_memory, shown_variables

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt"),
    *("jax-triton", "triton", "flax", "numpy", "transformers", "tokenizers", "huggingface-hub"),
    *("safetensors", "sentencepiece", "fastapi", "starlette", "pydantic", "uvicorn"),
)
_ASKED_OF_DRIVER = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
_DRIVER_TIMEOUT_S = 20


def add_collect_env(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "collect-env",
        help="report versions and hardware",
        description="Reports versions, hardware and settings, for a report of a fault. Of keys in the "
        "environment it says only whether they are set.",
    )
    command.set_defaults(run=_collect_env, verbose=False)
    command.add_argument("--json", action="store_true", help="as one JSON object")


def _collect_env(args: argparse.Namespace) -> None:
    report = environment_report()
    if args.json:
        print(json.dumps(report))
        return
    for title, entries in report.items():
        print(f"{title}:")
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name:{width}}  {value}")


def environment_report() -> dict[str, dict[str, str]]:
    """By title, what there is to say, by name."""
    variables = shown_variables()  # before `_devices` sets one
    return {
        "versions": _versions(),
        "machine": _machine(),
        "GPUs, as the driver sees them": _driver(),
        "devices, as JAX sees them": _devices(),
        "environment variables": variables or {"none": "of those that count"},
    }


def _versions() -> dict[str, str]:
    own = {"pjengine": pjengine.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            own[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return own


def _machine() -> dict[str, str]:
    folder = compile_cache_folder(None)
    return {
        "system": platform.platform(),
        "CPU": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "compiled programs": "not kept" if folder is None else _folder(folder),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _folder(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    num_bytes = sum(path.stat().st_size for path in files)
    return f"{len(files)} files, {num_bytes / 2**20:.1f} MiB in {folder}"


def _driver() -> dict[str, str]:
    """What nvidia-smi says."""
    if (command := shutil.which("nvidia-smi")) is None:
        return {"none": "there is no nvidia-smi"}
    query = [command, f"--query-gpu={','.join(_ASKED_OF_DRIVER)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"none": f"nvidia-smi failed: {error}"}
    if done.returncode != 0:
        return {"none": f"nvidia-smi failed: {(done.stderr or done.stdout).strip()}"}
    labels = ("", "memory ", "used ", "compute capability ", "driver ")
    cards = [line.split(", ") for line in done.stdout.splitlines()]
    return {
        str(index): ", ".join(label + value for label, value in zip(labels, card, strict=False))
        for index, card in enumerate(cards)
    }


def _devices() -> dict[str, str]:
    leave_device_memory()  # a server may be using the card
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {"none": " ".join(str(error).split())}
    return {str(device.id): f"{device.device_kind} ({device.platform})" for device in devices}
