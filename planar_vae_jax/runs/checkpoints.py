"""Checkpoints of any pytree of arrays and numbers, written whole or not at all, on Orbax.

    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        found = checkpoints.restore(like=tree)                       # the newest that is whole, or None
        checkpoints.save(step, tree, {"epoch": 4}, score=validation_loss)  # goes on in the background

Orbax makes a step appear under its name at once or never, but it restores a flipped bit in silence, and it does not
fall back to an older step. So every checkpoint carries the CRC-32 of its arrays and of the rest; one that does not
fit is as damaged as one that cannot be read. The arrays are written as one vector of bytes: a third of the time and of
the files that a tree of leaves takes.

Until its first save, or :meth:`Checkpoints.begin_to_write`, it writes and deletes nothing. What reads and
checks them: :mod:`planar_vae_jax.runs.reading`.
"""

import contextlib
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from planar_vae_jax.runs import leaves as packing
from planar_vae_jax.runs import reading
from planar_vae_jax.runs.files import sync_tree
from planar_vae_jax.runs.reading import (
    CheckpointError,
    NoCheckpointError,
    NotDamagedError,
    brief,
    orbax,
    read_checkpoint,
    silence,
)

__all__ = ["CheckpointError", "Checkpoints", "NoCheckpointError", "Restored", "read_checkpoint"]

DAMAGED = "damaged"  # the folder for checkpoints that turned out not to be whole
_TRASH = ".trash"  # a step is renamed into it before it is deleted: no half-deleted step under its real name
_UNFINISHED = ".orbax-checkpoint-tmp"


class Restored(NamedTuple):
    """A checkpoint's contents."""

    step: int
    tree: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder: the newest ``keep``, and the one with the lowest score.

    Args:
        directory: made by the first save; nobody else may write into it meanwhile.
        keep: how many of the newest stay, at least 1.
        warn: is given a line for each damaged checkpoint that is passed over.
        check: is given each tree that is read; a ``ValueError`` of its makes that checkpoint a damaged one.
        name: what people call a step.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        warn: Callable[[str], object] = print,
        check: Callable[[Any], object] = lambda tree: None,
        name: Callable[[int], str] = "step {}".format,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._warn, self._check, self._name = keep, warn, check, name
        self._damaged: list[int] = []  # passed over, to be set aside
        self._scores: dict[int, float] = {}
        self._writer: Any = None
        self._saving: int | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there and not known to be damaged, the oldest first."""
        return [step for step in reading.steps(self.directory) if step not in self._damaged]

    def restore(self, like: Any) -> Restored | None:
        """The newest whole checkpoint; damaged ones above it are told, and go into ``damaged/`` when this one begins to
        write.

        Args:
            like: a pytree of arrays (or shapes) with the structure of what was saved.

        Returns:
            ``None`` if there is no checkpoint at all.

        Raises:
            CheckpointError: there are some and none is whole; or the newest that can be read is of a newer format, or
                of another tree.
        """
        self.wait()
        try:
            found, damaged = reading.newest_whole(self.directory, lambda step: self._read(step, like))
        except NoCheckpointError:
            return None
        reading.tell_damaged(self.directory, damaged, found.step, self._warn, self._name)
        self._damaged = list(damaged)
        return found

    def begin_to_write(self) -> None:
        """Makes the folder and tidies it: damaged ones go aside, old ones and what a killed process left go away.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self._writer is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            for step in self._damaged:
                self._set_aside(step)
            self._damaged = []
            self._scores = reading.scores(self.directory)
            self._prune()
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot hold checkpoints: {brief(error)}") from error
        handlers = {"arrays": orbax().ArrayCheckpointHandler(), "meta": orbax().JsonCheckpointHandler()}
        # Made in the background, a folder that cannot be made holds the other threads, and the process, for minutes.
        options = orbax().options.AsyncOptions(create_directories_asynchronously=False)
        self._writer = orbax().AsyncCheckpointer(orbax().CompositeCheckpointHandler(**handlers), async_options=options)

    def save(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """Begins to write a checkpoint, once the one before is finished; ``tree`` may change afterwards.

        Args:
            step: its number, greater than all before.
            tree: a pytree of arrays, typed PRNG keys and Python numbers.
            meta: whatever JSON holds, without NaN.
            score: the lower, the better; ``None``: never the best.

        Raises:
            TypeError: a leaf is nothing that could be restored.
            CheckpointError: this one cannot be begun, or the one before could not be written.
        """
        self.wait()
        vector, entries = packing.pack(tree)
        content = {"meta": meta, "score": score, "leaves": entries, "crc32": zlib.crc32(vector.data)}
        whole = {"format": reading.FORMAT, "crc32": reading.crc(content), "content": content}
        self.begin_to_write()
        if self.steps and step <= self.steps[-1]:
            raise CheckpointError(f"{self.directory}: step {step} is not after {self.steps[-1]}, so it was not saved")
        args = orbax().args
        silence(True)  # Orbax goes on in the background
        try:
            self._writer.save(
                self.directory / str(step),
                args=args.Composite(arrays=args.ArraySave(vector), meta=args.JsonSave(whole)),
            )
        except Exception as error:
            raise self._failed(error) from error
        self._saving = step
        if score is not None:
            self._scores[step] = score

    def wait(self) -> None:
        """Returns when what was begun is on the disk, and would survive the machine.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._saving is None:
            return
        try:
            self._writer.wait_until_finished()
            sync_tree(self.directory / str(self._saving))
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None
        silence(False)
        self._prune()

    def close(self) -> None:
        """Waits, and lets go of the folder.

        Raises:
            CheckpointError: what was begun could not be written.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                with contextlib.suppress(Exception):  # one failed save may raise from several threads of Orbax
                    self._writer.close()
                self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; where an error is on its way, that one tells more."""
        with contextlib.suppress(*((CheckpointError,) if kind else ())):
            self.close()

    def _read(self, step: int, like: Any) -> Restored:
        found = reading.read(self.directory / str(step))
        try:
            tree = packing.unpack(found.leaves, like)
        except ValueError as error:
            path = self.directory / str(step)
            raise NotDamagedError(f"checkpoint {path} ({self._name(step)}) holds another tree: {error}") from error
        self._check(tree)
        return Restored(step, tree, found.meta)

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint into ``damaged/``, under a name that is free."""
        folder = self.directory / DAMAGED
        folder.mkdir(exist_ok=True)
        target = folder / str(step)
        while target.exists():
            target = target.with_name(target.name + "-again")
        (self.directory / str(step)).rename(target)

    def _sweep(self) -> None:
        """Removes what saves left that did not finish."""
        for path in (*self.directory.glob(f"*{_UNFINISHED}*"), self.directory / _TRASH):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Deletes all but the newest and the best, of which nothing is being written now."""
        best = reading.best(self._scores)
        for step in self.steps[: -self._keep]:
            if step != best:
                self._scores.pop(step, None)
                (self.directory / _TRASH).mkdir(exist_ok=True)
                (self.directory / str(step)).rename(self.directory / _TRASH / str(step))
        shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        """The error to raise, after what is left of the failed save has been removed."""
        self._saving = None
        with contextlib.suppress(Exception):  # the parts of it that still run in the background
            self._writer.wait_until_finished()
        silence(False)
        self._sweep()
        return CheckpointError(f"a checkpoint could not be written to {self.directory}: {brief(error)}")
