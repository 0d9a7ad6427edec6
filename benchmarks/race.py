"""Trainings taken in turns until each has reached a target; the clock runs only while they train."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from benchmarks.timing import SETTLE_SECONDS


class Training(Protocol):
    """Ours, or PyTorch's."""

    def compile(self) -> None:
        """Makes everything ready by taking no step."""

    def train(self, steps: int) -> None:
        """Takes the next steps; they are done when it returns."""

    def params(self) -> Any:
        """Those that the model is judged by, as ours."""


class Point(NamedTuple):
    """Of a curve."""

    epochs: float
    seconds: float  # of training alone
    free_energy: float  # of the test images, nats


def race(
    trainings: Mapping[str, Training],
    evaluate: Callable[[Any], float],
    *,
    target: float,
    epoch_steps: int,
    max_epochs: int,
    show: Callable[[str, Point], None] = lambda name, point: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Point]]:
    """Half an epoch of each in turns, so that a slow spell of the machine meets all of them.

    The order is reversed from round to round.

    Args:
        trainings: name -> training, compiled.
        evaluate: parameters -> test free energy, nats; not on the clock.
        target: a training is over when it is first at most that, or is not finite.
        epoch_steps: steps an epoch.
        max_epochs: after which nobody goes on.
        show: is given each point.

    Returns:
        name -> its curve, from the first weights on.
    """
    curves = {name: [Point(0.0, 0.0, evaluate(training.params()))] for name, training in trainings.items()}
    order = list(trainings)
    for half in range(1, 2 * max_epochs + 1):
        steps = half * epoch_steps // 2 - (half - 1) * epoch_steps // 2
        for name in order:
            last = curves[name][-1]
            if last.free_energy <= target or not math.isfinite(last.free_energy):
                continue
            time.sleep(SETTLE_SECONDS)
            start = clock()
            trainings[name].train(steps)
            seconds = last.seconds + clock() - start
            curves[name].append(Point(half / 2, seconds, evaluate(trainings[name].params())))
            show(name, curves[name][-1])
        order.reverse()
    return curves


def reached(curve: list[Point], target: float) -> Point | None:
    """The first point at the target, or None."""
    return next((point for point in curve if point.free_energy <= target), None)
