"""Reads optimized HLO: which instructions make an array as large as one that must never be copied."""

import math
import re
from collections.abc import Collection, Iterator

# These pass arrays on; the last two change one in place where they can, and where not XLA inserts a copy.
IN_PLACE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier",
    "scatter", "dynamic-update-slice",
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9-]*)\("
)
_ARRAY = re.compile(r"([a-z]+[0-9]\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?")
_FUSED = re.compile(r"\bfusion\(.*\bcalls=%([\w.-]+)")


def copies(hlo: str, sizes: Collection[tuple[str, int]]) -> list[str]:
    """The instructions that write an array of one of these types and numbers of elements, not in place.

    Inside a fusion only its results are written, so only those count.
    """
    bodies = dict(_computations(hlo))
    fused = {match[1] for lines in bodies.values() for line in lines if (match := _FUSED.search(line))}
    found = []
    for name, lines in bodies.items():
        for line in _results(lines) if name in fused else lines:
            match = _INSTRUCTION.match(line)
            if match is None or match["opcode"] in IN_PLACE or match["opcode"] == "fusion":
                continue
            if match["opcode"] == "custom-call" and "output_to_operand_aliasing=" in line:
                continue
            if any(size in sizes for size in _sizes(match["shape"])):
                found.append(line.partition(" metadata=")[0].strip())
    return found


def collectives(hlo: str) -> list[tuple[str, str, int]]:
    """What devices tell each other: operation, type and number of elements of each array that comes of it."""
    found = []
    for lines in dict(_computations(hlo)).values():
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is not None and (own := _COLLECTIVE.fullmatch(match["opcode"])):
                # Begun, it has its operands among its results: those of one array are its first half.
                sizes = list(_sizes(match["shape"]))
                results = sizes[len(sizes) // 2 :] if match["opcode"].endswith("-start") else sizes
                found += [(own[1], *size) for size in results]
    return found


def float_sums(hlo: str) -> list[str]:
    """The kernels that add up, without names: alike, they do so in the same order."""
    bodies = {name: "\n".join(lines) for name, lines in dict(_computations(hlo)).items()}
    adding = {name for name, body in bodies.items() if re.search(r"ROOT %\S+ = f32\[\] add\(", body)}
    found = []
    for body in bodies.values():
        added_by = {match[1] for match in re.finditer(r" reduce\(.*\bto_apply=%([\w.-]+)", body)}
        if added_by & adding:
            found.append(re.sub(r"%[\w.-]+|, metadata=\{[^}]*\}", "", body))
    return sorted(found)


def kernels(hlo: str) -> list[str]:
    """The opcodes of what the program runs, one after the other; a loop or a branch is one."""
    entry = hlo[hlo.index("\nENTRY ") :].splitlines()
    opcodes = [match["opcode"] for line in entry if (match := _INSTRUCTION.match(line)) is not None]
    passed_on = IN_PLACE - {"while", "conditional", "scatter", "dynamic-update-slice"}
    return [opcode for opcode in opcodes if opcode not in passed_on and opcode != "constant"]


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each."""
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = []
            yield match[1], lines
        else:
            lines.append(line)


def _results(lines: list[str]) -> list[str]:
    """Of a fusion: its root, or what its root is a tuple of; what a bitcast shows is looked at instead."""
    by_name = {match["name"]: line for line in lines if (match := _INSTRUCTION.match(line))}
    (root,) = (line for line in lines if line.lstrip().startswith("ROOT "))
    found, queue = [], [root]
    while queue:
        line = queue.pop()
        match = _INSTRUCTION.match(line)
        assert match is not None, line
        if match["opcode"] in ("tuple", "bitcast"):
            operands = line[match.end() :].partition(")")[0]
            queue += [by_name[operand] for operand in re.findall(r"%([\w.-]+)", operands)]
        else:
            found.append(line)
    return found


def _sizes(shape: str) -> Iterator[tuple[str, int]]:
    """Type and number of elements of each array of a shape."""
    for dtype, sizes in _ARRAY.findall(shape):
        yield dtype, math.prod(int(size) for size in sizes.split(",") if size)
