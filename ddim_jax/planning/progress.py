"""Progress of a compilation, which takes minutes and says nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

SECONDS = 20  # between two lines


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Prints to stderr that something is compiled, and every SECONDS that it still is."""
    done, begin = threading.Event(), time.monotonic()
    note = lambda text: print(text, file=sys.stderr, flush=True)
    note(f"compiling {what}")

    def repeat() -> None:
        while not done.wait(SECONDS):
            note(f"still compiling {what}, {time.monotonic() - begin:.0f} s")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    note(f"compiled {what} in {time.monotonic() - begin:.0f} s")
