"""The text that --help prints."""

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
    """The help text of a command.

    description: of the command. options: (syntax, description) of each option. config: whether the command has
    --config; then the text also lists the fields of the config with their defaults.
    """
    lines = [description.strip(), "", "options:", *(_line(*option) for option in options)]
    if config:
        lines += [
            "",
            "fields of the config, with the defaults of configs/default.py, which the config file may override:",
        ]
        defaults = fields(DEFAULTS.read_text() if DEFAULTS.is_file() else "")
        for name in defaults or config_lib.field_names():
            value, comment = defaults.get(name, ("VALUE", ""))
            lines.append(_line(f"--config.{name}={value}", comment))
    return "\n".join(lines)


def _line(name: str, description: str) -> str:
    """Two columns. A name that is too long for the first column is on a separate line."""
    right = textwrap.wrap(description, WIDTH - COLUMN) or [""]
    first = f"  {name}"
    if len(first) >= COLUMN:
        right.insert(0, "")
    left = [first] + [""] * (len(right) - 1)
    return "\n".join(f"{a:<{COLUMN}}{b}".rstrip() for a, b in zip(left, right, strict=True))


def fields(source: str) -> dict[str, tuple[str, str]]:
    """Dotted field name -> (default as source code, comment), for all fields that the source of a config file sets."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    set_by = {}  # line -> (field, default)
    sections = {"config": ""}  # variable -> prefix of the fields of its section
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
    parts: dict[int, list[str]] = {line: [] for line in sorted(set_by)}  # line -> comments from it to the next field
    for line, comment in comments.items():
        if before := [begin for begin in parts if begin <= line]:
            parts[before[-1]].append(comment)
    return {name: (value, " ".join(parts[line])) for line, (name, value) in set_by.items()}


def _line_of(node: ast.AST) -> int:
    return node.lineno
