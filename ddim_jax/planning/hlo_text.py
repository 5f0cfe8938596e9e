"""Reads the HLO text of a compiled program: its computations, their instructions and types."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
BYTES |= {name: 1 for name in ("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz")}

_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_SPACE = re.compile(r"S\(([0-9]+)\)")


class Instruction(NamedTuple):
    """One instruction of a program."""

    name: str
    opcode: str
    result: str  # its type
    operands: tuple[str, ...]  # names
    line: str


class Body:
    """The instructions of one computation."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions

    @functools.cached_property
    def named(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @functools.cached_property
    def types(self) -> dict[str, str]:
        return {each.name: each.result for each in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """name -> the instructions that have it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for each in self.instructions:
            for operand in dict.fromkeys(each.operands):
                found.setdefault(operand, []).append(each)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """The name of each parameter by its number."""
        parameters = [each for each in self.instructions if each.opcode == "parameter"]
        return {int(re.search(r" parameter\(([0-9]+)\)", each.line)[1]): each.name for each in parameters}

    @property
    def root(self) -> Instruction:
        return next(
            (each for each in self.instructions if each.line.lstrip().startswith("ROOT ")), self.instructions[-1]
        )


class Text(NamedTuple):
    """A program."""

    computations: dict[str, Body]
    entry: str  # the name of the computation that is executed


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Text:
    """The program of an HLO text."""
    found: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            found[current] = []
            entry = current if match[1] else entry
        elif current and (match := _INSTRUCTION.match(line)) and (parsed := _parse(match[1], match[2], line)):
            found[current].append(parsed)
    return Text({name: Body(instructions) for name, instructions in found.items() if instructions}, entry)


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


def array_sizes(type_: str) -> list[tuple[int, int]]:
    """(bytes, memory space) of each array of a type, which may be a tuple. Memory space 0 is HBM, 1 is on-chip."""
    sizes = []
    for dtype, shape, layout in _ARRAY.findall(type_):
        count = math.prod(int(length) for length in shape.split(",") if length)
        space = _SPACE.search(layout)
        sizes.append((math.ceil(BYTES.get(dtype, 0) * count), int(space[1]) if space else 0))
    return sizes


def size(type_: str, on_chip: bool = False) -> int:
    """The bytes in HBM of a type, which may be a tuple. on_chip: count the arrays in on-chip memory instead."""
    return sum(count for count, space in array_sizes(type_) if space == on_chip)
