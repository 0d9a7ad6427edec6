"""Training that can be stopped anywhere: a fold over units (epochs, say), each a few compiled calls.

Between calls a signal is answered, between units metrics and checkpoints are written. A checkpoint holds all that the
rest follows from, so a run that was stopped and goes on is the run in one go, bit for bit but for its seconds.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import signals
from experiments.files import RunError, finite, replacing, write_json
from experiments.flags import UsageError
from experiments.resuming import ResumableRun
from experiments.runs import Progress
from planar_vae_jax import training
from planar_vae_jax.checkpoints import Checkpoints


class Course(NamedTuple):
    """What one experiment's training consists of. Steps are numbered as the entries of its ``info`` are."""

    name: str  # of a unit, for people
    units: int
    span: Callable[[int], tuple[int, int]]  # unit -> its first step, and the one after its last
    data: Callable[[int, jax.Array], Any]  # (unit, the run's key) -> what `piece` and `batch` are given
    piece: Callable[..., tuple[training.TrainState, training.StepInfo, jax.Array]]  # (data, state, info, start, stop)
    batch: Callable[[Any, int], dict[str, Any]]  # (data, step) -> the arrays of that step, for a failure
    report: Callable[[int, training.TrainState, training.StepInfo], dict[str, Any]]  # unit -> a line of metrics
    score: str  # the entry of that line by which the best checkpoint is chosen, the lowest
    shown: dict[str, str]  # entries of that line to show while learning, by name
    units_per_checkpoint: int


class Fitted(NamedTuple):
    """The end of a training, or a checkpoint of it."""

    state: training.TrainState
    info: training.StepInfo
    lines: list[dict[str, Any]]  # of metrics.jsonl
    final: bool  # whether the training is over


@dataclass
class Log:
    """What a checkpoint holds beside its arrays, as JSON."""

    unit: int = 0  # units done
    position: int = 0  # steps done of the next
    unit_seconds: float = 0.0  # spent on it
    seconds: float = 0.0  # spent on the run
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    def where(self, name: str) -> str:
        return f"after {name} {self.unit}" + (f" and {self.position} steps" if self.position else "")


def fit(
    course: Course, state: training.TrainState, info: training.StepInfo, key: jax.Array, run: ResumableRun
) -> Fitted:
    """Trains to the end, from the newest whole checkpoint if there is one, else from the arguments.

    Args:
        state: before the first step.
        info: :func:`training.empty_info` of the course.
        key: the run's key.

    Raises:
        UsageError: more units are done than the course has.
        RunError: a loss, a gradient or a parameter is not finite.
        CheckpointError: there are checkpoints but none is whole, or one cannot be written.
        signals.Stopped: by a signal; all is saved.
    """
    with run.checkpoints(_check_finite) as checkpoints, signals.finishing():
        return _Fit(course, run, checkpoints).go(state, info, key)


def load(
    course: Course,
    state: training.TrainState,
    info: training.StepInfo,
    key: jax.Array,
    run: ResumableRun,
    which: str,
) -> Fitted:
    """The ``latest`` whole checkpoint or the ``best``, with the run's folder set for its figures.

    Raises:
        UsageError: there is none.
        CheckpointError: none is whole, or the best is damaged.
    """
    like = {"state": state, "info": info, "key": key}
    with run.checkpoints(_check_finite) as checkpoints:
        best = checkpoints.best_step if which == "best" else None
        if which == "best" and best is None:
            raise UsageError(f"--checkpoint=best: {run.workdir} has no checkpoint with a loss yet")
        found = checkpoints.restore(like) if best is None else checkpoints.restore_step(best, like)
    if found is None:
        raise UsageError(f"--eval_only needs a checkpoint; {run.workdir} has none yet")
    log = Log(**found.meta)
    if not log.lines:
        raise UsageError(f"--eval_only needs a whole {course.name}; {run.workdir} is at step {found.step} of its first")
    final = (log.unit, log.position) == (course.units, 0)
    run.evaluate_into(found.step, final, log.seconds)
    return Fitted(found.tree["state"], found.tree["info"], log.lines, final)


class _Fit:
    """One process's part of a training."""

    def __init__(self, course: Course, run: ResumableRun, checkpoints: Checkpoints):
        self.course, self.run, self.checkpoints = course, run, checkpoints
        self.log = Log()
        self.key: jax.Array | None = None
        self.saved: int | None = None  # the newest checkpoint's step

    def go(self, state: training.TrainState, info: training.StepInfo, key: jax.Array) -> Fitted:
        course, run = self.course, self.run
        found = self.checkpoints.restore({"state": state, "info": info, "key": key})
        if found is not None:
            state, info, key = (found.tree[name] for name in ("state", "info", "key"))
            self.log, self.saved = Log(**found.meta), found.step
        log, self.key = self.log, key
        if (log.unit, log.position) > (course.units, 0):
            raise UsageError(
                f"--{course.name}s={course.units} is less than what the run in {run.workdir} has done "
                f"({log.where(course.name)})"
            )
        run.go_on(log.lines, log.seconds, log.where(course.name) if found else None)
        pace, progress = training.Pace(), Progress(course.units, course.name, log.unit)
        while log.unit < course.units:
            data = course.data(log.unit, key)
            start, stop = course.span(log.unit)
            started = time.perf_counter()
            state, info, reached, failed = training.run_pieces(
                functools.partial(course.piece, data),
                state,
                info,
                start + log.position,
                stop,
                pace=pace,
                stopping=lambda: signals.requested() is not None,
            )
            log.unit_seconds += time.perf_counter() - started
            log.position = reached - start
            if failed:
                raise self.failure(state, info, reached, course.batch(data, reached))
            if reached < stop:
                raise self.stopped(state, info)
            line = {**course.report(log.unit, state, info), "seconds": log.unit_seconds}
            log.lines.append(finite(line))
            log.unit, log.position, log.unit_seconds = log.unit + 1, 0, 0.0
            run.write_metrics(log.lines)
            progress.update(1, **{name: line[entry] for name, entry in course.shown.items()})
            if log.unit % course.units_per_checkpoint == 0 or log.unit == course.units:
                self.save(state, info, line[course.score])
            if signals.requested() is not None:
                raise self.stopped(state, info)
        progress.close()
        return Fitted(state, info, log.lines, True)

    def save(self, state: training.TrainState, info: training.StepInfo, score: float | None = None) -> None:
        """Begins to save, unless this step is saved."""
        step = int(state.step)
        if step == self.saved:
            return
        if not bool(_all_finite(state)):
            raise self.failure(state, info, None, {})
        self.log.seconds = self.run.seconds()
        tree = {"state": state, "info": info, "key": self.key}
        self.checkpoints.save(step, tree, asdict(self.log), score=finite(score))
        self.saved = step

    def stopped(self, state: training.TrainState, info: training.StepInfo) -> signals.Stopped:
        """Saves; returns what is to be raised."""
        self.save(state, info)
        self.checkpoints.wait()
        number = signals.requested()
        assert number is not None
        return signals.Stopped(number, self.log.where(self.course.name))

    def failure(
        self, state: training.TrainState, info: training.StepInfo, step: int | None, batch: dict[str, Any]
    ) -> RunError:
        """Writes ``failed/``; returns what is to be raised.

        Args:
            state: before the ``step`` that failed; with ``step=None``, one with a parameter that is not finite.
            batch: what that step was given.
        """
        name, log = self.course.name, self.log
        if step is None:
            loss = norm = None
            what = f"a parameter is not finite {log.where(name)}"
        else:
            loss, norm = float(info.loss[step]), float(info.gradient_norm[step])
            which = "gradient" if math.isfinite(loss) else "loss"
            what = (
                f"the {which} of step {log.position + 1} of {name} {log.unit + 1} is not finite "
                f"(step {int(state.step) + 1} of the run)"
            )
        folder = self.run.workdir / "failed"
        folder.mkdir(exist_ok=True)
        arrays = {
            jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        }
        arrays |= {f"batch.{key}": array for key, array in batch.items()}
        with replacing(folder / "state.npz") as temporary:
            np.savez(temporary, **{key: np.asarray(array) for key, array in arrays.items()})  # type: ignore[arg-type]
        self.checkpoints.wait()
        good = (
            "there is no checkpoint yet" if self.saved is None else f"the last good checkpoint is of step {self.saved}"
        )
        facts = {
            "what": what,
            name: log.unit + 1,
            f"step_of_{name}": log.position + 1,
            "step": int(state.step) + 1,
            "loss": str(loss),  # JSON has no NaN
            "gradient_norm": str(norm),
            "last_good_checkpoint": self.saved,
        }
        write_json(folder / "failure.json", facts)
        return RunError(
            f"{what}; {good}; {folder} holds the state{'' if step is None else ' before that step'}; "
            "try a lower --learning_rate or --clip_norm=1, with --overwrite"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _check_finite(tree: Any) -> None:
    """Training refuses to save such a state, but a fault of the memory may have made one."""
    if not _all_finite(tree["state"]):
        raise ValueError("not every parameter is finite")
