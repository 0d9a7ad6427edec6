"""Early stopping, and which state a run's figures are of: the last, or with early stopping the best."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from planar_vae_jax.runs import leaves, reading
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.console import warn
from planar_vae_jax.runs.epochs import Epochs
from planar_vae_jax.runs.files import read_json_lines
from planar_vae_jax.runs.folder import RunFolder
from planar_vae_jax.runs.reading import CheckpointError, NoCheckpointError, Stored
from planar_vae_jax.runs.shared import read_together

Lines = Sequence[dict[str, Any]]


class EarlyStopping:
    """When a run ends before its last epoch; it follows from the lines of its metrics alone.

    Args:
        score: the entry of a line that should get lower.
        patience: epochs without a better one; 0: it never ends early.
    """

    def __init__(self, score: str | None, patience: int):
        self.score, self.patience = score, patience
        self._forget()

    def _forget(self) -> None:
        self._seen, self._best, self._lowest = 0, 0, math.inf

    def best(self, lines: Lines) -> int:
        """The epochs done when the score was lowest, the first of equals; 0 where there is none.

        Each line is looked at once: ``lines`` are those of the last call and more, or fewer, which are read anew.
        """
        if len(lines) < self._seen:
            self._forget()
        for line in lines[self._seen :]:
            self._seen += 1
            score = None if self.score is None else line.get(self.score)
            if score is not None and score < self._lowest:
                self._best, self._lowest = self._seen, score
        return self._best

    def over(self, lines: Lines) -> bool:
        """Whether the run has ended early, or would have if it had more epochs."""
        return self.patience > 0 and len(lines) - self.best(lines) >= self.patience

    def wants_checkpoint(self, lines: Lines) -> bool:
        """Whether this state is needed later: it is the best so far, or the last."""
        return self.patience > 0 and (self.best(lines) == len(lines) or self.over(lines))


class Chosen(NamedTuple):
    """A state of a run."""

    params: Any  # that figures are of
    epoch: int  # epochs done then
    lines: list[dict[str, Any]]  # of metrics.jsonl


def best_state(run: RunFolder, epochs: Epochs, like: Any) -> tuple[Any, int]:
    """The parameters of the checkpoint with the lowest score, and the epochs done then."""

    def read() -> tuple[Any, int]:
        found = _read(run, epochs, "best")
        return _params(run, found, like), _epochs_done(found)

    return read_together(read, like)


def stored_state(run: RunFolder, epochs: Epochs, like: Any, early: EarlyStopping) -> Chosen:
    """The checkpoint that the flags name, with the run's folder set for its figures.

    Raises:
        UsageError: there is no such checkpoint, or it is of no whole epoch.
        CheckpointError: it is damaged, or of another model.
    """
    params, facts = read_together(lambda: _stored(run, epochs, like, early), like)
    run.evaluate_into(epochs.folder(facts["step"]), facts["final"], facts["seconds"])
    return Chosen(params, facts["epoch"], facts["lines"])


def _stored(run: RunFolder, epochs: Epochs, like: Any, early: EarlyStopping) -> tuple[Any, dict[str, Any]]:
    which, workdir = run.config.checkpoint or ("best" if early.patience else "latest"), run.workdir
    if which == "best" and early.score is None:
        raise UsageError("--checkpoint=best needs a run with --validation, by which the best checkpoint is chosen")
    try:
        found = newest = _read(run, epochs, which)
        if early.patience and which == "best":
            newest = _read(run, epochs, "latest")
    except NoCheckpointError:
        raise UsageError(
            f"--eval_only needs a checkpoint{' with a score' * (which == 'best')}; {workdir} has none yet"
        ) from None
    done, all_done = _epochs_done(found), _epochs_done(newest)
    if done == 0:
        raise UsageError(f"--eval_only needs a whole epoch; {workdir} is at step {found.step} of its first")
    params = _params(run, found, like)
    lines = read_json_lines(workdir / "metrics.jsonl", all_done)
    final = newest.step == epochs.steps or early.over(lines)
    if early.patience:
        final = final and which == "best"  # then its figures are of that one
    seconds = (newest if final else found).meta["seconds"]
    kept = lines if final else lines[:done]
    return params, {"step": found.step, "final": final, "seconds": seconds, "epoch": done, "lines": kept}


def _read(run: RunFolder, epochs: Epochs, which: str) -> Stored:
    folder = run.workdir / "checkpoints"
    return reading.read_checkpoint(folder, which, warn=warn, check=reading.check_finite, name=epochs.name)


def _epochs_done(found: Stored) -> int:
    return found.meta.get("epoch", found.meta.get("unit", 0))  # "unit": version 0.1


def _params(run: RunFolder, found: Stored, like: Any) -> Any:
    try:
        return leaves.fill_params(found.leaves, like)
    except ValueError as error:
        path = run.workdir / "checkpoints" / str(found.step)
        raise CheckpointError(f"checkpoint {path} is of another model: {error}") from None
