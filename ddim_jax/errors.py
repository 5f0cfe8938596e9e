"""The errors that a command prints as one line, and ends with exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
    """A wrong setting: the message names the field or option, the value, and what is allowed."""


class CheckpointError(Exception):
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
