"""Instructions of PTX that `peer_sum` is made of, from their text."""

import math
import operator
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MEMORY = re.compile(
    r"(ld|st)(\.volatile|\.(?:relaxed|acquire|release)\.sys)?\.(global|shared)(\.v4)?\.[buf](32|64)"
)
SHARED = re.compile(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];")
OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+")


def recast(value: float, source: str, to: str) -> Any:
    return struct.unpack(to, struct.pack(source, value))[0]


def of_floats(function: Callable[..., float]) -> Callable[..., int]:
    """Rounding to 64 bits before 32 changes no sum and no product."""
    return lambda *bits: recast(function(*[recast(each, "I", "f") for each in bits]), "f", "I")


def bfloat16(bits: int) -> int:
    """To the nearest, ties to even; NaN is not among what tests add."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def float16(bits: int) -> int:
    return recast(recast(bits, "I", "f"), "e", "H")


# By name, of bits; a predicate is 0 or 1.
VALUES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("mov.u32", "mov.b32", "mov.f32", "mov.b64"), lambda a: a),
    "add.u32": lambda a, b: a + b & 0xFFFFFFFF,
    "add.s64": lambda a, b: a + b & 0xFFFFFFFFFFFFFFFF,
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "mad.lo.u32": lambda a, b, c: a * b + c & 0xFFFFFFFF,
    "mul.wide.u32": operator.mul,
    "min.u32": min,
    "div.u32": operator.floordiv,
    "rem.u32": operator.mod,
    "and.b32": operator.and_,
    "xor.b32": operator.xor,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": operator.rshift,
    "setp.eq.u32": operator.eq,
    "setp.ne.u32": operator.ne,
    "setp.ge.u32": operator.ge,
    "setp.lt.u32": operator.lt,
    "setp.ne.or.u32": lambda a, b, c: a != b or c,
    "add.rn.f32": of_floats(operator.add),
    "mul.rn.f32": of_floats(operator.mul),
    "fma.rn.f32": of_floats(lambda a, b, c: a * b + c),
    "rsqrt.approx.f32": of_floats(lambda a: 1 / math.sqrt(a)),
    "cvt.f32.f16": lambda a: recast(recast(a, "H", "e"), "f", "I"),
    "cvt.rn.f16x2.f32": lambda high, low: float16(high) << 16 | float16(low),
    "cvt.rn.bf16x2.f32": lambda high, low: bfloat16(high) << 16 | bfloat16(low),
}


class Step(NamedTuple):
    """One instruction."""

    kind: str
    predicate: str
    to: Sequence[str] = ()
    sources: Sequence[str] = ()
    number: int = 0  # where a branch leads, the bytes behind an address, the distance of a shuffle
    order: str | None = None
    value: Callable[..., int] = min


def decode(text: str) -> list[Step]:
    """What `Sum.ptx()` says. What the threads of a block share begins at the address 0."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for _, name, _ in SHARED.findall(text):
        text = re.sub(rf"\b{name}\b(?!\[)", "0", text)
    for line in text.splitlines()[1:-1]:
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif not line.startswith((".reg ", ".shared ")):
            lines.append(line)
    return [decode_line(line, place, labels) for place, line in enumerate(lines)]


def shared_bytes(text: str) -> int:
    """What the threads of a block share."""
    return sum(int(size) for _, _, size in SHARED.findall(text))


def decode_line(line: str, place: int, labels: Mapping[str, int]) -> Step:
    found = re.fullmatch(r"(?:@(\w+) )?([\w.]+)(?: (.*))?;", line)
    assert found, line
    predicate, name, operands = found[1] or "1", found[2], OPERAND.findall(found[3] or "")
    match name, operands:
        case _, [to, *sources] if name in VALUES:
            names = re.findall(r"\w+", to)
            return Step("value" if names == [to] else "split", predicate, names, sources, value=VALUES[name])
        case "bra", [label]:
            kind = "bra" if labels[label] > place else "bra back"
            return Step(kind, predicate, number=labels[label])
        case "shfl.sync.bfly.b32", [to, source, distance, "31", "0xffffffff"]:
            return Step("shfl", predicate, [to], [source], int(distance))
        case ("bar.sync", ["0"]) | ("trap", []):
            return Step(name.partition(".")[0], predicate)
        case _, [first, second] if memory := MEMORY.fullmatch(name):
            kind, order, space, vector, bits = memory.groups()
            address, values = (second, first) if kind == "ld" else (first, second)
            names, (base, _, offset) = re.findall(r"\w+", values), address.strip("[]").partition("+")
            assert len(names) == (4 if vector else 1) and (kind, bits) != ("st", "64"), line
            assert space == "global" or (order, bits) == (None, "32"), line
            to, sources = (names, [base]) if kind == "ld" else ((), [base, *names])
            kind = f"{kind} shared" if space == "shared" else kind + "64" * (bits == "64")
            return Step(kind, predicate, to, sources, int(offset or 0), order)
    raise NotImplementedError(line)
