"""What --help prints."""

from __future__ import annotations

import ast
import io
import pathlib
import textwrap
import tokenize
from collections.abc import Iterable

from ddim_jax import config as config_lib

DEFAULTS = pathlib.Path(__file__).parents[2] / "configs" / "default.py"
WIDTH, COLUMN = 120, 46


def text(description: str, options: Iterable[tuple[str, str]], config: bool) -> str:
    """description: what the command does. options: (how it is given, what it does) of each. config: whether there is
    --config too, whose fields are then listed with their defaults.
    """
    lines = [description.strip(), "", "options:", *(_line(*option) for option in options)]
    if config:
        lines += ["", "fields of the config, with the values of configs/default.py, which the config given may change:"]
        found = fields(DEFAULTS.read_text() if DEFAULTS.is_file() else "")
        for name in found or config_lib.field_names():
            value, comment = found.get(name, ("VALUE", ""))
            lines.append(_line(f"--config.{name}={value}", comment))
    return "\n".join(lines)


def _line(name: str, words: str) -> str:
    """Two columns; a name that is too long for the first has a line of its own."""
    beside = textwrap.wrap(words, WIDTH - COLUMN) or [""]
    first = f"  {name}"
    if len(first) >= COLUMN:
        beside.insert(0, "")
    left = [first] + [""] * (len(beside) - 1)
    return "\n".join(f"{a:<{COLUMN}}{b}".rstrip() for a, b in zip(left, beside, strict=True))


def fields(source: str) -> dict[str, tuple[str, str]]:
    """The default, as it is written, and the comment of every field that a config file sets; by dotted name."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    set_by = {}  # line -> (field, default)
    sections = {"config": ""}  # variable -> how the fields of its section begin
    for node in sorted((node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)), key=_line_of):
        target = node.targets[0]
        if not isinstance(target, ast.Attribute):
            continue
        field = sections[target.value.id] + target.attr
        value = ast.get_source_segment(source, node.value).strip('"')
        if value.startswith("ConfigDict("):
            sections |= {other.id: f"{field}." for other in node.targets[1:]}
        else:
            set_by[node.lineno] = field, "" if value.startswith("placeholder(") else value
    words: dict[int, list[str]] = {line: [] for line in sorted(set_by)}
    for line, comment in comments.items():
        if before := [begin for begin in words if begin <= line]:
            words[before[-1]].append(comment)
    return {name: (value, " ".join(words[line])) for line, (name, value) in set_by.items()}


def _line_of(node: ast.AST) -> int:
    return node.lineno
