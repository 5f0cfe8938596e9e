"""Ctrl-C and SIGTERM, from the first line of a command to its last.

A command ends at the first signal, with one line and exit code 130 or 75, wherever it is. Nothing is lost: results are
written whole or not at all. Only what has work in memory that should be saved first, within `postponed`, is asked to
stop; the second signal ends that too.

Python's own handlers run between two instructions of the main thread. While that compiles a program they wait, and
their exception is lost in the callbacks of other libraries. So here a thread waits for the signals. Only Python's own
start, before the first line of a command, is out of reach.

It imports nothing that takes time: every command calls `install` before its other imports.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75 is EX_TEMPFAIL of sysexits.h: run it again
REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
ADVICE = "the same command goes on from what is done"

unfinished: set[os.PathLike] = set()  # temporary files of this process, removed when a signal ends it


class _State:
    """What a signal does now."""

    lock = threading.Lock()
    installed = False
    postponed = False
    waiting: int | None = None  # the signal that was postponed
    result: int | None = None  # the exit code, once there is one


def install() -> None:
    """Watches for signals until the process ends. Ctrl-C stays ignored where it is: by nohup, and in the background of
    a shell script. A standard stream that is closed is opened on /dev/null: otherwise the next file took its number,
    and with it what libraries print. A second call does nothing.
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
    atexit.register(_ignore)  # registered first, so called last
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], int | None]]:
    """Within it the first signal waits, and the function that it yields returns its number. At the end a signal that
    waits ends the process, unless an exception does.
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
    """Processes and threads that start within it do not see Ctrl-C, which a terminal sends to all: this one ends
    them.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # where it starts it lets Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def done(result: int) -> None:
    """The command has its exit code, which a signal changes no more."""
    _State.result = result


def end(number: int) -> None:
    """Ends the process as this signal does."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nerror: {REASONS[number]}; {ADVICE}\n".encode())
    for file in list(unfinished):
        with contextlib.suppress(OSError):
            os.unlink(file)
    os._exit(CODES[number])


def _watch(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            if number not in CODES:  # of another handler
                continue
            with _State.lock:
                if _State.result is not None:
                    os._exit(_State.result)
                if not _State.postponed or _State.waiting is not None:
                    end(number)
                _State.waiting = number


def _handler(*_) -> None:
    """A signal with a handler of Python's has one in C, which wakes the thread."""


def _forget() -> None:
    """In a process forked from this one, which has no such thread."""
    signal.set_wakeup_fd(-1)
    for number, before in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _handler:
            signal.signal(number, before)


def _ignore() -> None:
    """Python takes its handlers away before it has ended, and the exit code would be the signal's."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
