"""The training loop of a run that can be stopped anywhere.

Training is :func:`planar_vae_jax.train.loop.train_steps`, compiled once and called for about a second at a time.
Between two calls a signal is answered and the losses are checked; between two epochs metrics and checkpoints are
written. A checkpoint holds everything that the rest of the run is computed from, so a run that is stopped and resumed
has the bits of an uninterrupted one. Runs of the same shapes share their programs, as everything in which they differ
(seed, data, step) is an argument.

Several seeds train together if ``key`` is a vector of keys: state, metrics and checkpoints then have a leading axis of
seeds (:mod:`planar_vae_jax.runs.sweep`).
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.data.streamed import Streamed
from planar_vae_jax.keys import is_key
from planar_vae_jax.runs import _hosts, _signals
from planar_vae_jax.runs._feed import feed
from planar_vae_jax.runs._files import (
    RunError,
    append_json_line,
    cut_json_lines,
    finite,
    read_json_lines,
    write_failure,
)
from planar_vae_jax.runs._tensorboard import Events
from planar_vae_jax.runs.checkpoints import (
    CheckpointError,
    Checkpoints,
    NoCheckpointError,
    Stored,
    fill_params,
    named_arrays,
    read_checkpoint,
)
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.console import Progress, say, warn
from planar_vae_jax.runs.folder import RunFolder
from planar_vae_jax.statistics import mean_and_error, means_and_errors
from planar_vae_jax.train import loop, mesh, optimizers

Report = Callable[[Any], dict[str, float | None]]
Line = dict[str, Any]

_CALL_SECONDS = 1.0  # how long a call of the compiled steps should last


class Fitted(NamedTuple):
    """The end of a training, or one of its checkpoints."""

    params: Any  # the parameters to evaluate: the average of a schedule-free optimiser, else the newest
    state: loop.TrainState | None  # None with --eval_only, which reads the parameters alone
    lines: list[Line]  # the lines of metrics.jsonl
    epoch: int  # the number of epochs that ``params`` were trained for
    stopped_early: bool  # whether more epochs would change nothing


def fit(
    run: RunFolder,
    loss: loop.Loss,
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
    """Trains to the end, from the newest whole checkpoint if there is one; with ``--eval_only`` reads a checkpoint.

    Line k of ``metrics.jsonl`` is about epoch k. It holds

    - ``unit``: the number of epochs, or of steps, that are done;
    - for each figure of the loss and for ``gradient_norm``, the mean over the steps of the epoch, and its standard
      error ``NAME_se`` from the scatter of the steps;
    - the figures of ``report(params)``, and ``seconds``, the time that its steps took;
    - in the first line also ``first_NAME``: each figure at the first step and in the report on the initial parameters.

    With several seeds, each figure is a list.

    Args:
        run: the folder into which everything is written; its flags say which checkpoints to keep.
        loss: (params, batch, key, step) -> (value to minimise [], {name: figure []}). Runs of the same shapes that pass
            the same function object share their programs. The function must not close over arrays.
        optimizer: an optax optimiser.
        params: the initial parameters, a pytree of arrays such as a Flax module; for seeds, with a leading axis.
        key: the PRNG key from which everything random in the training is derived; for seeds ``[S]``.
        steps: the number of steps of the whole run.
        steps_per_epoch: steps between two lines of metrics; the last epoch may be shorter.
        data: a pytree of arrays ``[N, ...]``, or :class:`planar_vae_jax.data.streamed.Streamed` examples, in a new
            random order in each epoch; None: the loss gets None as its batch.
        batch_size: examples per step; needed with data.
        report: parameters to evaluate -> more figures, after each epoch.
        score: the entry of a line whose lowest value makes the best checkpoint; None: there is no best checkpoint.
        patience: the run ends after this many epochs without a better score, and its parameters are those of the best
            checkpoint; 0: the run never ends early.
        show: entries of a line to show while training.
        unit: "epoch" or "step": what progress and messages count.

    Returns:
        The parameters to evaluate, the last state, and the lines of metrics.

    Raises:
        ValueError: the key is no PRNG key; an epoch takes more examples than there are; patience without a score;
            several seeds with a score or with streamed examples; a loss that does not return a value and a dict of
            scalars.
        UsageError: the stored run has already taken more than ``steps`` steps; there is no checkpoint to evaluate.
        RunError: a loss, a gradient or a parameter is not finite; lines of metrics are lost.
        CheckpointError: there are checkpoints but none is whole, or one cannot be written.

    A signal stops the run: everything is saved, then ``_signals.Stopped`` is raised.
    """
    epochs = _Epochs(steps, steps_per_epoch, unit)
    epochs.check(data, batch_size)
    if patience and score is None:
        raise ValueError("patience needs a score")
    _check_key(key)
    if key.ndim and score is not None:
        raise ValueError(f"several seeds have no best checkpoint in common: score must be None; got {score!r}")
    if key.ndim and isinstance(data, Streamed):
        raise ValueError("several seeds need examples that are whole on the devices; got streamed ones")
    stopping = _Stopping(score, patience)
    if run.config.eval_only:
        return _stored_run(run, epochs, params, stopping)
    folder = run.workdir / "checkpoints"
    with (
        run.devices.active(),
        Checkpoints(folder, keep=run.config.keep, warn=warn, name=epochs.name) as checkpoints,
    ):
        training = _Training(run, epochs, stopping, checkpoints, loss, optimizer, params, key, data, batch_size)
        training.begin_or_resume(report)
        bar = Progress(epochs.done(epochs.number), unit, epochs.done(training.done.epoch))
        with contextlib.closing(training), _signals.finishing(), bar as progress:
            while training.done.epoch < epochs.number and not stopping.is_over(training.lines):
                training.train_epoch()
                line = training.end_epoch(report)
                progress.update(line[unit], _shown(line, show))
                training.stop_if_asked()
            checkpoints.wait()
        training.stop_if_asked()
    run.trained(training.lines, best=patience > 0)
    last, state = run.devices.local((training.evaluated(), training.state))
    if not patience:
        return Fitted(last, state, training.lines, training.done.epoch, False)
    found = _read(run, epochs, "best")
    epoch = int(found.meta["epoch"])
    say(f"best {score}: after {epochs.name(epochs.end(epoch))} of {epochs.name(training.step)}")
    return Fitted(_params(run, found, params), state, training.lines, epoch, stopping.is_over(training.lines))


def _check_key(key: Any) -> None:
    if not (is_key(key) and key.ndim <= 1):  # a raw key, an array of two words, would be taken for two seeds
        raise ValueError(f"key must be made by jax.random.key, or be a vector of such keys; got {key!r}")


# --- How far a run is


class _Epochs(NamedTuple):
    """The steps of a run, divided into epochs; the last epoch may be shorter."""

    steps: int
    steps_per_epoch: int
    unit: str  # "epoch" or "step"

    @property
    def number(self) -> int:
        """The number of epochs."""
        return -(-self.steps // self.steps_per_epoch)

    def check(self, data: Any, batch_size: int | None) -> None:
        size = _size(data)
        if size is not None and not 1 <= self.steps_per_epoch * (batch_size or size + 1) <= size:
            raise ValueError(
                f"an epoch takes each of the {size} examples of data at most once; got "
                f"steps_per_epoch={self.steps_per_epoch} of batch_size={batch_size}"
            )

    def length(self, epoch: int) -> int:
        """Returns the number of steps of an epoch."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def end(self, epochs: int) -> int:
        """Returns the number of steps done after ``epochs`` epochs."""
        return min(self.steps, epochs * self.steps_per_epoch)

    def done(self, epochs: int) -> int:
        """Returns what messages count after ``epochs`` epochs: epochs, or steps."""
        return epochs if self.unit == "epoch" else self.end(epochs)

    def name(self, step: int) -> str:
        """Returns the state after ``step`` steps in words: ``epoch 3 (step 1404)``, ``step 1404``."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        if self.unit == "step":
            return f"step {step}"
        return f"epoch {epochs}{f' and {rest} steps' if rest else ''} (step {step})"

    def folder(self, step: int) -> str:
        """Returns the name of the folder for the figures of that state."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return f"step-{step}" if rest or self.unit == "step" else f"epoch-{epochs}"


@dataclass
class _Done:
    """The progress of a run; a checkpoint holds it beside the arrays."""

    epoch: int = 0  # epochs done, which is also the number of lines of metrics
    position: int = 0  # steps done in the epoch that follows
    epoch_seconds: float = 0.0  # spent on that epoch
    seconds: float = 0.0  # spent on the run


class _Stopping(NamedTuple):
    """Decides when a run ends before its last epoch, from the lines of its metrics alone."""

    score: str | None
    patience: int  # epochs without a better score; 0: never

    def best(self, lines: Sequence[Line]) -> int:
        """Returns the epochs done when the score was lowest, the first among equal scores; 0 without a score."""
        scores = [line.get(self.score) for line in lines] if self.score else []
        found = [(score, epoch) for epoch, score in enumerate(scores, 1) if score is not None]
        return min(found)[1] if found else 0

    def is_over(self, lines: Sequence[Line]) -> bool:
        """Returns whether the run has ended early, or would have ended early with more epochs."""
        return self.patience > 0 and len(lines) - self.best(lines) >= self.patience

    def wants_checkpoint(self, lines: Sequence[Line]) -> bool:
        """Returns whether this state is needed later, because it is the best so far or the last."""
        return self.patience > 0 and (self.best(lines) == len(lines) or self.is_over(lines))


class Pace:
    """Chooses how many steps a call takes, so that it lasts about a second; no result depends on the choice."""

    def __init__(self) -> None:
        self._steps = 8

    def end(self, start: int, stop: int) -> int:
        """Returns where a call that starts at ``start`` ends; a small remainder before ``stop`` is included."""
        end = start + self._steps
        return stop if stop - end < self._steps // 2 else end

    def took(self, steps: int, seconds: float) -> None:
        """Adjusts the pace to a call; it grows slowly, as the first calls are short or spent on compilation."""
        self._steps = max(1, min(8 * self._steps, int(steps * _CALL_SECONDS / max(seconds, 1e-9))))


def _size(data: Any) -> int | None:
    """Returns the number of examples, on the devices or streamed; None without examples."""
    return None if data is None else len(jax.tree.leaves(data)[0])


def _shown(line: Line, show: Sequence[str]) -> dict[str, float | None]:
    """Returns the figures to show with their standard errors; for several seeds, means over seeds and their errors."""
    shown: dict[str, float | None] = {}
    for name in show:
        value, error = line.get(name), line.get(f"{name}_se")
        if isinstance(value, list):
            value, error = mean_and_error(np.array(value, np.float64))
        shown |= {name: value, f"{name}_se": error}
    return shown


# --- Compiled functions. No argument is donated, because the host may repeat a call from the state before it.

_init_state = jax.jit(loop.init_state, static_argnums=1)
_averaged = jax.jit(optimizers.averaged_params)
_evaluated = jax.jit(optimizers.evaluation_params)
_averaged_of_seeds = jax.jit(jax.vmap(optimizers.averaged_params))  # Optax's average has a scalar for each seed
_evaluated_of_seeds = jax.jit(jax.vmap(optimizers.evaluation_params))


@functools.lru_cache(maxsize=2)  # the programs of older losses and optimisers are released
def _compiled_steps(loss: loop.Loss, optimizer: optax.GradientTransformation, seeds: bool) -> Callable[..., Any]:
    """Compiles ``loop.train_steps`` for a loss and an optimiser; several seeds are split over the devices of a mesh."""
    if not seeds:
        return jax.jit(functools.partial(loop.train_steps, loss, optimizer))

    def steps(state: Any, info: Any, data: Any, order: Any, key: jax.Array, start: Any, stop: Any) -> Any:
        def share(of_each: Any, data: Any, start: jax.Array, stop: jax.Array) -> Any:
            def one(state: Any, info: Any, order: Any, key: jax.Array) -> Any:
                return loop.train_steps(loss, optimizer, state, info, data, order, key, start, stop)

            return jax.vmap(one)(*of_each)

        bounds = (jnp.asarray(bound, jnp.int32) for bound in (start, stop))
        return mesh.everywhere(mesh.in_shares(share)((state, info, order, key), data, *bounds))

    return jax.jit(steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin_epoch(
    size: int | None, batch_size: int | None, steps: int, key: jax.Array, epoch: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Returns the order of an epoch's examples and the key of its steps; for keys ``[S]``, those of each seed."""

    def one(key: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        order_key, steps_key = loop.epoch_keys(key, epoch)
        if size is None:
            return None, steps_key
        assert batch_size is not None
        return loop.epoch_order(order_key, size, batch_size)[:steps], steps_key

    return mesh.everywhere(jax.vmap(one)(key) if key.ndim else one(key))


@jax.jit
def _take_batch(data: Any, order: Any, position: jax.Array | int) -> Any:
    return None if data is None else jax.tree.map(lambda leaf: leaf[order[..., position, :]], data)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    found = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(found)) if found else jnp.array(True)


def _first_not_finite(info: loop.StepInfo, start: int, stop: int) -> int | None:
    """Returns the first step at which the loss or the gradient of any seed is not finite; None if all are finite."""
    # NumPy, because JAX would compile each slice.
    sound = [np.isfinite(np.asarray(leaf)[..., start:stop]) for leaf in (info.loss, info.gradient_norm)]
    bad = np.flatnonzero(~np.all((sound[0] & sound[1]).reshape(-1, stop - start), axis=0))
    return start + int(bad[0]) if len(bad) else None


# --- The training


class _Training:
    """A training in progress: its state, its metrics and its checkpoints."""

    def __init__(
        self,
        run: RunFolder,
        epochs: _Epochs,
        stopping: _Stopping,
        checkpoints: Checkpoints,
        loss: loop.Loss,
        optimizer: optax.GradientTransformation,
        params: Any,
        key: jax.Array,
        data: Any,
        batch_size: int | None,
    ):
        self.run, self.epochs, self.stopping, self.checkpoints = run, epochs, stopping, checkpoints
        self.optimizer = optimizer
        self.done = _Done()
        self.lines: list[Line] = []
        self.saved: int | None = None  # the step of the newest checkpoint
        self.pace = Pace()
        self.metrics = run.workdir / "metrics.jsonl"
        self.events: Events | None = None  # of process 0 with --tensorboard
        self.seeds = key.shape[0] if key.ndim else None
        self.steps_key = key
        self.initial, self.key, self.state = run.devices.replicate((params, key, self._start(params)))
        begin = functools.partial(_begin_epoch, _size(data), batch_size, epochs.steps_per_epoch)
        self.feed = feed(
            run.devices.replicate(data),
            lambda epoch: begin(self.key, epoch),
            batch_size,
            epochs.steps_per_epoch,
            epochs.steps,
        )
        self.empty = run.devices.replicate(self._empty_info(loss))
        self.info = self.empty
        self._steps = _compiled_steps(loss, optimizer, bool(self.seeds))

    def _start(self, params: Any) -> loop.TrainState:
        """Returns the state before the first step."""
        if self.seeds:
            return jax.vmap(lambda params: loop.init_state(params, self.optimizer))(params)
        return _init_state(params, optimizer=self.optimizer)

    def _empty_info(self, loss: loop.Loss) -> loop.StepInfo:
        if not self.seeds:
            return loop.empty_info(loss, self.state, self.feed.batch, self.key, self.epochs.steps_per_epoch)
        first = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), (self.state, self.key))
        one = loop.empty_info(loss, first[0], self.feed.batch, first[1], self.epochs.steps_per_epoch)
        return jax.tree.map(lambda leaf: jnp.zeros((self.seeds, *leaf.shape), leaf.dtype), one)

    @property
    def step(self) -> int:
        return int(np.ravel(self.state.step)[0])

    def evaluated(self) -> Any:
        """Returns the parameters to evaluate."""
        return (_evaluated_of_seeds if self.seeds else _evaluated)(self.state)

    def tree(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: all that the rest of the run depends on, and averaged parameters if any."""
        average = (_averaged_of_seeds if self.seeds else _averaged)(self.state)
        return {"state": self.state, "info": self.info, "key": self.key, "average": average}

    def begin_or_resume(self, report: Report) -> None:
        """Starts from the newest whole checkpoint, if there is one; lines of metrics after it are cut off."""
        found = self.checkpoints.restore(self.tree())
        if found is not None:
            stored = self.run.devices.replicate(found.tree)
            self.state, self.info, self.key = (stored[name] for name in ("state", "info", "key"))
            self.done = _Done(**{name: found.meta[name] for name in vars(self.done)})  # the meta data may hold more
            self.saved = found.step
        if self.done.epoch == 0 and self.run.config.init_from is not None:  # later the other run is not needed
            params = _warm_start(self.run.config.init_from, self.initial, self.seeds)
            self.initial = self.run.devices.replicate(params)
            if found is None:
                self.state = self.run.devices.replicate(self._start(params))
        if self.step > self.epochs.steps:
            asked = f"--{self.epochs.unit}s={self.epochs.done(self.epochs.number)}"
            raise UsageError(
                f"{asked} is less than the run in {self.run.workdir} has done, {self.epochs.name(self.step)}; name "
                "another --workdir, or draw the figures of this one by --eval_only"
            )
        self.lines = _hosts.on_first(cut_json_lines, self.metrics, self.done.epoch)
        if not _all_finite(self.state):
            raise self.failure(None)
        if self.run.config.tensorboard:
            _hosts.on_first(self._begin_events)
        self.checkpoints.begin_to_write()
        self.run.go_on(self.done.seconds, f"after {self.epochs.name(self.step)}" if found else None)

    def _begin_events(self) -> None:
        self.events = Events(self.run.workdir, self.lines, self.epochs.unit)

    def close(self) -> None:
        """Ends what runs beside the training."""
        self.feed.close()
        if self.events is not None:
            self.events.close()

    def train_epoch(self) -> None:
        """Takes the remaining steps of the current epoch."""
        done = self.done
        self.steps_key = self.feed.begin(done.epoch)
        self.info = self.info if done.position else self.empty
        length = self.epochs.length(done.epoch)
        while done.position < length:
            self.stop_if_asked()
            start = done.position
            end = _hosts.of_first(self.pace.end(start, self.feed.end(start, length)))
            began, before = time.perf_counter(), self.state
            rest = (*self.feed.at(start), self.steps_key, start)
            self.state, self.info = self._steps(before, self.info, *rest, end)
            bad = _first_not_finite(self.info, start, end)  # waits for the device
            seconds = time.perf_counter() - began
            self.pace.took(end - start, seconds)
            done.epoch_seconds += seconds
            done.position = end if bad is None else bad
            if bad is not None:  # repeats the call up to the step that failed
                self.state, _ = self._steps(before, self.info, *rest, bad)
                raise self.failure(bad)

    def end_epoch(self, report: Report) -> Line:
        """Writes the line of metrics, then a checkpoint if one is due; returns the line."""
        done, name = self.done, self.epochs.unit
        params, first = self.evaluated(), self.initial if self.done.epoch == 0 else None
        if not self.seeds:
            line = self._line(self.info, report, params, first)
        else:
            each = []
            for seed in range(self.seeds):
                one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], jax.device_get((self.info, params, first)))
                each.append(self._line(one[0], report, *one[1:]))
            line = {figure: [one[figure] for one in each] for figure in each[0]}
        whole = finite({name: self.epochs.done(done.epoch + 1), **line, "seconds": done.epoch_seconds})
        whole = _hosts.on_first(self._write, whole)  # process 0's, so that all stop early at the same epoch
        self.lines.append(whole)
        self.done = _Done(done.epoch + 1, seconds=done.seconds)
        due = self.done.epoch % self.run.config.checkpoint_every == 0 or self.done.epoch == self.epochs.number
        if due or self.stopping.wants_checkpoint(self.lines):
            self.save(None if self.stopping.score is None else whole[self.stopping.score])
        return whole

    def _write(self, line: Line) -> Line:
        append_json_line(self.metrics, line)
        if self.events is not None:
            self.events.write(line)
        return line

    def _line(self, info: loop.StepInfo, report: Report, params: Any, initial: Any) -> Line:
        """Returns one seed's figures of the epoch; ``initial``: its first parameters in the first epoch, else None."""
        figures = {**info.figures, "gradient_norm": info.gradient_norm}
        steps = {name: np.asarray(values, np.float64)[: self.done.position] for name, values in figures.items()}
        line: Line = means_and_errors(steps) | report(params)
        if initial is not None:
            first = {name: steps[name][0] for name in info.figures} | report(initial)
            line |= {f"first_{name}": value for name, value in first.items()}
        return {name: None if value is None else float(value) for name, value in line.items()}

    def save(self, score: float | None = None) -> None:
        """Begins to write a checkpoint, unless this step has one already."""
        if self.step == self.saved:
            return
        if not _all_finite(self.state):
            raise self.failure(None)
        self.done.seconds = self.run.seconds()
        self.checkpoints.save(self.step, self.tree(), asdict(self.done), score=score)
        self.saved = self.step

    def stop_if_asked(self) -> None:
        """Saves and raises if a signal has asked the run to stop."""
        number = _hosts.of_any(_signals.requested())
        if number is not None:
            self.save()
            self.checkpoints.wait()
            raise _signals.Stopped(number, f"after {self.epochs.name(self.step)}", self.run.advice)

    def failure(self, position: int | None) -> RunError:
        """Writes ``failed/``; returns the error to raise.

        Args:
            position: the position in the epoch of the step that failed; the state is the one before that step. None:
                the state holds a parameter that is not finite.
        """
        name, folder = self.epochs.name, self.run.workdir / "failed"
        arrays: dict[str, Any] = {"state": self.state, "steps_key": self.steps_key}
        facts: dict[str, Any] = {"step": self.step + 1}
        if position is None:
            what, before = f"a parameter is not finite after {name(self.step)}", ""
        else:
            arrays["batch"], before = _take_batch(*self.feed.at(position), position), " before that step"
            loss, norm = (np.asarray(leaf)[..., position] for leaf in (self.info.loss, self.info.gradient_norm))
            facts |= {"loss": str(loss), "gradient_norm": str(norm)}
            which = "gradient" if np.all(np.isfinite(loss)) else "loss"
            where = f"step {position + 1} of epoch {self.done.epoch + 1}, " if self.epochs.unit == "epoch" else ""
            of = ""
            if self.seeds:
                of = f" of seed number {int(np.flatnonzero(~np.isfinite(loss + norm))[0])} of {self.seeds}"
            what = f"the {which} of {where}step {self.step + 1} of the run{of}, is not finite"
        self.checkpoints.wait()
        good = "there is no checkpoint yet" if self.saved is None else f"the last good checkpoint: {name(self.saved)}"
        facts = {"what": what, **facts, "last_good_checkpoint": self.saved}
        _hosts.on_first(write_failure, folder, named_arrays(arrays), facts)
        return RunError(
            f"{what}; {good}; {folder} holds the state{before}; a lower --learning_rate or --clip_norm=1 may help, "
            "with --overwrite"
        )


def _warm_start(workdir: str, params: Any, seeds: int | None) -> Any:
    """Returns the newest parameters of another run (``--init_from``) as a tree like ``params``, equal for all seeds."""
    like = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), params) if seeds else params
    try:
        stored = read_checkpoint(Path(workdir).expanduser() / "checkpoints", warn=warn)
        found = fill_params(stored.leaves, like)
    except CheckpointError as error:
        raise UsageError(f"--init_from={workdir}: {error}") from error
    except ValueError as error:
        raise UsageError(f"--init_from={workdir} holds another model: {error}") from error
    say(f"starting from the parameters of {workdir} at step {stored.step}")
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (seeds, *leaf.shape)), found) if seeds else found


# --- Reading a stored run


def _stored_run(run: RunFolder, epochs: _Epochs, like: Any, stopping: _Stopping) -> Fitted:
    """Reads the checkpoint that the flags name, and sets the folder into which its figures are written."""
    which = run.config.checkpoint or ("best" if stopping.patience else "latest")
    if which == "best" and stopping.score is None:
        raise UsageError("--checkpoint=best needs a run with --validation, by which the best checkpoint is chosen")
    try:
        found = newest = _read(run, epochs, which)
        if stopping.patience and which == "best":
            newest = _read(run, epochs, "latest")
    except NoCheckpointError:
        raise UsageError(
            f"--eval_only needs a checkpoint{' with a score' * (which == 'best')}; {run.workdir} has none yet"
        ) from None
    epoch, all_epochs = int(found.meta["epoch"]), int(newest.meta["epoch"])
    if epoch == 0:
        raise UsageError(f"--eval_only needs a whole epoch; {run.workdir} is at step {found.step} of its first")
    params = _params(run, found, like)
    lines = _hosts.on_first(read_json_lines, run.workdir / "metrics.jsonl", all_epochs)
    final = newest.step == epochs.steps or stopping.is_over(lines)
    if stopping.patience:
        final = final and which == "best"  # the run's figures are of that checkpoint
    run.evaluate_into(epochs.folder(found.step), final, (newest if final else found).meta["seconds"])
    shown = lines if final else lines[:epoch]
    run.trained(shown, which == "best")
    return Fitted(params, None, shown, epoch, stopping.is_over(lines))


def _read(run: RunFolder, epochs: _Epochs, which: str) -> Stored:
    """Reads a checkpoint of the run; process 0 chooses its step."""
    folder = run.workdir / "checkpoints"
    step = _hosts.on_first(lambda: read_checkpoint(folder, which, warn=warn, name=epochs.name).step)
    return read_checkpoint(folder, step)


def _params(run: RunFolder, found: Stored, like: Any) -> Any:
    try:
        return fill_params(found.leaves, like)
    except ValueError as error:
        path = run.workdir / "checkpoints" / str(found.step)
        raise CheckpointError(f"checkpoint {path} is of another model: {error}") from None
