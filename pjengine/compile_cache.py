"""Compiled programs on disk: a second start neither traces nor compiles them.

An entry holds XLA's executable, its choice of kernels included, as
`jax.experimental.serialize_executable` writes it. To load one is to trust it: it is machine code, and
JAX wraps it in a pickle, so that no reader could make a stranger's entry safe. Therefore the folder and
every entry must belong to this user and be writable by nobody else; others are refused. The digest in
an entry finds damage, not malice. Argument and result trees are not stored: the caller knows them.
Before the executable is a line with the backends that its kernels were traced with, to be reported.
"""

import hashlib
import json
import logging
import os
import platform
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jaxlib
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.tree_util import PyTreeDef

import pjengine
from pjengine.config import xla_flags
from pjengine.pallas_kernels.dispatch import chosen_backends, recall_backends

logger = logging.getLogger(__name__)

MAX_BYTES = 4 * 2**30  # beyond it, the entries that were not used for longest go
DIGEST_BYTES = hashlib.sha256().digest_size

# JAX's own settings that change what a function is traced or compiled to.
JAX_SETTINGS = (
    "jax_debug_infs", "jax_debug_nans", "jax_default_matmul_precision", "jax_default_prng_impl",
    "jax_disable_most_optimizations", "jax_enable_x64", "jax_high_dynamic_range_gumbel",
    "jax_memory_fitting_level", "jax_optimization_level", "jax_threefry_gpu_kernel_lowering",
    "jax_threefry_partitionable", "jax_use_shardy_partitioner",
)  # fmt: skip


def _hash_sources() -> str:
    """Of the whole package but `serving`: a list of the modules that are traced would go stale unnoticed."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for folder in ("", "models", "pallas_kernels", "sharding"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


SOURCES = _hash_sources()  # at import: what runs is what was read then, whatever is edited later


def fingerprint(*facts: object) -> str:
    """One hash of all facts. They must have a `repr` that tells them apart in every process."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()


def environment(devices: Sequence[jax.Device], options: Mapping[str, object]) -> tuple[object, ...]:
    """What shapes any program beside its function and arguments: code, versions, devices, options."""
    device = devices[0]
    return (
        (pjengine.__version__, SOURCES, jax.__version__, jaxlib.version.__version__),
        (device.platform, device.client.platform_version, [(each.device_kind, each.id) for each in devices]),
        (device.client.device_count(), device.client.process_index()),
        _processor() if device.platform == "cpu" else None,
        sorted(options.items()),
        xla_flags(),
        [(name, getattr(jax.config, name, None)) for name in JAX_SETTINGS],
    )


def _processor() -> list[str]:
    """The host's processor and its instructions: XLA compiles CPU programs for just these."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return [platform.machine(), *sorted(kept)]


def open_compile_cache(folder: Path | None) -> "CompileCache | None":
    """The cache in `folder`, created for this user alone; None, and a log line, if it cannot serve."""
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder.stat(), folder)
        cache = CompileCache(folder)
        cache.autotune_folder.mkdir(mode=0o700, exist_ok=True)
        return cache
    except OSError as error:
        logger.warning("no compile cache: %s", error)
        return None


def _check_owner(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError if anybody but this user could have written what is there."""
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} must belong to user {os.geteuid()} and be writable by nobody else; it belongs to user "
            f"{status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}. Fix that, or choose another "
            "compile_cache_dir"
        )


class CompileCache:
    """Programs by key, in a folder that several processes may share. It never fails: at worst it misses."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    @property
    def autotune_folder(self) -> Path:
        """For XLA's own notes, by which several cold compilations choose the same kernels."""
        return self.folder / "autotune"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.program"

    def load(
        self, key: str, in_tree: PyTreeDef, out_tree: PyTreeDef, devices: Sequence[jax.Device]
    ) -> jax.stages.Compiled | None:
        """The program stored under `key`, or None. Its donations and shardings are those it was made with."""
        path, start = self.path(key), time.perf_counter()
        try:
            payload = self._read(path)
            backends, _, executable = payload.partition(b"\n")
            program = deserialize_and_load(
                executable, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
            recall_backends(json.loads(backends))
            os.utime(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # JAX, XLA and pickle do not say what they raise on a bad payload
            logger.warning("compile cache: %s cannot be used: %r", path, error)
            return None
        logger.debug("loaded %s bytes=%d seconds=%.2f", path, len(payload), time.perf_counter() - start)
        return program

    @staticmethod
    def _read(path: Path) -> bytes:
        """Raises OSError if the entry is absent or a stranger's, ValueError if it is damaged."""
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            _check_owner(os.fstat(file.fileno()), path)
            content = file.read()
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its digest does not match; it is damaged")
        return payload

    def store(self, key: str, program: jax.stages.Compiled, in_tree: PyTreeDef, out_tree: PyTreeDef) -> None:
        """Keeps a program, in place of any that is there.

        Raises:
          RuntimeError: the program's trees are not those that `load` would be given.
        """
        path = self.path(key)
        try:
            executable, *trees = serialize(program)
            if trees != [in_tree, out_tree]:
                raise RuntimeError(
                    f"wanted a program of {in_tree} -> {out_tree}, got {trees[0]} -> {trees[1]}"
                )
            payload = json.dumps(chosen_backends()).encode() + b"\n" + executable
            self._write(path, hashlib.sha256(payload).digest() + payload)
            self._evict()
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            logger.warning("compile cache: %s was not stored: %r", path, error)

    def _write(self, path: Path, content: bytes) -> None:
        """All or nothing: a reader finds the old entry or the new one."""
        handle, temporary = tempfile.mkstemp(dir=self.folder)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _evict(self) -> None:
        """Removes what was not used for longest, until the rest fits. Abandoned temporary files age too."""
        found = []
        for path in self.folder.rglob("*"):
            try:
                status = path.lstat()
            except FileNotFoundError:  # removed by another process
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
