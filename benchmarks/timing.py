"""Fair timing of several contestants: they take turns in one process, and their spread is reported."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

# Time for the worker threads of the previous contestant to go to sleep; OpenMP's spin for milliseconds.
SETTLE_SECONDS = 0.005


def _nothing() -> None:
    pass


class Contestant(NamedTuple):
    """A function to be timed."""

    run: Callable[[], Any]  # does one unit of work and returns when it is finished
    prepare: Callable[[], None] = _nothing  # called before each turn, untimed, for example to set the number of threads


class Spread(NamedTuple):
    """Median and quartiles of the seconds per call."""

    median: float
    lower: float
    upper: float
    calls: int


def spread(seconds: list[float], scale: float = 1.0) -> Spread:
    """Returns median and quartiles of ``seconds``, multiplied by ``scale``; raises ValueError if there are none."""
    if not seconds:
        raise ValueError("seconds must hold at least one time; got none")
    lower, median, upper = (float(q) * scale for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return Spread(median, lower, upper, len(seconds))


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    seconds: float,
    rounds: int,
    least_calls: int = 3,
    most_seconds: float = math.inf,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times all contestants in turns, so that a slow phase of the machine affects all of them.

    In each round every contestant has one turn; the order is reversed after each round. A turn begins with one untimed
    call, because caches and threads still belong to the previous contestant; it is omitted if the last call took
    longer than a turn. Timed calls follow until ``seconds / rounds`` have passed, at least one. A contestant skips the
    remaining rounds once it has used ``seconds`` and has ``least_calls``, or once it has used ``most_seconds``.

    Args:
        contestants: name -> contestant, already compiled.
        seconds: timed seconds for each contestant over all rounds.
        rounds: turns of each contestant at most.
        least_calls: timed calls of each contestant, if there are enough rounds.
        most_seconds: timed seconds after which a contestant has no further turn.
        warm_up: whether a turn begins with an untimed call.
        clock: seconds, monotonic.

    Returns:
        name -> seconds of each timed call.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        for name in order:
            total = sum(times[name])
            if total >= most_seconds or (total >= seconds and len(times[name]) >= least_calls):
                continue
            contestant = contestants[name]
            contestant.prepare()
            time.sleep(SETTLE_SECONDS)
            if warm_up and not (times[name] and times[name][-1] > seconds / rounds):
                contestant.run()
            turn = 0.0
            while not turn or turn < seconds / rounds:
                start = clock()
                contestant.run()
                times[name].append(clock() - start)
                turn += times[name][-1]
        order.reverse()
    return times


def milliseconds(seconds: list[float]) -> dict[str, Any]:
    """Returns median and quartiles in milliseconds, and the number of calls, as entries of a row."""
    median, lower, upper, calls = spread(seconds, 1e3)
    return {"median_ms": median, "lower_quartile_ms": lower, "upper_quartile_ms": upper, "calls": calls}


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """A context without JAX's persistent cache, in which every program is compiled again."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(before)


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # JAX reads the flag only once
