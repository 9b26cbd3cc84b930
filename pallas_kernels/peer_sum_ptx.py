"""The instructions of `peer_sum`: what each thread of a block of one GPU does, as PTX.

Every GPU counts its sums, and so all count alike (`epoch`). What it sends lies in the half of the receivers'
inboxes that its epoch names, even or odd. No half is written while somebody still reads it: who sends in sum
n has ended sum n - 1, and so has received what every other GPU sends in that; each of these had ended sum
n - 2 before, the last one that read this half.
"""

import struct
from dataclasses import dataclass

MAX_BLOCKS = 256
PACKET_THREADS, ROW_THREADS = 128, 512  # of a block
VALUES = 8  # of a thread at a time: 16 bytes
LANES = 32  # of a warp
MAX_THREADS = 1024  # of a block
PACKET_BYTES = MAX_BLOCKS * PACKET_THREADS * 32  # from one GPU: four bytes in eight are the epoch
ROW_BYTES = 16 * 2**20  # from one GPU, without, to another
# What one GPU sends to several others, all together. A collective, which sends a part to each, is then as
# fast on four H200s.
MANY_BYTES = 12 * 2**20
# About a minute. Then the GPU that did not come has failed, and this one does, rather than wait for ever.
MAX_POLLS = 2**27


@dataclass(frozen=True)
class Inbox:
    """Where things are in the memory that the other GPUs write to, in bytes from its start.

    First one epoch for each block, all alike, which only the owner sees: a block reads its own, and the
    blocks of a kernel together set all. Then, for each half and each sender, the epochs that its blocks have
    sent, packets and rows.
    """

    num_gpus: int

    @property
    def row_bytes(self) -> int:
        """The most that a sum may have."""
        if self.num_gpus <= 2:
            return ROW_BYTES
        return min(ROW_BYTES, MANY_BYTES // (self.num_gpus - 1) // 32 * 32)

    @property
    def flags(self) -> int:
        return 4 * MAX_BLOCKS

    @property
    def packets(self) -> int:
        return self.flags + 2 * self.num_gpus * 4 * MAX_BLOCKS

    @property
    def rows(self) -> int:
        return self.packets + 2 * self.num_gpus * PACKET_BYTES

    @property
    def num_bytes(self) -> int:
        return self.rows + 2 * self.num_gpus * self.row_bytes


@dataclass(frozen=True)
class Sum:
    """One compiled kernel: a sum of `num_values` 16-bit values of each GPU."""

    num_gpus: int
    num_values: int
    dtype: str  # bf16 or f16
    # Of rows that a residual is added to, and whose norm follows; 0: the sum is all.
    row_size: int = 0
    eps: float | None = (
        None  # of a norm that is finished, so that a block has whole rows; None: it is started
    )

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.num_gpus)

    @property
    def num_vectors(self) -> int:
        """Threads' worth of values."""
        return self.num_values // VALUES

    @property
    def in_packets(self) -> bool:
        """Whether each value comes with its epoch: no wait behind the last one, and twice the bytes."""
        return self.num_vectors <= MAX_BLOCKS * PACKET_THREADS

    @property
    def share(self) -> int:
        """The vectors of a block, but the last."""
        if self.eps is not None:
            # A processor has room for so many more blocks where they are small.
            max_blocks = MAX_BLOCKS if self.num_threads <= ROW_THREADS else MAX_BLOCKS // 2
            return self.num_threads * -(-self.num_values // self.row_size // max_blocks)
        if self.in_packets:
            return PACKET_THREADS
        return -(-self.num_vectors // min(MAX_BLOCKS, -(-self.num_vectors // ROW_THREADS)))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_vectors // self.share)

    @property
    def num_threads(self) -> int:
        if self.eps is not None:
            return self.row_size // VALUES
        return PACKET_THREADS if self.in_packets else ROW_THREADS

    def ptx(self) -> str:
        """The program. Its operands $0, … are addresses: of `x`, of the table of inboxes, of the sum; with a
        residual then of that, of the norms' weights, of the norm's number among these and of the scaled
        rows; with a norm that is only started, of the sums of squares.
        """
        parts = [_DECLARED, _SHARED if self.eps is not None else "", _bases(self), _start(self)]
        parts += _packets(self) if self.in_packets else _rows(self)
        lines = "\n".join([*parts, _end(self)]).splitlines()
        return "\n".join(["{", *filter(None, lines), "}"])


_DECLARED = """
.reg .pred again, own, inside, lost;
.reg .b16 low, high;
.reg .b32 thread, block, vector, stop, rank, epoch, half, mine, peer, place, seen, index, part, row, polls;
.reg .b32 x0, x1, x2, x3, w0, w1, w2, w3, f0, f1, f2, f3, r0, r1, r2, r3, n0, n1, n2, n3;
.reg .b64 table, inbox, base, from, to, offset, at;
.reg .f32 a0, a1, a2, a3, a4, a5, a6, a7, v0, v1, v2, v3, v4, v5, v6, v7, square, shuffled, scale;
""".strip()

_SHARED = f"""
.reg .b32 sums_of_row;
.shared .align {8 * MAX_THREADS // LANES} .b8 sums[{8 * MAX_THREADS // LANES}];
mov.u32 sums_of_row, sums;
""".strip()


def _bases(s: Sum) -> str:
    """Of each GPU the address of its inbox, then of what this one sends there."""
    names = ", ".join(f"base{gpu}, to{gpu}" for gpu in range(s.num_gpus))
    loads = "\n".join(f"ld.global.u64 base{gpu}, [table+{8 * gpu}];" for gpu in range(s.num_gpus))
    return f"""
.reg .b64 {names};
mov.u32 thread, %tid.x;
mov.u32 block, %ctaid.x;
mov.b64 table, $1;
ld.global.u64 inbox, [table+{8 * s.num_gpus}];
ld.global.u32 rank, [table+{8 * s.num_gpus + 8}];
{loads}
""".strip()


def _start(s: Sum) -> str:
    """What can be loaded before the epoch is known is asked for before that is waited for."""
    first = _first_packet(s) if s.in_packets else _first_row(s)
    rows = s.inbox.rows, s.inbox.row_bytes
    section, num_bytes = (s.inbox.packets, PACKET_BYTES) if s.in_packets else rows
    places = "\n".join(
        _place(f"base{gpu}", section, "mine", num_bytes, f"to{gpu}") for gpu in range(s.num_gpus)
    )
    return f"""
{first}
mul.wide.u32 offset, block, 4;
add.s64 at, inbox, offset;
ld.volatile.global.u32 epoch, [at];
{_weights(s)}
add.u32 epoch, epoch, 1;
setp.eq.u32 again, epoch, 0;
@again mov.u32 epoch, 2;
mov.u32 polls, 0;
and.b32 half, epoch, 1;
mul.lo.u32 half, half, {s.num_gpus};
add.u32 mine, half, rank;
{places}
""".strip()


def _end(s: Sum) -> str:
    """The block's threads have all read its epoch: it sets that, and others that none of this sum reads."""
    return f"""
DONE:
bar.sync 0;
mad.lo.u32 index, thread, {s.num_blocks}, block;
COUNT:
setp.ge.u32 again, index, {MAX_BLOCKS};
@again bra COUNTED;
mul.wide.u32 offset, index, 4;
add.s64 at, inbox, offset;
st.volatile.global.u32 [at], epoch;
add.u32 index, index, {s.num_threads * s.num_blocks};
bra COUNT;
COUNTED:
""".strip()


def _again(label: str) -> str:
    """Looks once more, if there is something to wait for."""
    return f"""
@again add.u32 polls, polls, 1;
setp.ge.u32 lost, polls, {MAX_POLLS};
@lost trap;
@again bra {label};
""".strip()


def _place(base: str, section: int, sender: str, num_bytes: int, to: str) -> str:
    """The address of what `sender` (of a half) has in a section of an inbox."""
    return f"""
mul.wide.u32 {to}, {sender}, {num_bytes};
add.s64 {to}, {to}, {base};
add.s64 {to}, {to}, {section};
""".strip()


def _first_packet(s: Sum) -> str:
    return f"""
mad.lo.u32 vector, block, {s.num_threads}, thread;
setp.lt.u32 inside, vector, {s.num_vectors};
mul.wide.u32 from, vector, 16;
{_first_loads(s)}
""".strip()


def _first_loads(s: Sum) -> str:
    loads = [_load("inside", "x", "$0")]
    if s.row_size:
        loads += [_load("inside", "r", "$3"), "mov.b64 at, $5;\nld.global.u32 index, [at];"]
    return "\n".join(loads)


def _weights(s: Sum) -> str:
    """Of the norm, where there is one."""
    if not s.row_size:
        return ""
    return f"""
rem.u32 place, vector, {s.row_size // VALUES};
mad.lo.u32 place, index, {s.row_size // VALUES}, place;
mul.wide.u32 offset, place, 16;
mov.b64 at, $4;
add.s64 at, at, offset;
@inside ld.global.v4.b32 {{n0, n1, n2, n3}}, [at];
""".strip()


def _packets(s: Sum) -> list[str]:
    """Of a warp's packets, the first halves lie side by side, and behind them the second ones."""
    lines = [
        f"""
setp.ge.u32 again, vector, {s.num_vectors};
@again bra DONE;
shr.u32 place, vector, 5;
mul.wide.u32 offset, place, {2 * 16 * LANES};
and.b32 place, vector, {LANES - 1};
mul.wide.u32 at, place, 16;
add.s64 offset, offset, at;
""".strip()
    ]
    stores = f"""
st.volatile.global.v4.b32 [to], {{x0, epoch, x1, epoch}};
st.volatile.global.v4.b32 [to+{16 * LANES}], {{x2, epoch, x3, epoch}};
""".strip()
    lines += _send(s, "to", "offset", stores)
    for sender in range(s.num_gpus):
        lines += [
            f"""
setp.eq.u32 own, rank, {sender};
@own bra OWN{sender};
add.u32 peer, half, {sender};
""".strip(),
            _place("inbox", s.inbox.packets, "peer", PACKET_BYTES, "to"),
            f"""
add.s64 to, to, offset;
WAIT{sender}:
ld.volatile.global.v4.b32 {{w0, f0, w1, f1}}, [to];
ld.volatile.global.v4.b32 {{w2, f2, w3, f3}}, [to+{16 * LANES}];
setp.ne.u32 again, f0, epoch;
setp.ne.or.u32 again, f1, epoch, again;
setp.ne.or.u32 again, f2, epoch, again;
setp.ne.or.u32 again, f3, epoch, again;
{_again(f"WAIT{sender}")}
bra ADD{sender};
OWN{sender}:
{_copy("x", "w")}
ADD{sender}:
{_add(s, is_first=sender == 0)}
""".strip(),
        ]
    return [*lines, _result(s)]


def _first_row(s: Sum) -> str:
    """Each block has a share of the vectors."""
    return f"""
mul.lo.u32 row, block, {s.share};
add.u32 stop, row, {s.share};
min.u32 stop, stop, {s.num_vectors};
add.u32 row, row, thread;
mov.u32 vector, row;
setp.lt.u32 inside, vector, stop;
mul.wide.u32 from, vector, 16;
{_first_loads(s)}
""".strip()


def _rows(s: Sum) -> list[str]:
    """It sends that, then a flag that the block of its number waits for."""
    lines = [
        """
SEND:
setp.ge.u32 again, vector, stop;
@again bra SENT;
""".strip()
    ]
    lines += _send(s, "at", "from", "st.global.v4.b32 [at], {x0, x1, x2, x3};")
    lines.append(
        f"""
add.u32 vector, vector, {s.num_threads};
setp.lt.u32 inside, vector, stop;
mul.wide.u32 from, vector, 16;
{_load("inside", "x", "$0")}
bra SEND;
SENT:
""".strip()
    )
    return [*lines, *_flags(s), *_add_rows(s)]


def _send(s: Sum, address: str, offset: str, stores: str) -> list[str]:
    """Stores into the inbox of each other GPU, so far behind where this one's part begins."""
    return [
        f"""
setp.eq.u32 own, rank, {receiver};
@own bra SENT{receiver};
add.s64 {address}, to{receiver}, {offset};
{stores}
SENT{receiver}:
""".strip()
        for receiver in range(s.num_gpus)
    ]


def _load(predicate: str, to: str, operand: str) -> str:
    """The thread's vector of an operand."""
    return f"""
mov.b64 at, {operand};
add.s64 at, at, from;
@{predicate} ld.global.v4.b32 {{{to}0, {to}1, {to}2, {to}3}}, [at];
""".strip()


def _flags(s: Sum) -> list[str]:
    """What the block has sent becomes visible, then its flags; the first threads wait for one GPU each."""
    return [
        f"""
bar.sync 0;
setp.ge.u32 again, thread, {s.num_gpus};
@again bra RECEIVED;
setp.eq.u32 again, thread, rank;
@again bra RECEIVED;
mul.wide.u32 offset, thread, 8;
add.s64 at, table, offset;
ld.global.u64 base, [at];
""".strip(),
        _place("base", s.inbox.flags, "mine", 4 * MAX_BLOCKS, "to"),
        """
mul.wide.u32 offset, block, 4;
add.s64 to, to, offset;
st.release.sys.global.u32 [to], epoch;
add.u32 peer, half, thread;
""".strip(),
        _place("inbox", s.inbox.flags, "peer", 4 * MAX_BLOCKS, "from"),
        f"""
add.s64 from, from, offset;
WAIT:
ld.acquire.sys.global.u32 seen, [from];
setp.ne.u32 again, seen, epoch;
{_again("WAIT")}
RECEIVED:
bar.sync 0;
""".strip(),
    ]


def _add_rows(s: Sum) -> list[str]:
    lines = [
        """
mov.u32 vector, row;
NEXT:
setp.ge.u32 again, vector, stop;
@again bra DONE;
mul.wide.u32 from, vector, 16;
""".strip()
    ]
    for sender in range(s.num_gpus):
        lines += [
            f"""
setp.eq.u32 own, rank, {sender};
mov.b64 at, $0;
@own bra OWN{sender};
add.u32 peer, half, {sender};
""".strip(),
            _place("inbox", s.inbox.rows, "peer", s.inbox.row_bytes, "at"),
            f"""
OWN{sender}:
add.s64 at, at, from;
ld.relaxed.sys.global.v4.b32 {{w0, w1, w2, w3}}, [at];
{_add(s, is_first=sender == 0)}
""".strip(),
        ]
    lines += [_result(s), f"add.u32 vector, vector, {s.num_threads};"]
    if s.row_size:
        lines += [
            "setp.lt.u32 inside, vector, stop;\nmul.wide.u32 from, vector, 16;",
            _load("inside", "r", "$3"),
        ]
    return [*lines, "bra NEXT;"]


def _copy(source: str, to: str) -> str:
    return "\n".join(f"mov.b32 {to}{i}, {source}{i};" for i in range(4))


def _widen(s: Sum, source: str, to: str) -> str:
    """Four pairs of values as eight of float32."""
    lines = []
    for i in range(4):
        if s.dtype == "bf16":
            lines += [
                f"shl.b32 index, {source}{i}, 16;",
                f"mov.b32 {to}{2 * i}, index;",
                f"and.b32 index, {source}{i}, 0xffff0000;",
                f"mov.b32 {to}{2 * i + 1}, index;",
            ]
        else:
            lines += [
                f"mov.b32 {{low, high}}, {source}{i};",
                f"cvt.f32.f16 {to}{2 * i}, low;",
                f"cvt.f32.f16 {to}{2 * i + 1}, high;",
            ]
    return "\n".join(lines)


def _narrow(s: Sum, source: str, to: str) -> str:
    kind = f"{s.dtype}x2"
    return "\n".join(f"cvt.rn.{kind}.f32 {to}{i}, {source}{2 * i + 1}, {source}{2 * i};" for i in range(4))


def _add(s: Sum, *, is_first: bool) -> str:
    if is_first:
        return _widen(s, "w", "a")
    sums = "\n".join(f"add.rn.f32 a{i}, a{i}, v{i};" for i in range(VALUES))
    return f"{_widen(s, 'w', 'v')}\n{sums}"


def _store(s: Sum) -> str:
    return f"""
{_narrow(s, "a", "w")}
mov.b64 at, $2;
add.s64 at, at, from;
st.global.v4.b32 [at], {{w0, w1, w2, w3}};
""".strip()


def _result(s: Sum) -> str:
    """Of a sum that is in a0, …; with a residual, of a warp that has VALUES * LANES columns of one row."""
    if not s.row_size:
        return _store(s)
    squares = "\n".join(
        [
            "mul.rn.f32 square, a0, a0;",
            *(f"fma.rn.f32 square, a{i}, a{i}, square;" for i in range(1, VALUES)),
        ]
    )
    return f"""
{_copy("r", "w")}
{_add(s, is_first=False)}
{_store(s)}
{_widen(s, "w", "a")}
{squares}
{_finished_norm(s) if s.eps is not None else _started_norm(s)}
""".strip()


def _started_norm(s: Sum) -> str:
    """Of the warp's squares, the sum."""
    parts = s.row_size // (VALUES * LANES)
    return f"""
{_scaled(s)}
{_sum_over_lanes()}
and.b32 index, thread, {LANES - 1};
setp.ne.u32 again, index, 0;
@again bra DONE;
shr.u32 index, vector, 5;
div.u32 row, index, {parts};
rem.u32 part, index, {parts};
mad.lo.u32 index, part, {s.num_values // s.row_size}, row;
mul.wide.u32 offset, index, 4;
mov.b64 at, $7;
add.s64 at, at, offset;
st.global.f32 [at], square;
""".strip()


def _finished_norm(s: Sum) -> str:
    """The block has the row. The sums of its warps lie in one half of `sums`, those of its next row in the
    other: these are written when all threads have read what was there, of the row before the last.
    """
    num_warps = s.num_threads // LANES
    loads = "\n".join(
        f"ld.shared.v4.f32 {{v0, v1, v2, v3}}, [sums_of_row+{16 * i}];\n"
        + "\n".join(f"add.rn.f32 square, square, v{j};" for j in range(4))
        for i in range(num_warps // 4)
    )
    return f"""
{_sum_over_lanes()}
and.b32 index, thread, {LANES - 1};
setp.eq.u32 own, index, 0;
shr.u32 index, thread, 5;
mad.lo.u32 index, index, 4, sums_of_row;
@own st.shared.f32 [index], square;
bar.sync 0;
mov.f32 square, 0f00000000;
{loads}
xor.b32 sums_of_row, sums_of_row, {4 * MAX_THREADS // LANES};
fma.rn.f32 square, square, {_immediate(1 / s.row_size)}, {_immediate(s.eps or 0.0)};
rsqrt.approx.f32 scale, square;
{"\n".join(f"mul.rn.f32 a{i}, a{i}, scale;" for i in range(VALUES))}
{_scaled(s)}
""".strip()


def _scaled(s: Sum) -> str:
    """The row times the norm's weight, in its dtype."""
    products = "\n".join(f"mul.rn.f32 v{i}, v{i}, a{i};" for i in range(VALUES))
    return f"""
{_widen(s, "n", "v")}
{products}
{_narrow(s, "v", "w")}
mov.b64 at, $6;
add.s64 at, at, from;
st.global.v4.b32 [at], {{w0, w1, w2, w3}};
""".strip()


def _sum_over_lanes() -> str:
    return "\n".join(
        f"shfl.sync.bfly.b32 shuffled, square, {distance}, 31, 0xffffffff;\n"
        "add.rn.f32 square, square, shuffled;"
        for distance in (16, 8, 4, 2, 1)
    )


def _immediate(value: float) -> str:
    return f"0f{struct.pack('>f', value).hex().upper()}"
