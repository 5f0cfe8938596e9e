"""What a compiled program does, counted from its HLO text: collectives, and the traffic of the main memory (HBM).

XLA's own "bytes accessed" counts an asynchronous copy between HBM and on-chip memory at both ends. Here a copy counts
once, and only its end in HBM. In a layout, S(1) is on-chip memory. The body of a loop counts as often as it runs, if
the compiler knows that number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Operations that move no data, and those whose computations are counted instead.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"while", "conditional", "call", "async-start", "async-update", "async-done", "opt-barrier", "domain"}

_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|branch_computations|calls)=\{?%?([\w.%, -]+)\}?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_BOUND = re.compile(r"\bs32\[\]\S* constant\(([0-9]+)\)")
_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """One instruction of a program."""

    name: str
    opcode: str
    result: str  # its type
    operands: tuple[str, ...]  # names
    line: str


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(the instructions of each computation by its name, the name of the entry computation) of an HLO text."""
    found: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            found[current] = []
            entry = current if match[1] else entry
        elif current and (match := _INSTRUCTION.match(line)) and (parsed := _parse(match[1], match[2], line)):
            found[current].append(parsed)
    return found, entry


def _parse(name: str, rest: str, line: str) -> Instruction | None:
    """rest: the type, the opcode and the operands of an instruction."""
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    match = re.match(r"\s*([\w-]+)\(", rest[end:]) if end > 0 else None
    if match is None:
        return None
    begin = end + match.end() - 1
    operands = re.findall(r"%([\w.-]+)", rest[begin : begin + _closing(rest[begin:])])
    return Instruction(name, match[1], rest[:end], tuple(operands), line)


def _closing(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)


def size(type_: str, on_chip: bool = False) -> int:
    """The bytes in HBM of a type, which may be a tuple. on_chip: count the arrays in on-chip memory instead."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if dtype in BYTES and ("S(1)" in layout) == on_chip:
            total += BYTES[dtype] * math.prod(int(length) for length in shape.split(",") if length)
    return math.ceil(total)


def executed(text: str) -> Iterator[tuple[Instruction, dict[str, str], int]]:
    """(instruction, the types of the values of its computation, how often it runs) for the instructions that are
    executed one by one: not those inside of a fusion or of a reduction.
    """
    found, entry = computations(text)
    waiting, seen = [(entry, 1)], {entry}
    while waiting:
        name, times = waiting.pop()
        instructions = found.get(name, [])
        types = {instruction.name: instruction.result for instruction in instructions}
        for instruction in instructions:
            yield instruction, types, times
            trips = trip_count(instruction, found) if instruction.opcode == "while" else 1
            if instruction.opcode in ("while", "conditional", "call", "async-start"):
                for names in _CALLED.findall(instruction.line):
                    for name in re.findall(r"[\w.-]+", names):
                        if name in found and name not in seen:
                            seen.add(name)
                            waiting.append((name, times * trips))


def trip_count(loop: Instruction, found: dict[str, list[Instruction]]) -> int:
    """How often the body of a while loop runs: as the compiler notes it, or the bound with which the condition compares
    the counter of a `lax.scan`; 1 if it has neither.
    """
    if match := _TRIPS.search(loop.line):
        return int(match[1])
    condition = found.get(_CONDITION.search(loop.line)[1], []) if _CONDITION.search(loop.line) else []
    bounds = [_BOUND.search(each.line) for each in condition if each.opcode == "constant"]
    return int(bounds[0][1]) if len(bounds) == 1 and bounds[0] else 1


def traffic(text: str) -> Counter[tuple[str, str]]:
    """(opcode, module of the network) -> the bytes that are read from HBM and written to it.

    A fusion that reads a part of an operand counts the whole operand, so that the sum may be too large.
    """
    total: Counter[tuple[str, str]] = Counter()
    for instruction, types, times in executed(text):
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            continue
        if opcode in ("copy-start", "slice-start"):
            moved = _copied(instruction.result)
        elif opcode.endswith("-start"):
            moved = size(instruction.result)
        else:
            moved = size(instruction.result) + sum(size(types.get(name, "")) for name in {*instruction.operands})
        total[opcode.removesuffix("-start"), module_of(instruction.line)] += times * moved
    return total


def _copied(result: str) -> int:
    """The bytes in HBM of an asynchronous copy or slice. result: (destination, source, context) in any order. Of the
    source, as much as the smaller array is moved; the ends in HBM count.
    """
    ends = [
        (math.ceil(BYTES.get(dtype, 0) * math.prod(int(length) for length in shape.split(",") if length)), layout)
        for dtype, shape, layout in _ARRAY.findall(result)
        if "S(2)" not in layout
    ]
    return min((count for count, _ in ends), default=0) * sum("S(1)" not in layout for _, layout in ends)


def module_of(line: str) -> str:
    """The module of the network in the metadata of an instruction, without its numbers: "down_block/conv"; "" if there
    is none.
    """
    match = _NAME.search(line)
    if match is None:
        return ""
    parts = [part for part in match[1].split("/") if re.fullmatch(r"(up|down|middle|conv|norm|time|class)_\w+", part)]
    return "/".join(re.sub(r"_\d+", "", part) for part in parts[:2])


class Collective(NamedTuple):
    """All collectives of one kind in a program."""

    count: int  # of executions
    bytes: int  # of their results on one device


def collectives(text: str) -> dict[str, Collective]:
    """kind -> count and bytes, for the kinds that occur."""
    found: dict[str, Collective] = {}
    for instruction, _, times in executed(text):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            moved = size(instruction.result) + size(instruction.result, on_chip=True)
            before = found.get(kind, Collective(0, 0))
            found[kind] = Collective(before.count + times, before.bytes + times * moved)
    return found
