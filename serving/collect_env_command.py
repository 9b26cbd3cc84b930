"""`pjengine collect-env`: what a report of a fault should say about the machine. No secrets."""

import argparse
import json
import os
import platform
import re
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
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13"),  # what sums over several GPUs
)
_ASKED_OF_DRIVER = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
_DRIVER_TIMEOUT_S = 20
_LINKED = re.compile(r"(GPU|NIC)\d+")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
# What nvidia-smi calls the ways between two devices.
_WAYS = {
    "NV#": "# NVLinks",
    "PIX": "one PCIe bridge",
    "PXB": "PCIe bridges",
    "PHB": "PCIe and a CPU's host bridge",
    "NODE": "PCIe and the CPUs of a NUMA node",
    "SYS": "PCIe and CPUs of several NUMA nodes",
}


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
        "GPUs, as the driver sees them": _cards(),
        "links, as the driver sees them": _links(),
        "devices, as JAX sees them": _devices(),
        "processes, as JAX sees them": _processes(),
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


def _cards() -> dict[str, str]:
    """Each GPU's name, memory and driver."""
    said = _nvidia_smi(f"--query-gpu={','.join(_ASKED_OF_DRIVER)}", "--format=csv,noheader")
    if not isinstance(said, str):
        return said
    labels = ("", "memory ", "used ", "compute capability ", "driver ")
    cards = [line.split(", ") for line in said.splitlines()]
    return {
        str(index): ", ".join(label + value for label, value in zip(labels, card, strict=False))
        for index, card in enumerate(cards)
    }


def _links() -> dict[str, str]:
    """How each GPU reaches the others and the network, and the CPUs beside it."""
    said = _nvidia_smi("topo", "-m")
    if not isinstance(said, str):
        return said
    lines = [_STYLE.sub("", line) for line in said.splitlines() if line.strip()]
    links = _read_links(lines)
    if links is None:  # printed in a form of another day
        return {f"line {number}": line.expandtabs().rstrip() for number, line in enumerate(lines, 1)}
    return links


def _read_links(lines: list[str]) -> dict[str, str] | None:
    """The table of `nvidia-smi topo -m`, by GPU, and what its ways mean; None if this is another table."""
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    heads = [row for row in rows if len(row) > 1 and not row[0] and _LINKED.fullmatch(row[1])]
    if len(heads) != 1:
        return None
    [head] = heads
    links: dict[str, str] = {}
    found: set[str] = set()
    for name, *cells in rows:
        if not name.startswith("GPU") or not _LINKED.fullmatch(name) or len(cells) < len(head) - 1:
            continue
        by_column = dict(zip(head[1:], cells, strict=False))
        ways = {to: way for to, way in by_column.items() if _LINKED.fullmatch(to) and to != name}
        found.update(re.sub(r"\d+", "#", way) for way in ways.values())
        own = [f"{way} to {to}" for to, way in ways.items()]
        own += [f"{way} {by_column[way]}" for way in ("CPU Affinity", "NUMA Affinity") if by_column.get(way)]
        links[name] = ", ".join(own)
    meanings = {way: meaning for way, meaning in _WAYS.items() if way in found}
    return links | meanings if links else None


def _nvidia_smi(*arguments: str) -> str | dict[str, str]:
    """What it says; an entry of the report where it says nothing."""
    if (command := shutil.which("nvidia-smi")) is None:
        return {"none": "there is no nvidia-smi"}
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"none": f"nvidia-smi failed: {error}"}
    if done.returncode != 0:
        return {"none": f"nvidia-smi failed: {(done.stderr or done.stdout).strip()}"}
    return done.stdout


def _devices() -> dict[str, str]:
    leave_device_memory()  # a server may be using the card
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {"none": " ".join(str(error).split())}
    return {str(device.id): f"{device.device_kind} ({device.platform})" for device in devices}


def _processes() -> dict[str, str]:
    """Of the JAX cluster that this process is part of; one, where it is alone."""
    leave_device_memory()
    import jax

    try:
        num_own, num_all = jax.local_device_count(), jax.device_count()
    except RuntimeError as error:
        return {"none": " ".join(str(error).split())}
    return {
        "processes": str(jax.process_count()),
        "this one": f"{jax.process_index()}, with {num_own} of {num_all} devices",
    }
