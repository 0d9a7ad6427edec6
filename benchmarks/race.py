"""Several trainings take turns until each reaches a target; only the time of training is counted."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from benchmarks.timing import SETTLE_SECONDS


class Training(Protocol):
    """A training of this package or of PyTorch."""

    def compile(self) -> None:
        """Compiles everything without taking a step."""

    def train(self, steps: int) -> None:
        """Takes the next steps and returns when they are done."""

    def params(self) -> Any:
        """Returns the parameters to evaluate, in the form of this package's model."""


class Point(NamedTuple):
    """A point of a training curve."""

    epochs: float
    seconds: float  # of training alone
    free_energy: float  # mean over the test images, nats


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
    """Trains half an epoch of each training in turns, so that a slow phase of the machine affects all of them.

    The order is reversed after each round.

    Args:
        trainings: name -> training, compiled.
        evaluate: parameters -> test free energy, nats; its time is not counted.
        target: a training ends when its free energy is at most this, or is not finite.
        epoch_steps: steps per epoch.
        max_epochs: a training ends after this many epochs in any case.
        show: called with each point.
        clock: seconds, monotonic.

    Returns:
        name -> curve, beginning with the initial parameters.
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
    """Returns the first point whose free energy is at most the target, or None."""
    return next((point for point in curve if point.free_energy <= target), None)
