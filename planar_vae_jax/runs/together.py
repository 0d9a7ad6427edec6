"""Runs that differ in their seed alone, trained together: one compiled program with a leading axis of seeds.

Each has its own folder, metrics and checkpoints, as if it were trained alone, so either way goes on from what the other
has left. What the seeds compute is what they compute alone to the rounding of float32, as products of several seeds at
once may sum in another order; trained together again, from wherever they were stopped, it is the same bit for bit.

The program has as many seeds as there are runs, always. One that has ended (early stopping), or that is ahead of the
others (as they were killed between two saves), waits: another one's steps are taken in its place and dropped.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from planar_vae_jax.runs import chunks, compiled, signals
from planar_vae_jax.runs.console import Progress
from planar_vae_jax.runs.epochs import Epochs, Pace
from planar_vae_jax.runs.files import RunError
from planar_vae_jax.runs.fit import Loop, Report, open_checkpoints
from planar_vae_jax.runs.folder import RunFolder
from planar_vae_jax.runs.stopping import EarlyStopping
from planar_vae_jax.statistics import means_and_errors
from planar_vae_jax.train import loop as training

Line = dict[str, Any]


class Seed(NamedTuple):
    """One of the runs: what it does not share with the others; see :func:`planar_vae_jax.runs.fit.fit`."""

    run: RunFolder
    params: Any
    key: jax.Array


def fit_together(
    seeds: Sequence[Seed],
    loss: training.Loss,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    steps_per_epoch: int,
    data: Any = None,
    batch_size: int | None = None,
    report: Report = lambda params: {},
    score: str | None = None,
    patience: int = 0,
    show: Sequence[str] = (),
    unit: str = "epoch",
) -> None:
    """Trains each of several runs to its end; :func:`planar_vae_jax.runs.fit.fit` then finds nothing left to train.

    Where a run computes on several devices, they share the seeds out (``mesh.in_shares``); their
    number divides that of the seeds. The seconds of training are shared out evenly.

    Args:
        seeds: of one process, all on the same devices; those of finished runs are left out.
        loss, optimizer, steps, ...: see there; each run has the same.
        show: what is shown of it while learning is the mean over the runs that were trained, and its standard error.

    Raises:
        RunError: as there, naming the run; all others are saved.
        UsageError, CheckpointError, signals.Stopped: as there; of a signal, all are saved.
    """
    seeds = [seed for seed in seeds if not seed.run.finished]
    if not seeds:
        return
    devices, epochs = seeds[0].run.devices, Epochs(steps, steps_per_epoch, unit)
    epochs.check_size(chunks.size_of(data), batch_size)
    data = devices.replicate(data)
    loops: list[Loop] = []
    with contextlib.ExitStack() as stack:
        for run, params, key in seeds:
            run.sharing = len(seeds)
            checkpoints = stack.enter_context(open_checkpoints(run, epochs))
            early = EarlyStopping(score, patience)
            loops.append(Loop(run, epochs, loss, optimizer, params, key, data, batch_size, checkpoints, early))
            loops[-1].begin_or_go_on()
        group = _Group(loops, loss, optimizer, data)
        with signals.finishing(), Progress(epochs.done(epochs.number), unit, epochs.done(group.epoch)) as progress:
            while group.unfinished():
                lines = group.train(devices.under(report))
                if lines:
                    progress.update(epochs.done(group.epoch), _means(lines, show))
                group.stop_if_asked()
            group.save()
        group.stop_if_asked()


class _Group:
    """Trainings under way."""

    def __init__(
        self, loops: Sequence[Loop], loss: training.Loss, optimizer: optax.GradientTransformation, data: Any
    ) -> None:
        self.loops, self.data, self.epochs, self.devices = loops, data, loops[0].epochs, loops[0].devices
        self._take = self.devices.under(compiled.take_seed)
        self._steps = self.devices.under(functools.partial(compiled.train_together, loss, optimizer))
        self._held: tuple[Sequence[Loop], Any] | None = None  # those that were trained last, and their states as one
        self.pace = Pace()

    @property
    def epoch(self) -> int:
        """How many epochs all have done that are not over."""
        return min((loop.done.epoch for loop in self.unfinished()), default=max(loop.done.epoch for loop in self.loops))

    def unfinished(self) -> list[Loop]:
        """Those that are not over."""
        last = self.epochs.number
        return [loop for loop in self.loops if loop.done.epoch < last and not loop.early.over(loop.lines)]

    def train(self, report: Report) -> list[Line]:
        """Those that are least far, to the end of their epoch or to where others are; the lines, where it ended."""
        places = [(loop.done.epoch, loop.done.position) for loop in self.unfinished()]
        epoch, start = min(places)
        length = self.epochs.length(epoch)
        stop = min((position for other, position in places if other == epoch and position > start), default=length)
        least = [loop for loop in self.unfinished() if (loop.done.epoch, loop.done.position) == (epoch, start)]
        self._train(least, start, stop)
        if least[0].done.position < length:
            return []
        return self._each(least, lambda loop: loop.end_epoch(report))

    def _train(self, active: Sequence[Loop], start: int, stop: int) -> None:
        """These steps of the epoch that ``active`` are at, in calls of about a second; or until a signal comes."""
        for loop in active:
            loop.begin_epoch()
        seeds = [loop if loop in active else active[0] for loop in self.loops]
        info, order, key = self.devices.stack([(loop.info, loop.feed.at(start)[1], loop.steps_key) for loop in seeds])
        held, state = self._held or (None, None)
        if held != active:
            state = self.devices.stack([loop.state for loop in seeds])
        while start < stop and signals.requested() is None:
            began, before, end = time.perf_counter(), (state, info), self.pace.end(start, stop)
            state, info = self._steps(*before, self.data, order, key, start, end)
            bad = self._first_not_finite(active, info, start, end)  # waits for the device
            seconds = time.perf_counter() - began
            self.pace.took(end - start, seconds)
            for loop in active:
                loop.done.epoch_seconds += seconds / len(active)
            if bad is not None:
                loop, position = bad
                found = self._take(info, self.loops.index(loop))
                state, info = self._steps(*before, self.data, order, key, start, position)
                self._hand_out(active, state, info, position)
                loop.info = found
                raise self._failure(loop, loop.failure(position))
            start = end
        self._hand_out(active, state, info, start)

    def _first_not_finite(
        self, active: Sequence[Loop], info: training.StepInfo, start: int, stop: int
    ) -> tuple[Loop, int] | None:
        """The run, and the step of the epoch."""
        loss, norm = np.asarray(info.loss), np.asarray(info.gradient_norm)
        found = []
        for seed, loop in enumerate(self.loops):
            position = compiled.first_not_finite(training.StepInfo(loss[seed], norm[seed], {}), start, stop)
            if loop in active and position is not None:
                found.append((loop, position))
        return min(found, key=lambda one: one[1], default=None)

    def _hand_out(self, active: Sequence[Loop], state: Any, info: Any, position: int) -> None:
        """Gives each its own of what has been computed."""
        self._held = active, state
        for seed, loop in enumerate(self.loops):
            if loop in active:
                loop.state, loop.info = self._take((state, info), seed)
                loop.done.position = position

    def save(self) -> None:
        """Saves all, and waits until that is done."""
        self._each(self.loops, Loop.save)
        self._each(self.loops, lambda loop: loop.checkpoints.wait())

    def stop_if_asked(self) -> None:
        """Saves and raises, if a signal has asked to stop."""
        number = signals.requested()
        if number is not None:
            self.save()
            raise signals.Stopped(number, f"after {self.epochs.name(min(loop.step for loop in self.loops))}")

    def _each(self, loops: Sequence[Loop], action: Callable[[Loop], Any]) -> list[Any]:
        results = []
        for loop in loops:
            try:
                results.append(action(loop))
            except RunError as error:
                raise self._failure(loop, error) from error
        return results

    def _failure(self, failed: Loop, error: RunError) -> RunError:
        """The error with its run's name, after all others have been saved."""
        for loop in self.loops:
            if loop is not failed:
                with contextlib.suppress(RunError):  # the first one tells more
                    loop.save()
                    loop.checkpoints.wait()
        return type(error)(f"{failed.run.workdir.name}: {error}")


def _means(lines: Sequence[Line], show: Sequence[str]) -> dict[str, float | None]:
    """Over runs, with standard errors; of one run, that of its steps."""
    if len(lines) == 1:
        return {name: lines[0].get(name) for name in (*show, *(f"{name}_se" for name in show))}
    return means_and_errors({name: np.array([line.get(name) for line in lines], np.float64) for name in show})
