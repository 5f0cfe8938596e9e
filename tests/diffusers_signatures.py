"""The constructor fields of diffusers' schedulers, from the source code of all its releases.

    python tests/diffusers_signatures.py CLONE > tests/data/diffusers_scheduler_fields.txt

writes the table that `recorded` reads. CLONE: a git clone of https://github.com/huggingface/diffusers with its tags.
A line `class first-last field=default ...` has fields of a class, and the first and the last release in which they have
these defaults.
"""

import ast
import math
import pathlib
import re
import subprocess
import sys

RECORDED = pathlib.Path(__file__).parent / "data" / "diffusers_scheduler_fields.txt"
REQUIRED = "required"  # of a field without default


def signatures(source):
    """{class: {field: default}} for the classes `...Scheduler` of a Python file."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    fields = [argument.arg for argument in method.args.args[1:]]
                    defaults = [value_of(default) for default in method.args.defaults]
                    missing = [REQUIRED] * (len(fields) - len(defaults))
                    found[node.name] = dict(zip(fields, missing + defaults, strict=True))
    return found


def value_of(expression):
    """The value of the expression of a default: literals, fractions, float("inf"), and lists of these."""
    if isinstance(expression, ast.List | ast.Tuple):
        return [value_of(element) for element in expression.elts]
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Div):
        return value_of(expression.left) / value_of(expression.right)
    if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
        return -value_of(expression.operand)
    if ast.unparse(expression) in ("float('inf')", "inf"):  # in the sources, and as the table writes it
        return math.inf
    return ast.literal_eval(expression)


def number(release):
    return tuple(int(part) for part in release.split("."))


def recorded():
    """[(class, first, last, {field: default})] of the releases in the table."""
    rows = []
    for line in RECORDED.read_text().splitlines():
        if not line.startswith("#"):
            name, releases, *fields = line.split(" ")
            pairs = (field.split("=", 1) for field in fields)
            values = {field: value_of(ast.parse(default, mode="eval").body) for field, default in pairs}
            rows.append((name, *releases.split("-"), values))
    return rows


def main(clone):
    git = lambda *arguments: (
        subprocess.run(["git", "-C", clone, *arguments], capture_output=True, text=True, check=True).stdout
    )
    tags = [tag for tag in git("tag").split() if re.fullmatch(r"v?\d+\.\d+\.\d+", tag)]
    tags = sorted(
        (tag for tag in tags if number(tag.lstrip("v")) >= (0, 1, 0)), key=lambda tag: number(tag.lstrip("v"))
    )
    files, releases = {}, {}  # releases: (class, field, default) -> the releases that have it
    for tag in tags:
        for entry in git("ls-tree", "-r", tag, "src/diffusers/schedulers").splitlines():
            blob, path = entry.split()[2], entry.split("\t")[1]
            if path.endswith(".py") and "flax" not in path:
                if blob not in files:
                    files[blob] = signatures(git("cat-file", "blob", blob))
                for name, fields in files[blob].items():
                    for field, default in fields.items():
                        releases.setdefault((name, field, repr(default)), []).append(tag.lstrip("v"))
    lines = {}
    for (name, field, default), present in releases.items():
        lines.setdefault((name, number(present[0]), number(present[-1])), []).append(f"{field}={default}")
    print(f"# diffusers {tags[0]} to {tags[-1]}, written by tests/diffusers_signatures.py")
    for (name, first, last), fields in sorted(lines.items()):
        text = "-".join(".".join(map(str, release)) for release in (first, last))
        print(name, text, *(field.replace(" ", "") for field in fields))


if __name__ == "__main__":
    main(*sys.argv[1:])
