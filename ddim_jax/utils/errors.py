"""The errors that a command prints as one line before it exits with code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ddim_jax.utils import files

LONGEST = 2000  # the limit for the characters of a message, which may contain text of a file


class _OneLine(Exception):
    """An error whose message is one line without control characters, even if it contains text of a file."""

    def __init__(self, message: str):
        line = files.printable(" ".join(message.split()))
        super().__init__(line if len(line) <= LONGEST else line[: LONGEST - 3] + "...")


class ConfigError(_OneLine, ValueError):
    """A wrong setting. The message names the field or option, its value, and the allowed values."""


class CheckpointError(_OneLine):
    """A checkpoint, or another file of weights, that cannot be used. The message names the file and the reason."""


class DamagedError(CheckpointError):
    """A checkpoint whose content differs from what was saved."""


@contextlib.contextmanager
def error_context(field: str) -> Iterator[None]:
    """Turns a ValueError into a ConfigError whose message begins with the name of the field."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
