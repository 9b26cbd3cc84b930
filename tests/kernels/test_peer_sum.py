"""Sums through the memory of the other GPUs: the kernel's text interpreted, its reference, and itself on GPUs."""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pjengine.pallas_kernels import peer_sum_ptx
from pjengine.pallas_kernels.peer_sum import (
    check_peer_sum_can,
    inbox_bytes,
    peer_sum,
    peer_sum_residual,
)
from pjengine.pallas_kernels.peer_sum_ptx import VALUES, Inbox, Sum
from pjengine.pallas_kernels.skinny_linear import Residual
from pjengine.sharding.mesh import TENSOR, choose_devices, make_mesh
from tests.kernels import ptx
from tests.kernels.ptx_steps import decode

DTYPES: dict[str, Any] = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
MAX_PACKETS, MAX_VECTORS = 8, 24  # of the small kernels below
LAST_EPOCH = 2**32 - 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of few threads, since the interpreter needs 20 microseconds for each instruction of each."""
    set_sizes(monkeypatch, max_blocks=4, packet_threads=MAX_PACKETS // 4, row_threads=5)


@pytest.fixture
def warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole warps, two to a block."""
    set_sizes(monkeypatch, max_blocks=4, packet_threads=64, row_threads=64)


def set_sizes(
    monkeypatch: pytest.MonkeyPatch, *, max_blocks: int, packet_threads: int, row_threads: int
) -> None:
    monkeypatch.setattr(peer_sum_ptx, "MAX_BLOCKS", max_blocks)
    monkeypatch.setattr(peer_sum_ptx, "PACKET_THREADS", packet_threads)
    monkeypatch.setattr(peer_sum_ptx, "ROW_THREADS", row_threads)
    monkeypatch.setattr(peer_sum_ptx, "PACKET_BYTES", max_blocks * packet_threads * 32)
    monkeypatch.setattr(peer_sum_ptx, "ROW_BYTES", 16 * MAX_VECTORS)


class Gpus:
    """Some GPUs with their inboxes, and the sums that they are to run one after the other."""

    def __init__(
        self, num_gpus: int, seed: int, *, epoch: int = 0, wrong: Callable[[str], str] = lambda text: text
    ) -> None:
        self.num_gpus, self.wrong = num_gpus, wrong
        self.numpy_rng, self.memory = np.random.default_rng(seed), ptx.Memory(seed)
        self.launches: list[list[ptx.Launch]] = [[] for _ in range(num_gpus)]
        self.inboxes = [self.memory.allocate(Inbox(num_gpus).num_bytes, 0) for _ in range(num_gpus)]
        for inbox in self.inboxes:
            self.memory.write(inbox, np.full(peer_sum_ptx.MAX_BLOCKS, epoch, np.uint32))
        tables = [np.array([*self.inboxes, own, rank], np.uint64) for rank, own in enumerate(self.inboxes)]
        self.tables = [self.put(table) for table in tables]
        self.wanted: list[tuple[int, np.ndarray]] = []

    def put(self, array: np.ndarray) -> int:
        address = self.memory.allocate(array.nbytes)
        self.memory.write(address, array)
        return address

    def launch(self, sum_: Sum, rank: int, *operands: int) -> None:
        steps = decode(self.wrong(sum_.ptx()))
        self.launches[rank].append(ptx.Launch(steps, sum_.num_blocks, sum_.num_threads, operands))

    def sum(self, num_vectors: int, dtype: str = "bf16") -> None:
        sum_ = Sum(num_gpus=self.num_gpus, num_values=num_vectors * VALUES, dtype=dtype)
        xs = draw(self.numpy_rng, self.num_gpus, sum_.num_values, dtype=dtype)
        for rank, x in enumerate(xs):
            out = self.memory.allocate(x.nbytes)
            self.launch(sum_, rank, self.put(x), self.tables[rank], out)
            self.wanted.append((out, total(xs).astype(x.dtype)))

    def sum_residual(self, num_rows: int, row_size: int) -> list[tuple[int, np.ndarray]]:
        """Returns where each GPU has the squares, and what they are of."""
        sum_ = Sum(num_gpus=self.num_gpus, num_values=num_rows * row_size, dtype="bf16", row_size=row_size)
        assert sum_.in_packets
        xs = draw(self.numpy_rng, self.num_gpus, num_rows, row_size)
        before, norms = draw(self.numpy_rng, num_rows, row_size), draw(self.numpy_rng, 3, row_size)
        norm = int(self.numpy_rng.integers(3))
        rows = (total(xs) + before.astype(np.float32)).astype(before.dtype)
        scaled = (rows.astype(np.float32) * norms[norm].astype(np.float32)).astype(before.dtype)
        squares = []
        for rank, x in enumerate(xs):
            outs = [self.memory.allocate(x.nbytes) for _ in range(2)]
            squares.append((self.memory.allocate(row_size // 256 * num_rows * 4), rows))
            given = [self.put(each) for each in (before, norms, np.array([norm], np.uint32))]
            self.launch(sum_, rank, self.put(x), self.tables[rank], outs[0], *given, outs[1], squares[-1][0])
            self.wanted += zip(outs, (rows, scaled), strict=True)
        return squares

    def run(self) -> None:
        """All sums have the bits that they should, on every GPU, and all counters of blocks are alike."""
        ptx.run(self.memory, self.launches)
        for address, wanted in self.wanted:
            found = self.memory.read(address, wanted.nbytes)
            np.testing.assert_array_equal(found, wanted.view(np.uint32).ravel())
        counters = [self.memory.read(each, 4 * peer_sum_ptx.MAX_BLOCKS) for each in self.inboxes]
        assert len(np.unique(counters)) == 1


def draw(rng: np.random.Generator, *shape: int, dtype: str = "bf16") -> np.ndarray:
    """Numbers far apart, of which the second often takes away the first: each order has another sum."""
    scale = 30 if dtype == "bf16" else 11
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-scale, scale, shape)
    x[1:2] = np.where(rng.random(shape[1:]) < 0.5, -x[:1], x[1:2])
    return x.astype(DTYPES[dtype])


def total(xs: np.ndarray) -> np.ndarray:
    out = xs[0].astype(np.float32)
    for x in xs[1:]:
        out = out + x.astype(np.float32)
    return out


@pytest.mark.parametrize(
    ("num_gpus", "dtype", "seed"),
    [*((2, "bf16", seed) for seed in range(4)), (2, "f16", 4), (3, "bf16", 5), (4, "bf16", 6), (4, "f16", 7)],
)
def test_sums_of_any_sizes_are_of_float32_in_the_order_of_the_gpus(
    num_gpus: int, dtype: str, seed: int, small: None
) -> None:
    gpus, rng = Gpus(num_gpus, seed), random.Random(seed)
    for _ in range(24):
        gpus.sum(rng.choice((rng.randint(1, MAX_PACKETS), rng.randint(1, MAX_VECTORS))), dtype)
    gpus.run()
    assert gpus.memory.read(gpus.inboxes[0], 4).tolist() == [24]


def test_another_order_of_the_gpus_would_be_seen() -> None:
    for dtype in DTYPES:
        xs = draw(np.random.default_rng(0), 4, 8 * VALUES, dtype=dtype)
        assert (total(xs).astype(xs.dtype) != total(xs[::-1]).astype(xs.dtype)).any()


@pytest.mark.parametrize("num_vectors", [MAX_PACKETS, MAX_VECTORS], ids=["packets", "rows"])
def test_sums_go_on_where_epochs_begin_again(num_vectors: int, small: None) -> None:
    gpus = Gpus(2, 0, epoch=LAST_EPOCH - 2)
    for _ in range(6):
        gpus.sum(num_vectors)
    gpus.run()
    assert gpus.memory.read(gpus.inboxes[0], 4).tolist() == [5]  # neither 0, of new inboxes, nor the odd 1


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_a_residual_is_added_before_the_sum_is_rounded_and_its_norm_started(
    num_gpus: int, warps: None
) -> None:
    gpus = Gpus(num_gpus, 1)
    squares = []
    for num_rows, row_size in ((3, 512), (1, 256), (1, 1024)):
        squares += gpus.sum_residual(num_rows, row_size)
        gpus.sum(5)
    gpus.run()
    for address, rows in squares:
        num_rows, row_size = rows.shape
        found = gpus.memory.read(address, row_size // 256 * num_rows * 4).view(np.float32)
        wanted = (rows.astype(np.float64) ** 2).reshape(num_rows, -1, 256).sum(axis=2).T
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-6)


def test_a_sum_of_a_decode_step_is_right_in_kernels_of_real_size() -> None:
    gpus = Gpus(2, 0)
    gpus.sum(4096 // VALUES + 1)
    gpus.run()


WRONG = {
    "packets are not waited for": (r"@again bra WAIT\d;\n", ""),
    **{
        f"a quarter of a packet is not waited for: {i}": (rf"setp.ne.or.u32 again, f{i}, epoch, again;\n", "")
        for i in (1, 2, 3)
    },
    "the first quarter of a packet is not waited for": (
        r"setp.ne.u32 again, f0, epoch;\nsetp.ne.or.u32 again, f1, epoch, again;",
        "setp.ne.u32 again, f1, epoch;",
    ),
    "both sums are in one half": (r"and.b32 half, epoch, 1;", "mov.u32 half, 0;"),
    "flags are not waited for": (r"@again bra WAIT;\n", ""),
    "a flag is sent ahead of its block": (r"bar.sync 0;\n(setp.ge.u32 again, thread)", r"\1"),
    "a flag is no release": (
        r"fence.acq_rel.sys;\nst.release.sys.global.u32",
        "st.relaxed.sys.global.u32",
    ),
    "a flag is not acquired": (r"ld.acquire.sys", "ld.relaxed.sys"),
    "a block does not wait for who has the flag": (r"RECEIVED:\nbar.sync 0;", "RECEIVED:"),
    "who is first counts for the others, too": (r"DONE:\nbar.sync 0;", "DONE:"),
    "only the first block's counter is set": (r"setp.ge.u32 again, index, \d+;", "setp.ge.u32 again, index, 1;"),
    "an odd epoch follows an odd one": (r"@again mov.u32 epoch, 2;", "@again mov.u32 epoch, 1;"),
    "an epoch is that of new inboxes": (r"@again mov.u32 epoch, 2;\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_does_less_is_found(name: str, small: None) -> None:
    changes: list[int] = []

    def wrong(text: str) -> str:
        text, num_changes = re.subn(*WRONG[name], text)
        changes.append(num_changes)
        return text

    def try_all() -> None:
        for seed in range(30):
            gpus = Gpus(2, seed, epoch=LAST_EPOCH if "new" in name else LAST_EPOCH - 3, wrong=wrong)
            for i in range(12):
                gpus.sum(MAX_VECTORS if i % 3 == 1 else MAX_PACKETS)
            gpus.run()

    with pytest.raises((AssertionError, ptx.Deadlock)):
        try_all()
    assert any(changes)
