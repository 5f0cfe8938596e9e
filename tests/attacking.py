"""The two right outcomes of a robustness test: an error of one clear line, or the right result. Every check counts as a
try of its test file; `python -m benchmarks.attacks` prints the counts.
"""

import collections

import jax
import numpy as np

TRIES = collections.Counter()  # of the test that is running


class Silent(AssertionError):
    """Wrong input was accepted: exit code 0, or a value."""


class Loud(AssertionError):
    """Wrong input raised an error, but not in one clear line, or not of the documented class."""


def refused(process, *words, code=2):
    """The error line of a command, which must contain these words. process: a CompletedProcess."""
    TRIES["tries"] += 1
    if process.returncode == 0:
        raise Silent(f"exit code 0: {process.args}\n{process.stdout[-2000:]}")
    lines = [line for line in process.stderr.splitlines() if line.strip() and "%|" not in line]
    if process.returncode != code or len(lines) != 1 or not lines[0].startswith("error: "):
        raise Loud(f"exit code {process.returncode}: {process.args}\n{process.stderr[-2000:]}")
    for word in words:
        if word not in lines[0]:
            raise Loud(f"the line does not name {word!r}: {lines[0]}")
    return lines[0]


def refuses(call, *words, errors=(ValueError,)):
    """The message of the error that call() raises, one line that must contain these words."""
    TRIES["tries"] += 1
    try:
        value = jax.block_until_ready(call())
    except errors as error:
        message = str(error)
    except Exception as error:
        raise Loud(f"{type(error).__name__}: {error}") from error
    else:
        raise Silent(f"accepted: {value!r:.300}")
    if "\n" in message.strip():
        raise Loud(f"more than one line: {message}")
    for word in words:
        if word not in message:
            raise Loud(f"the line does not name {word!r}: {message}")
    return message


def holds(condition, message=""):
    """Counts a try, which fails unless the condition is true everywhere."""
    TRIES["tries"] += 1
    if not np.all(condition):
        raise Silent(message)
