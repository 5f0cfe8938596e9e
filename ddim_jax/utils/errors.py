"""The errors that a command prints as one line, and ends with exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ddim_jax.utils import files

LONGEST = 2000  # characters of a message, which may hold text of a file


class _OneLine(Exception):
    """Its message is one line that a terminal only shows, whatever text of a file it holds."""

    def __init__(self, message: str):
        line = files.printable(" ".join(message.split()))
        super().__init__(line if len(line) <= LONGEST else line[: LONGEST - 3] + "...")


class ConfigError(_OneLine, ValueError):
    """A wrong setting: the message names the field or option, the value, and what is allowed."""


class CheckpointError(_OneLine):
    """A checkpoint, or another file of weights, that cannot be used: the message names it and says why."""


class DamagedError(CheckpointError):
    """A checkpoint whose content is not what was saved."""


@contextlib.contextmanager
def error_context(field: str) -> Iterator[None]:
    """Turns a ValueError into a ConfigError whose message begins with the field's name."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
