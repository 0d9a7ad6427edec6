"""Timing that is fair between contestants: taken in turns, in one process, and reported with its spread."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

# Worker threads of the last contestant (OpenMP's spin for milliseconds) have gone to sleep by then.
SETTLE_SECONDS = 0.005


def _nothing() -> None:
    pass


class Contestant(NamedTuple):
    """Something to be timed."""

    run: Callable[[], Any]  # one unit of work, finished when it returns
    prepare: Callable[[], None] = _nothing  # before each turn, untimed: for example the number of threads


class Spread(NamedTuple):
    """Seconds a call: median and quartiles over all calls."""

    median: float
    lower: float
    upper: float
    calls: int


def spread(seconds: list[float], scale: float = 1.0) -> Spread:
    """Median and quartiles of ``seconds``, each multiplied by ``scale``."""
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
    """Times all contestants in turns, so that a slow spell of the machine meets all of them.

    In each round every contestant has one turn, in an order that is reversed from round to round. A turn is one call
    that is not timed (caches and threads are the last contestant's; left out where a call is longer than a turn),
    then timed calls until ``seconds / rounds`` are over: one at least. A slow contestant that has had its ``seconds``
    and ``least_calls``, or ``most_seconds``, sits out the rounds left.

    Args:
        contestants: name -> contestant, compiled already.
        seconds: timed seconds for each contestant, over all rounds.
        rounds: turns of each contestant, at most.
        least_calls: timed calls of each contestant, if there are rounds enough.
        most_seconds: timed seconds after which nobody has another turn.
        warm_up: whether a turn begins with a call that is not timed.
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
    """Median, quartiles and number of calls, for a row."""
    median, lower, upper, calls = spread(seconds, 1e3)
    return {"median_ms": median, "lower_quartile_ms": lower, "upper_quartile_ms": upper, "calls": calls}


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Nothing is taken from JAX's persistent cache of compiled programs."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(before)


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # JAX looks at the flag once
