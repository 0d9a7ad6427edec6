"""Checkpoints of any pytree of arrays, whole or not at all, on Orbax.

    checkpoints = Checkpoints(workdir / "checkpoints", keep=3)
    checkpoints.save(step, tree, {"epoch": 4}, score=test_loss)  # goes on in the background
    found = checkpoints.restore(like=tree)                       # the newest that is whole, or None

Orbax makes a step appear under its name at once or never, but it restores a flipped bit in silence, and it does not
fall back to an older step. So every checkpoint carries the CRC-32 of its arrays and of the rest; one that does not
fit is as damaged as one that cannot be read. The arrays are written as one vector of bytes: a third of the time and of
the files that a tree of leaves takes.

Knows no model and no experiment. Orbax is imported by the first :class:`Checkpoints`.
"""

import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1  # of the contents; to be raised whenever an older program could misread them
DAMAGED = "damaged"  # the folder for checkpoints that turned out not to be whole
_TRASH = ".trash"  # Orbax renames a step into it before it deletes: no half-deleted step under its real name
_UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or none that can be read: one line."""


class Restored(NamedTuple):
    """A checkpoint's contents."""

    step: int
    tree: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder: the newest ``keep``, and the one with the lowest score.

    Args:
        directory: made if need be; nobody else may write into it meanwhile.
        keep: how many of the newest stay, at least 1.
        tell: is given a line for each damaged checkpoint that is passed over.
        check: is given each tree that is read; a ``ValueError`` of its makes that checkpoint a damaged one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        tell: Callable[[str], object] = print,
        check: Callable[[Any], object] = lambda tree: None,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._tell, self._check = keep, tell, check
        self._scores: dict[int, float] = {}
        self._saved = False
        self._ocp = importlib.import_module("orbax.checkpoint")
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what matters is raised, and told in our words
        self._manager = self._open()
        for step in self.steps:
            try:
                self._note_score(step, self._read_meta(step)["score"])
            except Exception:  # no score, so nothing keeps it once it is old
                continue

    def _open(self) -> Any:
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=None,  # see _prune
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            todelete_subdir=_TRASH,
        )
        handlers = {"arrays": self._ocp.ArrayCheckpointHandler(), "meta": self._ocp.JsonCheckpointHandler()}

        def open_folder() -> Any:
            return self._ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

        try:
            shutil.rmtree(self.directory / _TRASH, ignore_errors=True)
            try:
                return open_folder()
            except ValueError:  # one step's times are damaged; nothing needs them
                for path in self.directory.glob("*/_CHECKPOINT_METADATA"):
                    path.unlink()
                return open_folder()
        except Exception as error:
            raise CheckpointError(f"{self.directory} cannot hold checkpoints: {_brief(error)}") from error

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, whole or not, the oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the lowest score of those that have one."""
        return min(self._scores, key=lambda step: (self._scores[step], step), default=None)

    def save(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """Begins to write a checkpoint, once the one before is finished; ``tree`` may change afterwards.

        Args:
            step: its number, greater than all before.
            tree: a pytree of arrays, typed PRNG keys among them.
            meta: whatever JSON holds, without NaN.
            score: the lower, the better; ``None``: never the best.

        Raises:
            CheckpointError: this one cannot be begun, or the one before could not be written.
        """
        self.wait()
        self._prune()
        vector = _pack(tree)
        content = {"meta": meta, "score": score, "leaves": _describe(tree), "crc32": zlib.crc32(vector.data)}
        whole = {"format": FORMAT, "crc32": _crc(content), "content": content}
        args = self._ocp.args.Composite(arrays=self._ocp.args.ArraySave(vector), meta=self._ocp.args.JsonSave(whole))
        try:
            begun = self._manager.save(step, args=args)
        except Exception as error:
            raise self._failed(error) from error
        if not begun:  # Orbax's way to say that a step is there already, or is older than the newest
            raise CheckpointError(f"{self.directory}: step {step} is not after {self.steps[-1]}, so it was not saved")
        self._note_score(step, score)
        self._saved = True

    def wait(self) -> None:
        """Returns when what was begun is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, like: Any) -> Restored | None:
        """The newest whole checkpoint; damaged ones above it are told and moved into ``damaged/``.

        Args:
            like: a pytree of arrays (or shapes) with the structure of what was saved.

        Returns:
            ``None`` if there is no checkpoint at all.

        Raises:
            CheckpointError: there are some and none is whole (all stay where they are); or the newest that can be read
                is of a newer format.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                found = self._read(step, like)
            except _NewerFormatError:
                raise
            except Exception as error:  # Orbax's have no class in common
                damaged[step] = _brief(error)
                continue
            for bad, reason in damaged.items():
                self._tell(f"checkpoint {self._set_aside(bad)} is damaged ({reason}): step {step} is used instead")
            return found
        if damaged:
            newest = max(damaged)
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self.directory} is whole; step {newest}: {damaged[newest]}"
            )
        return None

    def restore_step(self, step: int, like: Any) -> Restored:
        """The checkpoint of that step.

        Raises:
            CheckpointError: it is damaged, or not there.
        """
        self.wait()
        try:
            return self._read(step, like)
        except _NewerFormatError:
            raise
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} is damaged ({_brief(error)})") from error

    def close(self) -> None:
        """Waits, and lets go of the folder.

        Raises:
            CheckpointError: what was begun could not be written.
        """
        try:
            self.wait()
            if self._saved:  # who only reads deletes nothing
                self._prune()
        finally:
            with contextlib.suppress(Exception):  # one failed save may raise from several threads of Orbax
                self._manager.close()
            self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; where an error is on its way, that one tells more."""
        with contextlib.suppress(*((CheckpointError,) if kind else ())):
            self.close()

    def _sweep(self) -> None:
        """Removes what saves left that did not finish."""
        for path in self.directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Deletes all but the newest and the best, of which nothing is being written now."""
        kept = {*self.steps[-self._keep :], self.best_step}
        for step in [step for step in self.steps if step not in kept]:
            self._scores.pop(step, None)
            self._manager.delete(step)
        shutil.rmtree(self.directory / _TRASH, ignore_errors=True)

    def _note_score(self, step: int, score: float | None) -> None:
        if score is not None:
            self._scores[step] = score

    def _read_meta(self, step: int) -> dict[str, Any]:
        args = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        whole = self._manager.restore(step, args=args).meta
        if isinstance(whole["format"], int) and whole["format"] > FORMAT:
            raise _NewerFormatError(
                f"checkpoint {self.directory / str(step)} is of format {whole['format']}, written by a newer version "
                f"of planar_vae_jax; this one reads up to format {FORMAT} (if no newer one wrote it, it is damaged: "
                "move it elsewhere, and an older one is used)"
            )
        if whole["format"] != FORMAT or whole["crc32"] != _crc(whole["content"]):
            raise ValueError("its meta data do not fit their checksum")
        return whole["content"]

    def _read(self, step: int, like: Any) -> Restored:
        content = self._read_meta(step)
        args = self._ocp.args.Composite(arrays=self._ocp.args.ArrayRestore())
        vector = np.ascontiguousarray(self._manager.restore(step, args=args).arrays)
        if zlib.crc32(vector.data) != content["crc32"]:
            raise ValueError("its arrays do not fit their checksum")
        if content["leaves"] != _describe(like):
            raise ValueError("its arrays are of other names or shapes than this run's")
        tree = _unpack(vector, like)
        self._check(tree)
        return Restored(step, tree, content["meta"])

    def _set_aside(self, step: int) -> Path:
        """Moves a checkpoint into ``damaged/``, under a name that is free."""
        folder = self.directory / DAMAGED
        folder.mkdir(exist_ok=True)
        target = folder / str(step)
        while target.exists():
            target = target.with_name(target.name + "-again")
        (self.directory / str(step)).rename(target)
        self._scores.pop(step, None)
        self._manager.reload()
        return target

    def _failed(self, error: Exception) -> CheckpointError:
        """The error to raise, after what is left of the failed save has been removed."""
        with contextlib.suppress(Exception):  # the parts of it that still run in the background
            self._manager.wait_until_finished()
        self._sweep()
        return CheckpointError(f"a checkpoint could not be written to {self.directory}: {_brief(error)}")


class _NewerFormatError(CheckpointError):
    """Not damaged: nothing to pass over."""


def _data(leaf: Any) -> Any:
    """The plain array of a typed PRNG key; other leaves as they are."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _describe(tree: Any) -> list[list[Any]]:
    """``[name, dtype, shape]`` of each leaf, as JSON gives them back."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [[jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves]


def _pack(tree: Any) -> np.ndarray:
    """All leaves one after the other, as bytes."""
    leaves = [np.ascontiguousarray(_data(leaf)).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def _unpack(vector: np.ndarray, like: Any) -> Any:
    position = 0

    def take(leaf: Any) -> jax.Array:
        nonlocal position
        shape = jax.eval_shape(_data, leaf)
        size = shape.size * shape.dtype.itemsize
        piece = vector[position : position + size].view(shape.dtype).reshape(shape.shape)
        position += size
        array = jnp.array(piece)  # a copy: never the memory of the vector
        return array if shape.dtype == leaf.dtype else jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))

    return jax.tree.map(take, like)


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _brief(error: BaseException) -> str:
    """One line: what the operating system said, if it can be told from the rest, else the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    said = re.search(r"(?:OS error |os_error_code=')(\d+)", text)  # TensorStore's ways to put it
    return os.strerror(int(said[1])) if said else f"{type(error).__name__}: {text}"[:200]
