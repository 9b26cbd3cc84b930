"""Sums through the memory of other GPUs: the kernel's text interpreted, the reference, the kernel on GPUs."""

import functools
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pjengine.pallas_kernels import peer_sum_ptx
from pjengine.pallas_kernels.dispatch import chosen_backends
from pjengine.pallas_kernels.peer_sum import (
    check_peer_sum_can,
    inbox_bytes,
    peer_sum,
    peer_sum_norm,
    peer_sum_residual,
)
from pjengine.pallas_kernels.peer_sum_ptx import LANES, VALUES, Inbox, Sum
from pjengine.pallas_kernels.skinny_linear import Residual
from pjengine.sharding.mesh import TENSOR, choose_devices, make_mesh
from tests.kernels import ptx
from tests.kernels.cases import cuda_mesh, cuda_target
from tests.kernels.ptx_steps import decode, shared_bytes

DTYPES: dict[str, Any] = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
MAX_PACKETS, MAX_VECTORS = 8, 24  # of the small kernels below
LAST_EPOCH = 2**32 - 1
EPS = 1e-5


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
    num_warps = -(-max_blocks * packet_threads // LANES)
    monkeypatch.setattr(peer_sum_ptx, "PACKET_BYTES", num_warps * LANES * 32)
    monkeypatch.setattr(peer_sum_ptx, "ROW_BYTES", 16 * MAX_VECTORS)


class Gpus:
    """Some GPUs with their inboxes, and the sums that they are to run one after the other."""

    def __init__(
        self, num_gpus: int, seed: int, *, epoch: int = 0, wrong: Callable[[str], str] = lambda text: text
    ) -> None:
        self.num_gpus, self.epoch, self.wrong = num_gpus, epoch, wrong
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
        if rank == 0:  # Behind the last epoch comes neither 0, as in new inboxes, nor another odd one.
            self.epoch = 2 if self.epoch == LAST_EPOCH else self.epoch + 1
        text = self.wrong(sum_.ptx())
        sizes = sum_.num_blocks, sum_.num_threads
        self.launches[rank].append(ptx.Launch(decode(text), *sizes, operands, shared_bytes(text)))

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

    def sum_norm(self, num_rows: int, row_size: int) -> list[tuple[int, np.ndarray]]:
        """Returns where each GPU has the norm, and what it is without its rounding."""
        sizes = {"num_values": num_rows * row_size, "row_size": row_size}
        sum_ = Sum(num_gpus=self.num_gpus, dtype="bf16", eps=EPS, **sizes)
        xs = draw(self.numpy_rng, self.num_gpus, num_rows, row_size)
        before, norms = draw(self.numpy_rng, num_rows, row_size), draw(self.numpy_rng, 3, row_size)
        norm = int(self.numpy_rng.integers(3))
        rows = (total(xs) + before.astype(np.float32)).astype(before.dtype)
        normed = root_mean_square_norm(rows, norms[norm])
        outs = []
        for rank, x in enumerate(xs):
            self.wanted.append((self.memory.allocate(x.nbytes), rows))
            outs.append((self.memory.allocate(x.nbytes), normed))
            given = [self.put(each) for each in (before, norms, np.array([norm], np.uint32))]
            self.launch(sum_, rank, self.put(x), self.tables[rank], self.wanted[-1][0], *given, outs[-1][0])
        return outs

    def run(self) -> None:
        """All sums have the bits that they should, on every GPU, and all counters of blocks are alike."""
        ptx.run(self.memory, self.launches)
        for address, wanted in self.wanted:
            found = self.memory.read(address, wanted.nbytes)
            np.testing.assert_array_equal(found, wanted.view(np.uint32).ravel())
        counters = [self.memory.read(each, 4 * peer_sum_ptx.MAX_BLOCKS) for each in self.inboxes]
        assert np.unique(counters).tolist() == [self.epoch]


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


def root_mean_square_norm(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    wide = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPS)
    return wide * weight.astype(np.float64)


@pytest.mark.parametrize(
    ("num_gpus", "dtype", "seed"),
    [
        (1, "bf16", 0), *((2, "bf16", seed) for seed in range(4)), (2, "f16", 4), (3, "bf16", 5),
        (4, "bf16", 6), (4, "f16", 7),
    ],
)  # fmt: skip
def test_sums_of_any_sizes_are_of_float32_in_the_order_of_the_gpus(
    num_gpus: int, dtype: str, seed: int, small: None
) -> None:
    gpus, rng = Gpus(num_gpus, seed, epoch=LAST_EPOCH - 9 if seed % 2 else 0), random.Random(seed)
    for _ in range(24):
        gpus.sum(rng.choice((rng.randint(1, MAX_PACKETS), rng.randint(1, MAX_VECTORS))), dtype)
    gpus.run()


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
    assert gpus.epoch == 5


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_a_residual_is_added_before_the_sum_is_rounded_and_its_norm_started(
    num_gpus: int, warps: None
) -> None:
    gpus = Gpus(num_gpus, 1)
    squares = []
    for num_rows, row_size in ((2, 512), (1, 256)):
        squares += gpus.sum_residual(num_rows, row_size)
        gpus.sum(5)
    gpus.run()
    for address, rows in squares:
        num_rows, row_size = rows.shape
        found = gpus.memory.read(address, row_size // 256 * num_rows * 4).view(np.float32)
        wanted = (rows.astype(np.float64) ** 2).reshape(num_rows, -1, 256).sum(axis=2).T
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-6)


# Of two blocks at most: packets, then rows, of which the last block has fewer or as many.
@pytest.mark.parametrize(("num_gpus", "num_rows"), [(2, 2), (2, 5), (3, 4)])
def test_a_norm_is_finished_by_the_block_that_has_the_row(
    num_gpus: int, num_rows: int, warps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_sum_ptx, "ROW_BYTES", 16 * 128 * 5)
    gpus, norms = Gpus(num_gpus, num_rows), []
    for _ in range(2 if num_rows == 2 else 1):
        norms += gpus.sum_norm(num_rows, 1024)
        gpus.sum(7)
    gpus.run()
    for address, wanted in norms:
        found = gpus.memory.read(address, 2 * wanted.size).view(DTYPES["bf16"]).reshape(wanted.shape)
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=2**-8 + 1e-6, atol=1e-30)


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
    "a flag is no release": (r"st.release.sys", "st.relaxed.sys"),
    "a flag is not acquired": (r"ld.acquire.sys", "ld.relaxed.sys"),
    "a block does not wait for who has the flag": (r"RECEIVED:\nbar.sync 0;", "RECEIVED:"),
    "who is first counts for the others, too": (r"DONE:\nbar.sync 0;", "DONE:"),
    "only the first block's counter is set": (
        r"setp.ge.u32 again, index, \d+;",
        "setp.ge.u32 again, index, 1;",
    ),
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


@pytest.mark.parametrize("num_vectors", [MAX_PACKETS, MAX_VECTORS])
def test_a_gpu_that_does_not_come_is_waited_for_some_time(
    num_vectors: int, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_sum_ptx, "MAX_POLLS", 20)
    # Under another name the interpreter does not know that the count is none that matters.
    gpus = Gpus(2, 0, wrong=lambda text: text.replace("polls", "rounds"))
    gpus.sum(num_vectors)
    gpus.launches[1].clear()
    with pytest.raises(ptx.Trap):
        gpus.run()


ADD = "{\n.reg .b32 x0;\n%s\n}"


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("mul.hi.u32 x0, 1, 2;", NotImplementedError, "mul.hi"),
        ("bar.sync 1;", NotImplementedError, "bar.sync 1"),
        ("ld.global.u32 x0, [$0+8];", IndexError, "outside"),
        ("ld.global.u32 x0, [$0+2];", IndexError, "misaligned"),
        ("ld.global.u32 x0, [$0+4];", AssertionError, "read before it was written"),
        ("mov.u32 x0, x1;", ValueError, "x1"),
        ("HERE:\nbra HERE;", ptx.Deadlock, "1 blocks wait"),
        ("setp.eq.u32 x0, %tid.x, 0;\n@x0 bar.sync 0;", ptx.Deadlock, "1 blocks wait"),
        ("ld.global.u32 x0, [$0];\nst.global.u32 [$0], x0;\nHERE:\nld.global.u32 x0, [$0];\nbra HERE;",
         AssertionError, "what a plain load gives"),
    ],
)  # fmt: skip
def test_the_interpreter_refuses(line: str, error: type[Exception], message: str) -> None:
    memory = ptx.Memory(0)
    address = memory.allocate(8)
    memory.write(address, np.zeros(1, np.uint32))
    with pytest.raises(error, match=message):
        ptx.run(memory, [[ptx.Launch(decode(ADD % line), 1, 2, [address])]])


@pytest.mark.parametrize("num_gpus", [2, 3, 4])
def test_sections_of_an_inbox_hold_the_largest_sums_and_touch_none_beside(num_gpus: int) -> None:
    inbox, blocks = Inbox(num_gpus), peer_sum_ptx.MAX_BLOCKS
    ends = [
        4 * blocks,
        inbox.flags + 2 * num_gpus * 4 * blocks,
        inbox.packets + 2 * num_gpus * peer_sum_ptx.PACKET_BYTES,
        inbox.rows + 2 * num_gpus * inbox.row_bytes,
    ]
    assert ends == [inbox.flags, inbox.packets, inbox.rows, inbox_bytes(num_gpus)]
    assert not any(each % 32 for each in ends)
    packets = Sum(num_gpus=num_gpus, num_values=VALUES * blocks * peer_sum_ptx.PACKET_THREADS, dtype="bf16")
    assert packets.in_packets and packets.num_vectors * 32 == peer_sum_ptx.PACKET_BYTES
    rows = Sum(num_gpus=num_gpus, num_values=packets.num_values + VALUES, dtype="bf16")
    assert not rows.in_packets and max(packets.num_blocks, rows.num_blocks) <= blocks


BACKENDS = ["reference", pytest.param("mosaic", marks=pytest.mark.gpu)]
# Packets of one block and of all, rows that fill the last block's share and rows that do not.
SIZES = [8, 4096, 33 * 4096, 2**18, 2**18 + 8, 3 * 2**18 + 104, 128 * 4096]


class Devices:
    """Some devices with their inboxes."""

    def __init__(self, num_devices: int) -> None:
        if len(jax.devices()) < num_devices:
            pytest.skip(f"needs {num_devices} GPUs, found {len(jax.devices())}")
        devices = choose_devices(num_devices)
        self.mesh = make_mesh(devices)
        words = np.zeros(inbox_bytes(num_devices) // 4, np.uint32)
        self.inboxes = jax.block_until_ready([jax.device_put(words, device) for device in devices])
        addresses = [each.unsafe_buffer_pointer() for each in self.inboxes]
        table = np.array([[*addresses, own, rank] for rank, own in enumerate(addresses)], np.uint64)
        self.table = self.divide(table.view(np.uint32).reshape(num_devices, num_devices + 2, 2))

    def divide(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(TENSOR)))

    def jit(self, function: Callable[..., Any], *, num_whole: int = 0) -> Any:
        """The function of a device's part of an array, its table, and arrays that all have; all results."""
        own = PartitionSpec(TENSOR)

        def run(x: jax.Array, table: jax.Array, *whole: Any) -> Any:
            return jax.tree.map(lambda out: out[None], function(x[0], table[0], *whole))

        specs = (own, own, *[PartitionSpec()] * num_whole)
        return jax.jit(jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=own, check_vma=False))


def assert_sums(found: jax.Array, xs: np.ndarray, backend: str) -> None:
    """Every device has the same; the kernel's has the bits of float32, the collective rounds as it likes."""
    wanted = total(xs)
    for out in np.asarray(found):
        if backend == "mosaic":
            np.testing.assert_array_equal(out.view(np.uint16), wanted.astype(xs.dtype).view(np.uint16))
        else:
            np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=0.02, atol=0.02)
            assert (out == np.asarray(found)[0]).all()


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_one_program_are_psum(backend: str, num_devices: int) -> None:
    devices, rng = Devices(num_devices), np.random.default_rng(0)
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=12)]

    def sums(x: jax.Array, table: jax.Array) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for size in sizes:
            part = x[:size]
            if outs:  # one after the other
                part = jnp.where(jnp.isnan(outs[-1][0]), outs[-1][0], part)
            outs.append(peer_sum(part, table, axis=TENSOR, backend=backend))
        return outs

    run = devices.jit(sums)
    for _ in range(20 if backend == "mosaic" else 1):
        xs = rng.standard_normal((num_devices, max(SIZES))).astype(DTYPES["bf16"])
        for size, out in zip(sizes, run(devices.divide(xs), devices.table), strict=True):
            assert_sums(out, xs[:, :size], backend)


@pytest.mark.parametrize(("num_devices", "dtype"), [(2, "f16"), (4, "bf16")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_many_programs_are_psum(backend: str, num_devices: int, dtype: str) -> None:
    devices, rng = Devices(num_devices), np.random.default_rng(1)
    run = devices.jit(lambda x, table: peer_sum(x, table, axis=TENSOR, backend=backend))
    outs = []
    for size in rng.choice(SIZES, 60 if backend == "mosaic" else 6):
        xs = rng.standard_normal((num_devices, size)).astype(DTYPES[dtype])
        outs.append((run(devices.divide(xs), devices.table), xs))  # not waited for
    for out, xs in outs:
        assert_sums(out, xs, backend)


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residuals_are_added_and_norms_started(backend: str, num_devices: int) -> None:
    devices, rng = Devices(num_devices), np.random.default_rng(2)

    def two_layers(x: jax.Array, table: jax.Array, rows: jax.Array, norms: jax.Array) -> Any:
        first = peer_sum_residual(x, table, Residual(rows, norms, 2), axis=TENSOR, backend=backend)
        again = Residual(first[0], norms, jnp.int32(0))
        return first, peer_sum_residual(first[1].scaled, table, again, axis=TENSOR, backend=backend)

    run = devices.jit(two_layers, num_whole=2)
    for num_rows, row_size in [(1, 4096), (32, 4096), (3, 256), (32, 8192)]:
        shapes = (num_devices, num_rows, row_size), (num_rows, row_size), (3, row_size)
        xs, rows, norms = (rng.standard_normal(shape).astype(DTYPES["bf16"]) for shape in shapes)
        layers = jax.device_get(run(devices.divide(xs), devices.table, rows, norms))
        for (new, normed), norm in zip(layers, (2, 0), strict=True):
            wide = new.astype(np.float32)
            before = total(xs) + rows.astype(np.float32)
            np.testing.assert_allclose(wide, np.broadcast_to(before, wide.shape), rtol=0.02, atol=0.1)
            if backend == "mosaic":
                assert (new == before.astype(new.dtype)).all()
            # XLA need not round where the reference does.
            squares, scaled = (wide**2).sum(axis=-1), wide * norms[norm].astype(np.float32)
            rtol = 1e-5 if backend == "mosaic" else 0.02
            np.testing.assert_allclose(normed.squares.sum(axis=1), squares, rtol=rtol)
            np.testing.assert_allclose(normed.scaled.astype(np.float32), scaled, rtol=0.01)
            xs, rows = normed.scaled, new[0]


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residuals_are_added_and_norms_finished(backend: str, num_devices: int) -> None:
    devices, rng = Devices(num_devices), np.random.default_rng(3)

    def two_layers(x: jax.Array, table: jax.Array, rows: jax.Array, norms: jax.Array) -> Any:
        finish = functools.partial(peer_sum_norm, eps=EPS, axis=TENSOR, backend=backend)
        first = finish(x, table, Residual(rows, norms, 2))
        return first, finish(first[1], table, Residual(first[0], norms, jnp.int32(0)))

    run = devices.jit(two_layers, num_whole=2)
    for num_rows, row_size in [(1, 4096), (64, 4096), (65, 4096), (130, 4096), (9, 1024), (16, 8192)]:
        shapes = (num_devices, num_rows, row_size), (num_rows, row_size), (3, row_size)
        xs, rows, norms = (rng.standard_normal(shape).astype(DTYPES["bf16"]) for shape in shapes)
        layers = jax.device_get(run(devices.divide(xs), devices.table, rows, norms))
        for (new, normed), norm in zip(layers, (2, 0), strict=True):
            before = total(xs) + rows.astype(np.float32)
            np.testing.assert_allclose(
                new.astype(np.float32), np.broadcast_to(before, new.shape), rtol=0.02, atol=0.1
            )
            if backend == "mosaic":
                assert (new == before.astype(new.dtype)).all()
                assert (normed == normed[0]).all()
            wanted = root_mean_square_norm(new, norms[norm])
            np.testing.assert_allclose(normed.astype(np.float64), wanted, rtol=0.01, atol=1e-6)
            xs, rows = normed, new[0]


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


TABLE = struct(4, 2, dtype=jnp.uint32)


@pytest.mark.parametrize(
    ("x", "inboxes", "residual", "message"),
    [
        (struct(8), None, None, "no inboxes"),
        (struct(8, dtype=jnp.float32), TABLE, None, "float32: wanted bfloat16 or float16"),
        (struct(3, 4), TABLE, None, "12 values: wanted a multiple of 8"),
        (struct(0, 8), TABLE, None, "0 values: wanted a multiple of 8"),
        (struct(2**23 + 8), TABLE, None, "8388616 values of 2 GPUs: at most 16777216 bytes"),
        (struct(2**21 + 8), struct(6, 2, dtype=jnp.uint32), None, "values of 4 GPUs: at most 4194304 bytes"),
        (
            struct(1, 256, dtype=jnp.float16), TABLE,
            Residual(struct(1, 256, dtype=jnp.float16), struct(1, 256, dtype=jnp.float16), 0),
            "dtypes float16 with a norm: wanted bfloat16",
        ),
        (
            struct(1, 256), TABLE, Residual(struct(1, 256), struct(1, 256, dtype=jnp.float32), 0),
            "float32.* with a norm: wanted bfloat16",
        ),
        (struct(2, 384), TABLE, Residual(struct(2, 384), struct(1, 384), 0), "rows of 256, and fewer"),
        (struct(65, 4096), TABLE, Residual(struct(65, 4096), struct(1, 4096), 0), "rows of 256, and fewer"),
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_refused(x: Any, inboxes: Any, residual: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(check_peer_sum_can, x, inboxes, residual)


@pytest.mark.parametrize("row_size", [512, 1536, 9216])
def test_a_norm_is_finished_by_whole_warpgroups(row_size: int) -> None:
    def check(x: jax.Array, inboxes: jax.Array, norms: jax.Array) -> None:
        check_peer_sum_can(x, inboxes, Residual(x, norms, 0), EPS)

    message = f"rows of {row_size} with a norm: wanted a multiple of 1024, at most 8192"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(check, struct(4, row_size), TABLE, struct(1, row_size))


@pytest.mark.parametrize(
    ("num_values", "gpus"), [(8, 2), (2**23, 2), (2**21, 4)], ids=["smallest", "largest of 2", "of 4"]
)
def test_what_the_kernel_can_do_is_not_refused(num_values: int, gpus: int) -> None:
    found: list[Sum] = []

    def check(x: jax.Array, inboxes: jax.Array) -> None:
        found.append(check_peer_sum_can(x, inboxes))

    jax.eval_shape(check, struct(num_values), struct(gpus + 2, 2, dtype=jnp.uint32))
    assert found == [Sum(num_gpus=gpus, num_values=num_values, dtype="bf16")]


def test_a_backend_that_is_named_runs_or_raises() -> None:
    x, rows = jnp.ones(8, jnp.bfloat16), jnp.ones((1, 256), jnp.bfloat16)
    residual = Residual(rows, rows, 0)
    for backend in ("triton", "mosaic_interpret"):
        with pytest.raises(ValueError, match="backend must be one of mosaic, reference"):
            peer_sum(x, None, axis=TENSOR, backend=backend)
        with pytest.raises(ValueError, match="backend must be one of mosaic, reference"):
            peer_sum_residual(rows, None, residual, axis=TENSOR, backend=backend)
        with pytest.raises(ValueError, match="backend must be one of mosaic, reference"):
            peer_sum_norm(rows, None, residual, eps=EPS, axis=TENSOR, backend=backend)
    with cuda_target():
        with pytest.raises(NotImplementedError, match="no inboxes"):
            peer_sum(x, None, axis=TENSOR, backend="mosaic")
        with pytest.raises(NotImplementedError, match="no inboxes"):
            peer_sum_residual(rows, None, residual, axis=TENSOR, backend="mosaic")
        with pytest.raises(NotImplementedError, match="no inboxes"):
            peer_sum_norm(rows, None, residual, eps=EPS, axis=TENSOR, backend="mosaic")
    with jax.sharding.use_abstract_mesh(cuda_mesh("NVIDIA B200")):
        with pytest.raises(NotImplementedError, match="wanted a Hopper GPU"):
            peer_sum(x, jnp.zeros((4, 2), jnp.uint32), axis=TENSOR, backend="mosaic")


def test_without_inboxes_a_collective_sums() -> None:
    devices = Devices(2)
    run = devices.jit(lambda x, _: peer_sum(x, None, axis=TENSOR))
    with cuda_target():
        jax.eval_shape(run, struct(2, 8), struct(2, 4, 2, dtype=jnp.uint32))
    assert chosen_backends()["peer_sum"] == "reference"
