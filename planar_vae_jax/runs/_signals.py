"""SIGTERM, Ctrl-C and the signals of job queues: a run finishes its step, saves if there is anything to save, and ends.

Python runs the handler of a signal in the main thread, which compiled code may hold for seconds, and a compilation for
longer. So a thread of our own reads the byte that the interpreter writes when the signal arrives.
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

_ADVICE = "run the same command again to resume"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
_lock = threading.Lock()  # guards the next two names
_finishing = False
_requested: int | None = None
_began = time.monotonic()
_late: str | None = None  # the time limit that has passed, as a flag


class Stopped(Exception):
    """A signal stopped the run after it had saved.

    Args:
        number: the number of the signal.
        where: the state that was saved, in words.
        advice: how to resume the run.
    """

    def __init__(self, number: int, where: str, advice: str = _ADVICE):
        super().__init__(f"stopped by {name(number)} {where}; {advice} from there")
        self.number = number


def name(number: int) -> str:
    """Returns ``Ctrl-C``, the signal's name, or the time limit that has passed, as a flag."""
    if number == signal.SIGTERM and _late is not None:
        return _late
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def install() -> None:
    """From now on these signals end the process at once, except inside :func:`finishing`; main thread only.

    A signal that is ignored (SIGHUP under nohup) stays ignored.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="signals").start()


def ignore() -> None:
    """From now on these signals have no effect.

    Nothing is left to stop, and while the interpreter ends, the system's default action would change the exit status.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> int | None:
    """Returns the signal that has asked the run to stop since :func:`finishing` began; None if no signal has."""
    return _requested


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stops the process, as SIGTERM would, ``seconds`` after its start; None sets no limit."""
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
    """A context in which the first signal only sets :func:`requested`, and a second Ctrl-C ends the process at once.

    It is entered while there is something to save. The caller must check :func:`requested` once more afterwards; from
    then on signals end the process at once again.
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
        _exit(number, f"stopped by {name(number)}; {_ADVICE}")
    elif first:
        tqdm.write(f"{name(number)}: finishing the step and saving; a second Ctrl-C ends at once", file=sys.stderr)
        sys.stderr.flush()
    elif number == signal.SIGINT:
        _exit(number, f"stopped at once; {_ADVICE} from the last checkpoint")


def _exit(number: int, text: str) -> None:
    """Ends the process wherever its main thread is. A file that it was writing has a temporary name."""
    print(f"\n{text}", file=sys.stderr, flush=True)
    os._exit(128 + number)
