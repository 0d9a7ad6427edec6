"""SIGTERM and Ctrl-C: a run finishes its step and saves, if there is anything to save.

Python runs a signal's handler in the main thread, which compiled code may hold for seconds (longer while it is being
compiled). So the bytes that the interpreter writes at the signal itself are read by a thread of our own.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

advice = "run the same command again to go on"  # to be changed where that is wrong
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_lock = threading.Lock()  # of the two that follow
_finishing = False
_requested: int | None = None
_began = time.monotonic()
_late: str | None = None  # the flag whose time is over


class Stopped(Exception):
    """The run was told to stop, and has saved; its argument is the signal's number."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {name(number)} {where}; {advice} from there")
        self.number = number


def name(number: int) -> str:
    """``SIGTERM`` or ``Ctrl-C``, or what has asked in the place of the former."""
    if number == signal.SIGTERM and _late is not None:
        return _late
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def install() -> None:
    """From now on SIGTERM and Ctrl-C end the process at once, but for :func:`finishing`; main thread only."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="signals").start()


def ignore() -> None:
    """From now on they have no effect: nothing is left to stop, and the interpreter, in its own end, would let the
    system's default act, with another status.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> int | None:
    """The signal that asked to stop since :func:`finishing` began, if any did."""
    return _requested


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """As SIGTERM, so many seconds after the start of the process."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(max(0.0, _began + seconds - time.monotonic()), _time_is_over, (seconds,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _time_is_over(seconds: float) -> None:
    global _late
    _late = f"--max_seconds={seconds:g}"
    _receive(signal.SIGTERM)


@contextmanager
def finishing() -> Iterator[None]:
    """While there is something to save: the first signal only sets :func:`requested`, a second Ctrl-C ends at once.

    Whoever uses it asks :func:`requested` once more afterwards: from then on signals end the process at once again.
    """
    global _finishing, _requested
    with _lock:
        _finishing, _requested = True, None
    try:
        yield
    finally:
        with _lock:
            _finishing = False


def _listen(reader: socket.socket) -> None:
    while True:
        for number in reader.recv(16):
            if number in _SIGNALS:
                _receive(number)


def _receive(number: int) -> None:
    global _requested
    with _lock:
        finishing, first = _finishing, _requested is None
        if finishing and first:
            _requested = number
    if not finishing:
        _exit(number, f"stopped by {name(number)}; {advice}")
    elif first:
        tqdm.write(f"{name(number)}: finishing the step and saving; a second Ctrl-C ends at once", file=sys.stderr)
        sys.stderr.flush()
    elif number == signal.SIGINT:
        _exit(number, f"stopped at once; {advice} from the last checkpoint")


def _exit(number: int, text: str) -> None:
    """Ends the process wherever its main thread is. What it was writing has a temporary name."""
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(128 + number)
