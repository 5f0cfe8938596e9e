"""What a compiled program does, counted from its HLO text: collectives, and the traffic of the main memory (HBM).

XLA's own "bytes accessed" counts an asynchronous copy between HBM and on-chip memory at both ends. Here a copy counts
once, and only its ends in HBM. In a layout, S(1) is on-chip memory. The body of a loop counts as often as it runs. The
padding of tiles does not count.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ddim_jax.planning.hlo_text import Body, Instruction, Text, array_sizes, parse, size

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Operations that move no data, and those whose computations are counted instead.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"while", "conditional", "call", "async-start", "async-update", "async-done", "opt-barrier", "domain"}

CALLS = ("while", "conditional", "call", "async-start")
SLICES = ("dynamic-slice", "slice", "gather")  # they read a part of the first operand
FOLLOW = 12  # operations after a copy, until the one whose module it belongs to
NOT_MODULES = ("while", "body", "cond", "scan", "closed_call")

_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|branch_computations|true_computation|false_computation|calls)="
    r"(\{[^{}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_BOUND = re.compile(r"\bs32\[\]\S* constant\(([0-9]+)\)")
_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"\bchannel_id=([0-9]+)")


class Executed(NamedTuple):
    """An instruction, and how often it runs."""

    instruction: Instruction
    body: Body  # of its computation
    times: int


def executed(text: Text) -> Iterator[Executed]:
    """The instructions that are executed one by one: not those inside of a fusion or of a reduction."""

    def visit(name: str, times: int) -> Iterator[Executed]:
        body = text.computations.get(name)
        for instruction in body.instructions if body else ():
            yield Executed(instruction, body, times)
            if instruction.opcode in CALLS:
                trips = trip_count(instruction, text) if instruction.opcode == "while" else 1
                for called in called_by(instruction, text):
                    yield from visit(called, times * trips)

    return visit(text.entry, 1)


def called_by(instruction: Instruction, text: Text) -> list[str]:
    """The names of the computations that an instruction calls."""
    names = [name for group in _CALLED.findall(instruction.line) for name in re.findall(r"[\w.-]+", group)]
    return [name for name in names if name in text.computations]


def trip_count(loop: Instruction, text: Text) -> int:
    """How often the body of a while loop runs: as the compiler notes it, or the bound with which the condition compares
    the counter of a `lax.scan`; 1 if it has neither.
    """
    if match := _TRIPS.search(loop.line):
        return int(match[1])
    condition = _CONDITION.search(loop.line)
    body = text.computations.get(condition[1]) if condition else None
    constants = [each for each in body.instructions if each.opcode == "constant"] if body else []
    bounds = [_BOUND.search(each.line) for each in constants]
    return int(bounds[0][1]) if len(bounds) == 1 and bounds[0] else 1


# --- traffic ---


def traffic(text: str) -> Counter[tuple[str, str]]:
    """(opcode, module of the network) -> the bytes that are read from HBM and written to it."""
    parsed, total = parse(text), Counter()
    for instruction, body, times in executed(parsed):
        opcode = instruction.opcode
        skipped = (
            opcode in FREE or opcode.endswith("-done") or kind_of(opcode) or is_reduce_scatter(instruction, parsed)
        )
        if not skipped:
            moved = times * _moved(instruction, body, parsed)
            total[opcode.removesuffix("-start"), module_of(instruction, body)] += moved
    for kind, (instruction, body, times) in _each_collective(parsed):
        moved = size(_result(instruction, body)) + sum(size(body.types.get(name, "")) for name in instruction.operands)
        total[kind, module_of(instruction, body)] += times * moved
    return total


def _moved(instruction: Instruction, body: Body, text: Text) -> int:
    """The bytes in HBM that one operation reads and writes."""
    opcode, operands = instruction.opcode, list(dict.fromkeys(instruction.operands))
    of = lambda name: body.types.get(name, "")
    if opcode in ("copy-start", "slice-start"):
        return _copied(instruction.result)
    if opcode == "fusion" and (called := called_by(instruction, text)):
        fused = text.computations[called[0]]
        read = {name: _read(fused, index, of(name)) for index, name in enumerate(instruction.operands)}
        return sum(read.values()) + _written(fused, instruction.result)
    if opcode in SLICES:
        part = size(instruction.result) + size(instruction.result, on_chip=True)
        return size(instruction.result) + (min(part, size(of(operands[0]))) if operands else 0)
    if opcode == "dynamic-update-slice":  # in place
        update = of(instruction.operands[1])
        return size(update) + (size(update) + size(update, on_chip=True) if size(instruction.result) else 0)
    return size(instruction.result) + sum(size(of(name)) for name in operands)


def _copied(result: str) -> int:
    """The bytes in HBM of an asynchronous copy or slice. result: (destination, source, context) in any order. Of the
    source, as much as the smaller array is moved; the ends in HBM count.
    """
    ends = [(count, space) for count, space in array_sizes(result) if space != 2]
    return min((count for count, _ in ends), default=0) * sum(space != 1 for _, space in ends)


def _read(fused: Body, index: int, type_: str) -> int:
    """The bytes that a fusion reads of an operand in HBM: those of its slices, if it uses only these."""
    whole = size(type_)
    parameter = fused.parameters.get(index)
    if not whole or parameter is None:
        return whole

    def used(name: str) -> int:
        total = 0
        for user in fused.users.get(name, ()):
            first = user.operands[0] == name
            if user.opcode in SLICES and first:
                total += size(user.result) + size(user.result, on_chip=True)
            elif user.opcode == "bitcast":
                total += used(user.name)
            elif not (
                user.opcode == "tuple" or kind_of(user.opcode) or user.opcode == "dynamic-update-slice" and first
            ):
                return whole
        return total

    return min(used(parameter), whole)


def _written(fused: Body, result: str) -> int:
    """The bytes that a fusion writes to HBM: only the update of an array that it updates in place."""
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0
    for name, (count, space) in zip(names, array_sizes(result), strict=False):
        source = fused.named.get(name)
        while source is not None and source.opcode == "bitcast":
            source = fused.named.get(source.operands[0])
        if source is not None and source.opcode == "dynamic-update-slice":
            update = fused.types.get(source.operands[1], "")
            count = min(count, size(update) + size(update, on_chip=True))
        elif source is not None and (source.opcode == "parameter" or kind_of(source.opcode)):
            count = 0  # passed on; collectives are counted once, not in each fusion that waits for them
        total += count * (space == 0)
    return total


# --- modules ---


def module_of(instruction: Instruction, body: Body) -> str:
    """The module of the network that an instruction belongs to, without its numbers: "down_block/conv"; of a copy, the
    one of the operation that uses it; "" if there is none.
    """
    waiting = [instruction]
    for _ in range(FOLLOW):
        for each in waiting:
            match = _NAME.search(each.line)
            if name := module(match[1]) if match else "":
                return name
        waiting = [user for each in waiting for user in body.users.get(each.name, ())[:1]]
    return ""


@functools.cache
def module(op_name: str) -> str:
    """The module in the name of an operation, such as "jit(update)/jvp(UNet)/down_0_block_1/jit(silu)/mul"."""
    parts = re.sub(r"\b(?:transpose|jvp|vmap|checkpoint|rematted_computation)\b", "", op_name).split("/")[:-1]
    parts = [re.sub(r"^jit\((_?\w+)\)$", r"\1", part) for part in parts[1:]]
    parts = [part for part in parts if re.fullmatch(r"[a-z_]\w*", part) and part not in NOT_MODULES]
    parts = [re.sub(r"_?\d+", "", part).strip("_") for part in parts]
    return "/".join([part for part in parts if part][:2])


# --- collectives ---


class Collective(NamedTuple):
    """All collectives of one kind in a program."""

    count: int  # of executions
    bytes: int  # of their results on one device


def collectives(text: str) -> dict[str, Collective]:
    """kind -> count and bytes, for the kinds that occur."""
    found: dict[str, Collective] = {}
    for kind, (instruction, body, times) in _each_collective(parse(text)):
        result = _result(instruction, body)
        moved = size(result) + size(result, on_chip=True)
        before = found.get(kind, Collective(0, 0))
        found[kind] = Collective(before.count + times, before.bytes + times * moved)
    return found


def kind_of(opcode: str) -> str | None:
    """The kind of a collective; None for another operation."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def is_reduce_scatter(instruction: Instruction, text: Text) -> bool:
    """Whether an instruction is a reduce-scatter as a TPU has it: a fusion of an all-reduce and a slice."""
    called = called_by(instruction, text) if instruction.opcode == "fusion" else []
    return any("all-reduce-scatter" in name for name in called)


def _each_collective(text: Text) -> Iterator[tuple[str, Executed]]:
    """(kind, collective) for each collective. One that overlaps with computation is in several fusions: it has one
    channel, and counts once.
    """
    seen = set()
    for instruction, body, times in executed(text):
        inside = [(instruction, body)]
        if instruction.opcode == "fusion":
            if is_reduce_scatter(instruction, text):
                yield "reduce-scatter", Executed(instruction, body, times)
                continue
            fused = [text.computations[name] for name in called_by(instruction, text)]
            inside = [(each, computation) for computation in fused for each in computation.instructions]
        for each, computation in inside:
            if (kind := kind_of(each.opcode)) is None:
                continue
            channel = _CHANNEL.search(each.line)
            if channel is None or (kind, channel[1]) not in seen:
                seen.add((kind, channel[1]) if channel else None)
                yield kind, Executed(each, computation, times)


def _result(instruction: Instruction, body: Body) -> str:
    """The type of the result of a collective. An asynchronous one has (operands, results, contexts)."""
    if not instruction.opcode.endswith("-start") or instruction.opcode.startswith("all-reduce"):
        return instruction.result
    arrays = re.findall(r"[a-z]+[0-9]*\[[0-9,]*\](?:\{[^{}]*\})?", instruction.result)
    count = len(instruction.operands)
    return ", ".join(arrays[count : 2 * count])
