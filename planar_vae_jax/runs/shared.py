"""The checkpoints of a run in several processes: process 0 reads and writes them, and shares what it reads.

In one process these are :class:`planar_vae_jax.runs.checkpoints.Checkpoints` and :func:`read_checkpoint` as they are.
"""

import sys
from pathlib import Path
from typing import Any

import jax

from planar_vae_jax import meshes
from planar_vae_jax.runs import leaves, processes, reading
from planar_vae_jax.runs.checkpoints import CheckpointError, Checkpoints, NoCheckpointError, Restored, read_checkpoint
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.console import warn
from planar_vae_jax.runs.epochs import Epochs
from planar_vae_jax.runs.files import read_json_lines
from planar_vae_jax.runs.folder import RunFolder


class _OneProcess:
    """``jax`` as it is where there is one process."""

    def __getattr__(self, name: str) -> Any:
        return {"process_count": lambda: 1, "process_index": lambda: 0}.get(name) or getattr(jax, name)


def _orbax_alone() -> None:
    """Process 0 calls Orbax alone, which would wait for all processes that JAX knows, in places without an option."""
    if processes.count() == 1:
        return
    reading.orbax()
    for name, module in list(sys.modules.items()):
        if name.startswith("orbax.") and getattr(module, "jax", None) is jax:
            module.jax = _OneProcess()  # type: ignore[attr-defined]


class SharedCheckpoints:
    """Those that process 0 has; every process calls each method, in the same order, and gets the same."""

    def __init__(self, own: Checkpoints):
        _orbax_alone()
        self._own = own

    def restore(self, like: Any) -> Restored | None:
        """See :meth:`Checkpoints.restore`."""
        like, found = meshes.local(like), None

        def read() -> dict[str, Any] | None:
            nonlocal found
            found = self._own.restore(like)
            return None if found is None else {"step": found.step, "meta": found.meta}

        told = processes.on_first(read)
        if told is None:
            return None
        return Restored(told["step"], processes.arrays_of_first(like if found is None else found.tree), told["meta"])

    def begin_to_write(self) -> None:
        """See :meth:`Checkpoints.begin_to_write`."""
        processes.on_first(self._own.begin_to_write)

    def save(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """See :meth:`Checkpoints.save`; the arrays are whole on every device."""
        tree = meshes.local(tree)
        processes.on_first(lambda: self._own.save(step, tree, meta, score=score))

    def wait(self) -> None:
        """See :meth:`Checkpoints.wait`."""
        processes.on_first(self._own.wait)

    def __enter__(self) -> "SharedCheckpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        """Each by itself: the processes may be here for reasons of their own."""
        self._own.__exit__(*error)


def load_for_figures(
    run: RunFolder, epochs: Epochs, params: Any, score: str | None
) -> tuple[Any, list[dict[str, Any]]]:
    """For ``--eval_only``: parameters like ``params`` and lines of metrics, of the checkpoint that the flags name.

    The run's folder is set for its figures.

    Raises:
        UsageError: there is no such checkpoint.
        CheckpointError: it is damaged, or of another model.
    """
    _orbax_alone()
    found: Any = params

    def read() -> dict[str, Any]:
        nonlocal found
        stored = _read(run, score)
        done = stored.meta.get("epoch", stored.meta.get("unit", 0))  # "unit": version 0.1
        if done == 0:
            raise UsageError(f"--eval_only needs a whole epoch; {run.workdir} is at step {stored.step} of its first")
        try:
            found = leaves.fill_params(stored.leaves, params)
        except ValueError as error:
            path = run.workdir / "checkpoints" / str(stored.step)
            raise CheckpointError(f"checkpoint {path} is of another model: {error}") from None
        lines = read_json_lines(run.workdir / "metrics.jsonl", done)
        return {"step": stored.step, "seconds": stored.meta["seconds"], "lines": lines}

    told = processes.on_first(read)
    run.evaluate_into(epochs.folder(told["step"]), told["step"] == epochs.steps, told["seconds"])
    return processes.arrays_of_first(found), told["lines"]


def _read(run: RunFolder, score: str | None) -> reading.Stored:
    which, workdir = run.config.checkpoint, Path(run.workdir)
    if which == "best" and score is None:
        raise UsageError("--checkpoint=best needs a run with --validation, by which the best checkpoint is chosen")
    try:
        return read_checkpoint(workdir / "checkpoints", which, warn=warn, check=reading.check_finite)
    except NoCheckpointError:
        raise UsageError(
            f"--eval_only needs a checkpoint{' with a score' * (which == 'best')}; {workdir} has none yet"
        ) from None
