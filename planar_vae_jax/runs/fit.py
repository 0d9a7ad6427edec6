"""The training loop of a run that can be stopped anywhere: it owns compilation, signals, metrics and checkpoints.

Training is :func:`planar_vae_jax.train.loop.train_steps`, compiled once, in calls of about a second. Between calls a
signal is answered and the losses are looked at, between epochs metrics and checkpoints are written. A checkpoint holds
all that the rest follows from, so a run that was stopped and goes on is the run in one go, bit for bit but for its
seconds. All that runs differ in is an argument of what is compiled: another seed compiles nothing.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from planar_vae_jax.runs import chunks, compiled, leaves, processes, signals
from planar_vae_jax.runs.checkpoints import Checkpoints
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.console import Progress, warn
from planar_vae_jax.runs.epochs import Done, Epochs, Pace
from planar_vae_jax.runs.files import RunError, append_json_line, cut_json_lines, finite, write_failure
from planar_vae_jax.runs.folder import RunFolder
from planar_vae_jax.runs.shared import SharedCheckpoints
from planar_vae_jax.runs.stopping import EarlyStopping, best_state, stored_state
from planar_vae_jax.statistics import means_and_errors
from planar_vae_jax.train import loop as training

Report = Callable[[Any], dict[str, float | None]]


class Fitted(NamedTuple):
    """The end of a training, or a checkpoint of it."""

    params: Any  # that figures are of: the average of a schedule-free optimiser, else the newest
    state: training.TrainState | None  # None with --eval_only, which reads the parameters alone
    lines: list[dict[str, Any]]  # of metrics.jsonl
    epoch: int  # epochs done by params
    stopped_early: bool  # whether more epochs would change nothing


def fit(
    run: RunFolder,
    loss: training.Loss,
    optimizer: optax.GradientTransformation,
    params: Any,
    key: jax.Array,
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
) -> Fitted:
    """Trains to the end, from the run's newest whole checkpoint if it has one; with ``--eval_only`` reads one.

    Line k of ``metrics.jsonl`` holds ``unit`` (its number, or the steps done), the means over the epoch's steps of the
    figures of the loss and of ``gradient_norm`` with their standard errors ``NAME_se`` (by the scatter of the steps),
    ``report(params)`` and ``seconds``; the first also ``first_NAME`` of each at the first step and of the first report.

    Args:
        run: where everything is written, and what its flags say of checkpoints.
        loss: (params, batch, key, step) -> (value to minimise [], {name: figure []}); it must close over no array.
        optimizer: an optax optimiser.
        params, key: before the first step; everything random in the training follows from the key.
        steps: of the whole run.
        steps_per_epoch: between lines of metrics; the last epoch may be shorter.
        data: a pytree of arrays ``[N, ...]``, or :class:`planar_vae_jax.data.streamed.Streamed`, shuffled anew in each
            epoch; ``None``: the loss is given no batch.
        batch_size: examples a step; needed with data.
        report: parameters that figures are of -> more figures, after each epoch.
        score: the entry of a line whose lowest value makes the best checkpoint; ``None``: none is.
        patience: the run ends after so many epochs without a better score, and its figures are of the best checkpoint;
            0: it does not end early.
        show: entries of a line to show while learning.
        unit: "epoch" or "step": what people count in.

    Returns:
        The final parameters and state, and all lines.

    Raises:
        ValueError: an epoch is to take more examples than there are; patience without a score.
        UsageError: more steps are done than the run is to have; no checkpoint to evaluate.
        RunError: a loss, a gradient or a parameter is not finite; lines of metrics are lost.
        CheckpointError: there are checkpoints but none is whole, or one cannot be written.
        signals.Stopped: by a signal; all is saved.
    """
    epochs = Epochs(steps, steps_per_epoch, unit)
    epochs.check_size(chunks.size_of(data), batch_size)
    if patience and score is None:
        raise ValueError("patience needs a score")
    early = EarlyStopping(score, patience)
    if run.eval_only:
        chosen = stored_state(run, epochs, params, early)
        return Fitted(chosen.params, None, chosen.lines, chosen.epoch, early.over(chosen.lines))
    with open_checkpoints(run, epochs) as checkpoints:
        loop = Loop(run, epochs, loss, optimizer, params, key, data, batch_size, checkpoints, early)
        loop.begin_or_go_on()
        report = run.devices.under(report)
        bar = Progress(epochs.done(epochs.number), unit, epochs.done(loop.done.epoch))
        with contextlib.closing(loop.feed), signals.finishing(), bar as progress:
            while loop.done.epoch < epochs.number and not early.over(loop.lines):
                loop.train_epoch()
                line = loop.end_epoch(report)
                progress.update(
                    line[unit], {name: line.get(name) for name in (*show, *(f"{name}_se" for name in show))}
                )
                loop.stop_if_asked()
            checkpoints.wait()
        loop.stop_if_asked()
    last, state = run.devices.local((loop.evaluated(), loop.state))
    if not patience:
        return Fitted(last, state, loop.lines, loop.done.epoch, False)
    best, epoch = best_state(run, epochs, params)
    print(f"best {score}: after {epochs.name(epochs.end(epoch))} of {epochs.name(loop.step)}", flush=True)
    return Fitted(best, state, loop.lines, epoch, early.over(loop.lines))


def open_checkpoints(run: RunFolder, epochs: Epochs) -> SharedCheckpoints:
    """Those of a training, to go on from and to write."""
    folder, keep = run.workdir / "checkpoints", run.config.keep
    return SharedCheckpoints(Checkpoints(folder, keep=keep, warn=warn, check=_check_finite, name=epochs.name))


class Loop:
    """A training under way."""

    def __init__(
        self,
        run: RunFolder,
        epochs: Epochs,
        loss: training.Loss,
        optimizer: optax.GradientTransformation,
        params: Any,
        key: jax.Array,
        data: Any,
        batch_size: int | None,
        checkpoints: SharedCheckpoints,
        early: EarlyStopping,
    ):
        self.run, self.epochs, self.checkpoints, self.early = run, epochs, checkpoints, early
        self.devices = run.devices
        self.done = Done()
        self.lines: list[dict[str, Any]] = []
        self.saved: int | None = None  # the newest checkpoint's step
        params, key = processes.arrays_of_first((params, key))
        state = compiled.init_state(params, optimizer)
        self.initial, self.key, self.state = self.devices.replicate((params, key, state))
        self.metrics = run.workdir / "metrics.jsonl"
        self.pace = Pace()
        under = self.devices.under
        size = chunks.size_of(data)
        begin = under(functools.partial(compiled.begin_epoch, size, batch_size, epochs.steps_per_epoch))
        self._steps = under(functools.partial(compiled.train_steps, loss, optimizer))
        self.feed = chunks.feed(self.devices.replicate(data), lambda epoch: begin(self.key, epoch), batch_size, epochs)
        self.empty = self.devices.replicate(
            training.empty_info(loss, self.state, self.feed.batch, key, epochs.steps_per_epoch)
        )
        self.info = self.empty

    @property
    def step(self) -> int:
        return int(self.state.step)

    def evaluated(self) -> Any:
        """The parameters that figures are of."""
        return compiled.evaluation_params(self.state)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds: all that the rest follows from, and what figures are of if that is an average."""
        average = compiled.averaged_params(self.state)
        return {"state": self.state, "info": self.info, "key": self.key, "average": average}

    def begin_or_go_on(self) -> None:
        """From the newest whole checkpoint, if there is one; the lines of metrics after it are cut off."""
        found = self.checkpoints.restore(self.tree())
        if found is not None:
            stored = self.devices.replicate(found.tree)
            self.state, self.info, self.key = (stored[name] for name in ("state", "info", "key"))
            self.done = Done(**{name: found.meta[name] for name in vars(self.done)})  # it may hold more
            self.saved = found.step
        if self.step > self.epochs.steps:
            asked = f"--{self.epochs.unit}s={self.epochs.done(self.epochs.number)}"
            raise UsageError(
                f"{asked} is less than the run in {self.run.workdir} has done, {self.epochs.name(self.step)}; name "
                "another --workdir, or draw the figures of this one by --eval_only"
            )
        self.lines = processes.on_first(cut_json_lines, self.metrics, self.done.epoch)
        self.checkpoints.begin_to_write()
        self.run.go_on(self.done.seconds, f"after {self.epochs.name(self.step)}" if found else None)

    def begin_epoch(self) -> None:
        """What the steps of the epoch that is next are given, or those that are left of it."""
        self.steps_key = self.feed.begin(self.done.epoch)
        self.info = self.info if self.done.position else self.empty

    def train_epoch(self) -> None:
        """The steps of the epoch that is next, or what is left of them."""
        self.begin_epoch()
        stop = self.epochs.length(self.done.epoch)
        while self.done.position < stop:
            self.stop_if_asked()
            most = self.feed.end(self.done.position, stop)
            end = processes.of_first(self.pace.end(self.done.position, most))
            self._train(self.done.position, end)

    def _train(self, start: int, stop: int) -> None:
        """One call of what is compiled; where a step is not finite, it is made again without that step."""
        began, before = time.perf_counter(), self.state
        rest = (*self.feed.at(start), self.steps_key, start)
        self.state, self.info = self._steps(before, self.info, *rest, stop)
        bad = compiled.first_not_finite(self.info, start, stop)  # waits for the device
        seconds = time.perf_counter() - began
        self.pace.took(stop - start, seconds)
        self.done.epoch_seconds += seconds
        self.done.position = stop if bad is None else bad
        if bad is not None:
            self.state, _ = self._steps(before, self.info, *rest, bad)
            raise self.failure(bad)

    def end_epoch(self, report: Report) -> dict[str, Any]:
        """Writes the line of metrics, then a checkpoint if one is due; returns the line."""
        done = self.done
        figures = {**self.info.figures, "gradient_norm": self.info.gradient_norm}
        steps = {name: np.asarray(values, np.float64)[: done.position] for name, values in figures.items()}
        line = means_and_errors(steps) | report(self.evaluated())
        if done.epoch == 0:
            first = {name: steps[name][0] for name in self.info.figures} | report(self.initial)
            line |= {f"first_{name}": value for name, value in first.items()}
        number = {self.epochs.unit: self.epochs.done(done.epoch + 1)}
        numbers = {name: None if value is None else float(value) for name, value in line.items()}
        whole = finite({**number, **numbers, "seconds": done.epoch_seconds})
        processes.on_first(append_json_line, self.metrics, whole)
        self.lines.append(whole)
        self.done = Done(done.epoch + 1, seconds=done.seconds)
        due = self.done.epoch % self.run.config.checkpoint_every == 0 or self.done.epoch == self.epochs.number
        if due or self.early.wants_checkpoint(self.lines):
            self.save(None if self.early.score is None else whole[self.early.score])
        return whole

    def save(self, score: float | None = None) -> None:
        """Begins to save, unless this step is saved."""
        if self.step == self.saved:
            return
        if not compiled.all_finite(self.state):
            raise self.failure(None)
        self.done.seconds = self.run.seconds()
        self.checkpoints.save(self.step, self.tree(), asdict(self.done), score=score)
        self.saved = self.step

    def stop_if_asked(self) -> None:
        """Saves and raises, if a signal has asked to stop."""
        number = processes.of_any(signals.requested())
        if number is not None:
            self.save()
            self.checkpoints.wait()
            raise signals.Stopped(number, f"after {self.epochs.name(self.step)}")

    def failure(self, position: int | None) -> RunError:
        """Writes ``failed/``; returns what is to be raised.

        Args:
            position: of the step that failed, in its epoch; the state is the one before it. ``None``: the state holds
                a parameter that is not finite.
        """
        name, folder = self.epochs.name, self.run.workdir / "failed"
        arrays: dict[str, Any] = {"state": self.state, "steps_key": jax.random.key_data(self.steps_key)}
        facts: dict[str, Any] = {"step": self.step + 1}
        if position is None:
            what, before = f"a parameter is not finite after {name(self.step)}", ""
        else:
            arrays["batch"], before = compiled.take_batch(*self.feed.at(position), position), " before that step"
            loss, norm = np.asarray(self.info.loss), np.asarray(self.info.gradient_norm)
            facts |= {"loss": str(loss[position]), "gradient_norm": str(norm[position])}
            which = "gradient" if np.isfinite(loss[position]) else "loss"
            where = f"step {position + 1} of epoch {self.done.epoch + 1}, " if self.epochs.unit == "epoch" else ""
            what = f"the {which} of {where}step {self.step + 1} of the run, is not finite"
        self.checkpoints.wait()
        good = "there is no checkpoint yet" if self.saved is None else f"the last good checkpoint: {name(self.saved)}"
        facts = {"what": what, **facts, "last_good_checkpoint": self.saved}
        processes.on_first(write_failure, folder, leaves.plain(self.devices.local(arrays)), facts)
        return RunError(
            f"{what}; {good}; {folder} holds the state{before}; a lower --learning_rate or --clip_norm=1 may help, "
            "with --overwrite"
        )


def _check_finite(tree: Any) -> None:
    """Training refuses to save such a state, but a fault of the memory may have made one."""
    if not compiled.all_finite(tree["state"]):
        raise ValueError("not every parameter is finite")
