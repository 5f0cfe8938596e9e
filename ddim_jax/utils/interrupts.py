"""Handling of Ctrl-C and SIGTERM during a command.

The first signal ends a command at once, with one line and exit code 130 or 75. No result is lost, because results are
written atomically. Code that must first save results from memory runs in `postponed`: it is then requested to stop, and
the second signal ends it at once.

Signal handlers in Python run between two instructions of the main thread. They are delayed while the main thread
compiles a program, and their exceptions are lost in callbacks of other libraries. So a separate thread waits for the
signals. Only the start of Python, before the first line of a command, is not covered.

This module imports only fast modules: every command calls `install` before its other imports.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # exit codes; 75 is os.EX_TEMPFAIL: the command can be repeated
REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
ADVICE = "run the same command to resume"

unfinished: set[os.PathLike] = set()  # temporary files of this process, which `end` removes


class _State:
    """The state that determines the effect of a signal."""

    lock = threading.Lock()
    installed = False
    postponed = False
    waiting: int | None = None  # the postponed signal
    result: int | None = None  # the exit code of the command, None while it runs


def install() -> None:
    """Starts the handling of signals, until the process ends. Further calls do nothing.

    Ctrl-C stays ignored if it is ignored, as under nohup and in the background of a shell script. Closed standard
    streams are opened on /dev/null: otherwise the next opened file would get the number of the stream, and libraries
    would print into it.
    """
    if _State.installed:
        return
    _State.installed = True
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in CODES:
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore)  # it is registered first, so it is called last
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], int | None]]:
    """A context that postpones the first signal. It yields a function that returns the number of the postponed signal,
    None if there is none. At the exit of the context, a postponed signal ends the process; an exception comes first.
    """
    with _State.lock:
        _State.postponed = True
    try:
        yield lambda: _State.waiting
    finally:
        with _State.lock:
            _State.postponed = False
    if _State.waiting is not None:
        end(_State.waiting)


@contextlib.contextmanager
def not_for_children() -> Iterator[None]:
    """A context that blocks Ctrl-C in the processes and threads that start in it. A terminal sends Ctrl-C to all
    processes, but this process ends its children.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # started before, because its start unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def done(result: int) -> None:
    """Sets the exit code of the command. From now on a signal does not change it."""
    _State.result = result


def end(number: int) -> None:
    """Ends the process as the signal with this number does."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nerror: {REASONS[number]}; {ADVICE}\n".encode())
    for file in list(unfinished):
        with contextlib.suppress(OSError):
            os.unlink(file)
    os._exit(CODES[number])


def _watch(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            if number not in CODES:  # a signal of another handler
                continue
            with _State.lock:
                if _State.result is not None:
                    os._exit(_State.result)
                if not _State.postponed or _State.waiting is not None:
                    end(number)
                _State.waiting = number


def _handler(*_) -> None:
    """A Python handler that does nothing. For a signal with a Python handler, the C handler of Python writes the number
    of the signal to the pipe, which wakes the thread.
    """


def _forget() -> None:
    """Restores the default handlers in a forked process, which does not have the thread."""
    signal.set_wakeup_fd(-1)
    for number, before in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _handler:
            signal.signal(number, before)


def _ignore() -> None:
    """Ignores signals at the exit of Python. Python removes its handlers before its end, so a signal would then change
    the exit code.
    """
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
