"""What tests assert of an error: its class, and the names and values in its message. The sentence is free."""

import contextlib
import re

import pytest


def missing(message, *words):
    """Those of the words that the message does not contain as whole words: "eta" is not in "beta", "1" not in "1.5"."""
    found = lambda word: re.search(rf"(?<!\w)(?<!\d\.){re.escape(word)}(?!\w|\.\d)", message)
    return [word for word in words if not found(word)]


def assert_names(message, *words):
    """The message must be one line that contains every word, such as a field, an option, a file or a value."""
    assert "\n" not in message.strip(), message
    assert not missing(message, *words), (missing(message, *words), message)


@contextlib.contextmanager
def raises(error, *words):
    """`pytest.raises`; the message must be one line that contains every word as a whole word."""
    with pytest.raises(error) as caught:
        yield caught
    assert_names(str(caught.value), *words)
