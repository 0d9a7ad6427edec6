"""The checkpoints of a run: Orbax's manager, and a CRC-32 of every leaf in the JSON file beside the arrays.

    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        found = checkpoints.restore(like=tree)                             # the newest whole one, or None
        checkpoints.save(step, tree, {"epoch": 4}, score=validation_loss)  # returns while it is being written

    stored = read_checkpoint(workdir / "checkpoints", "best")
    stored.leaves["state.params.encoder.hidden.kernel"]                    # a NumPy array

Orbax writes a checkpoint under a temporary name and renames it when it is complete. But it restores flipped bits
without noticing, and it does not fall back to an older checkpoint. So a checkpoint whose checksums do not fit counts as
damaged, like one that cannot be read: it is reported and skipped, and the next older one is used.

A checkpoint holds a flat dict of arrays. A leaf is named by its path in the pytree, so the names do not depend on
whether Flax wraps a parameter in a container. In several processes each one calls every method, in the same order, and
sees the same folder; process 0 writes.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from planar_vae_jax.keys import is_key
from planar_vae_jax.runs import _hosts
from planar_vae_jax.runs._files import RunError, sync_tree

_FORMAT = 3  # raise it whenever an older program could misread a checkpoint
_DAMAGED = "damaged"  # the folder into which damaged checkpoints are moved


class CheckpointError(RunError):
    """A checkpoint cannot be written, or none can be read; the message is one line."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint, or none with a score."""


class _IncompatibleError(CheckpointError):
    """A checkpoint that is readable but of another format or tree; it is never skipped."""


class Stored(NamedTuple):
    """The contents of a checkpoint, read without knowing its tree."""

    step: int
    leaves: dict[str, Any]  # by name, NumPy arrays and typed PRNG keys
    meta: dict[str, Any]
    score: float | None


class Restored(NamedTuple):
    """The contents of a checkpoint as a tree."""

    step: int
    tree: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints that a training writes: the newest ``keep``, and the one with the lowest score.

    Nothing is written or deleted before :meth:`begin_to_write` or the first save.

    Args:
        directory: the folder of the checkpoints, which the first save makes. Only one training may write into it.
        keep: how many of the newest checkpoints stay, at least 1.
        warn: called with one line for each damaged checkpoint that is skipped.
        name: turns a step into words, for messages.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        warn: Callable[[str], object] = print,
        name: Callable[[int], str] = "step {}".format,
    ):
        self.directory = Path(directory).absolute()
        self._keep, self._warn, self._name = keep, warn, name
        self._damaged: dict[int, str] = {}
        self._scores: dict[int, float] = {}
        self._manager: Any = None
        self._silence = contextlib.ExitStack()
        self._saving: int | None = None
        self._thread: Any = None
        self._written: Future[None] | None = None

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, damaged or not; None if the folder holds no checkpoint."""
        return max(_steps(self.directory), default=None)

    def restore(self, like: Any) -> Restored | None:
        """Returns the newest whole checkpoint, or None if there is no checkpoint at all.

        Damaged checkpoints that are newer are reported, and moved into ``damaged/`` when writing begins.

        Args:
            like: a pytree of arrays, or of shapes, with the structure of what was saved.

        Raises:
            CheckpointError: there are checkpoints and none is whole; or the newest readable one is of another format or
                tree.
        """
        self.wait()

        def find() -> int | None:
            try:
                found, self._damaged = _newest_whole(self.directory)
            except NoCheckpointError:
                return None
            _report_damaged(self.directory, self._damaged, found.step, self._warn, self._name)
            return found.step

        step = _hosts.on_first(find)
        if step is None:
            return None
        stored = _read(self.directory / str(step))
        try:
            return Restored(step, fill(stored.leaves, like), stored.meta)
        except ValueError as error:
            path = self.directory / str(step)
            raise _IncompatibleError(f"checkpoint {path} ({self._name(step)}) holds another tree: {error}") from error

    def begin_to_write(self) -> None:
        """Makes the folder, moves damaged checkpoints aside, and removes what a killed process left.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self._manager is not None:
            return
        try:
            _hosts.on_first(self._tidy)
            with contextlib.ExitStack() as stack:
                stack.enter_context(_quiet())  # until close(), as Orbax's threads log at any time
                self._manager = self._open()
                self._thread = ThreadPoolExecutor(1, "checkpoints")
                self._silence = stack.pop_all()
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot hold checkpoints: {_brief(error)}") from error

    def save(self, step: int, tree: Any, meta: dict[str, Any], *, score: float | None = None) -> None:
        """Waits for the previous checkpoint and begins to write this one; ``tree`` may change once this call returns.

        What Orbax does before it writes takes much longer than copying the arrays, so a thread of our own calls it. In
        several processes the calling thread does, as all processes must make Orbax's exchanges in the same order.

        Args:
            step: the step of the training, greater than that of every earlier checkpoint.
            tree: a pytree of arrays and typed PRNG keys.
            meta: anything that JSON can hold, without NaN.
            score: the best checkpoint is the one with the lowest score; a checkpoint with None is never the best.

        Raises:
            TypeError: a leaf is neither an array nor a key.
            CheckpointError: this step is not the newest, the folder cannot be written, or the previous checkpoint could
                not be written.
        """
        self.wait()
        leaves, entries = _pack(tree)
        content = {"meta": meta, "score": score, "leaves": entries}
        whole = {"format": _FORMAT, "crc32": _crc(content), "content": content}
        self.begin_to_write()
        args = _orbax().args
        items = args.Composite(state=args.PyTreeSave(leaves), meta=args.JsonSave(whole))
        newest = self.newest
        if newest is not None and step <= newest:
            raise CheckpointError(f"{self.directory}: step {step} is not after {newest}, so it was not saved")
        if score is not None:
            self._scores[step] = score
        self._saving = step
        try:
            if _hosts.count() == 1:
                self._written = self._thread.submit(self._write, step, items)
            else:
                self._begin(step, items)
        except Exception as error:
            raise self._failed(error) from error

    def _write(self, step: int, items: Any) -> None:
        self._begin(step, items)
        self._manager.wait_until_finished()  # here, as Orbax raises an error once in each thread that waits

    def _begin(self, step: int, items: Any) -> None:
        if not self._manager.save(step, args=items):
            raise RuntimeError(f"Orbax did not save step {step}")

    def wait(self) -> None:
        """Returns when the checkpoint that was begun is on the disk and would survive a power failure.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        if self._saving is None:
            return
        try:
            if self._written is not None:
                self._written.result()
            else:
                self._manager.wait_until_finished()
            if _hosts.index() == 0:
                sync_tree(self.directory / str(self._saving))
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def close(self) -> None:
        """Waits as :meth:`wait` does, and closes Orbax's manager.

        Raises:
            CheckpointError: the checkpoint that was begun could not be written.
        """
        try:
            self.wait()
        finally:
            if self._manager is not None:
                with self._silence, contextlib.suppress(Exception):  # a failed save is raised again by Orbax's threads
                    self._manager.close()
                self._thread.shutdown()
                self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; while another error is being raised, an error of the checkpoints is dropped."""
        with contextlib.suppress(*((CheckpointError,) if kind else ())):
            self.close()

    def _tidy(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        for step in self._damaged:
            _set_aside(self.directory, step)
        self._scores.update(_scores(self.directory))

    def _open(self) -> Any:
        ocp, policies = _orbax(), importlib.import_module("orbax.checkpoint.checkpoint_managers")
        policy = policies.AnyPreservationPolicy([policies.LatestN(self._keep), _LowestScore(self._scores)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # In the background, a folder that cannot be made blocks the process for minutes, and two threads that save
            # into two folders wait for each other's signals.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {"state": _arrays(), "meta": ocp.JsonCheckpointHandler()}
        try:
            return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except Exception:  # a damaged time in one of these files keeps Orbax from opening the folder
            if _hosts.count() > 1:
                raise
            for path in self.directory.glob("*/_CHECKPOINT_METADATA"):
                path.unlink()
            return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _failed(self, error: Exception) -> CheckpointError:
        """Returns the error to raise. The files of the failed checkpoint stay, as Orbax may still add to them."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        logging.getLogger("absl").addFilter(_is_ours)  # for good: Orbax's other threads fail later, even after close
        self._scores.pop(self._saving or 0, None)
        self._saving = None
        return CheckpointError(f"a checkpoint could not be written to {self.directory}: {_brief(error)}")


class _LowestScore(NamedTuple):
    """Keeps the checkpoint with the lowest score, as Orbax's BestN does, but by scores that our checksum covers."""

    scores: dict[int, float]  # by step

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        best = _best(self.scores)
        return [info.step == best for info in checkpoints]


# --- Reading; nothing in the folder is changed, so another process may be writing there.


def read_checkpoint(
    directory: Path,
    which: int | str = "latest",
    *,
    warn: Callable[[str], object] = lambda line: None,
    name: Callable[[int], str] = "step {}".format,
) -> Stored:
    """Reads a checkpoint from a folder into which another process may be writing.

    Args:
        directory: the folder of the checkpoints.
        which: a step, "latest" for the newest whole checkpoint, or "best" for the one with the lowest score.
        warn: called with one line for each damaged checkpoint that is skipped.
        name: turns a step into words, for ``warn``.

    Raises:
        NoCheckpointError: there is no checkpoint, or none with a score for "best".
        CheckpointError: the checkpoint does not exist, is damaged or has another format, or no checkpoint is whole.
    """
    directory = Path(directory).absolute()
    if which == "latest":
        found, damaged = _newest_whole(directory)
        _report_damaged(directory, damaged, found.step, warn, name)
        return found
    step = _best(_scores(directory)) if which == "best" else int(which)
    if step is None:
        raise NoCheckpointError(f"{directory} holds no checkpoint with a score")
    path = directory / str(step)
    try:
        return _read(path)
    except _IncompatibleError:
        raise
    except Exception as error:
        what = f"is damaged ({_brief(error)})" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}") from error


def fill_params(leaves: dict[str, Any], like: Any) -> Any:
    """Returns the stored parameters to evaluate, as a tree like ``like``: the average if the checkpoint holds one.

    Raises:
        ValueError: as ``fill`` does.
    """
    averaged = any(name.split(".")[0] == "average" for name in leaves)
    return fill(leaves, like, "average" if averaged else "state.params")


def fill(leaves: dict[str, Any], like: Any, prefix: str = "") -> Any:
    """Returns a tree with the structure of ``like``, made of stored leaves.

    Args:
        leaves: the leaves by name, as in :class:`Stored`.
        like: a pytree of arrays, or of shapes.
        prefix: the path of the wanted part, such as ``"state.params"``; empty for the whole tree.

    Raises:
        ValueError: a leaf is missing, superfluous, or has another shape or dtype; the message names the first one.
    """
    start = prefix and f"{prefix}."
    wanted = {(start + name).removesuffix("."): leaf for name, leaf in _named(like).items()}
    stored = {name: leaf for name, leaf in leaves.items() if name == prefix or name.startswith(start)}
    for name in (*wanted, *stored):
        theirs, ours = _shown(stored.get(name)), _shown(wanted.get(name))
        if theirs != ours:
            raise ValueError(f"{name} is {theirs} there, {ours} here")
    return jax.tree.unflatten(jax.tree.structure(like), [jax.device_put(stored[name]) for name in wanted])


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree as NumPy arrays by name; a PRNG key becomes the array of its words."""
    leaves, entries = _pack(tree)
    return {name: leaves.get(name, np.zeros(entry["shape"], entry["dtype"])) for name, entry in entries.items()}


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name.

    Raises:
        TypeError: two leaves have the same name.
    """
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    named = dict(pairs)
    if len(named) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TypeError(f"a checkpoint names each leaf by its path; got two leaves with the path {twice}")
    return named


def _shown(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _newest_whole(directory: Path) -> tuple[Stored, dict[int, str]]:
    """Returns the newest checkpoint that can be read, and the reason for each newer one that is damaged."""
    damaged: dict[int, str] = {}
    for step in reversed(_steps(directory)):
        try:
            return _read(directory / str(step)), damaged
        except _IncompatibleError:
            raise
        except Exception as error:  # Orbax's and TensorStore's errors have no class in common
            if (directory / str(step)).exists():  # else another process has deleted it meanwhile
                damaged[step] = _brief(error)
    if not damaged:
        raise NoCheckpointError(f"{directory} holds no checkpoint")
    newest = max(damaged)
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoints in {directory} is whole; step {newest}: {damaged[newest]}"
    )


def _report_damaged(
    directory: Path, damaged: dict[int, str], used: int, warn: Callable[[str], object], name: Callable[[int], str]
) -> None:
    for step, reason in damaged.items():
        warn(f"checkpoint {directory / str(step)} ({name(step)}) is damaged ({reason}): {name(used)} is used instead")


def _set_aside(directory: Path, step: int) -> None:
    """Moves a checkpoint into ``damaged/``, under a name that is free."""
    folder = directory / _DAMAGED
    folder.mkdir(exist_ok=True)
    target = folder / str(step)
    while target.exists():
        target = target.with_name(target.name + "-again")
    (directory / str(step)).rename(target)


def _scores(directory: Path) -> dict[int, float]:
    """Returns the scores by step; a damaged checkpoint has no score."""
    scores: dict[int, float] = {}
    for step in _steps(directory):
        with contextlib.suppress(Exception):
            score = _read_json(directory / str(step))["score"]
            scores |= {} if score is None else {step: score}
    return scores


def _best(scores: dict[int, float]) -> int | None:
    """Returns the step with the lowest score, the earliest among equal scores; None without scores."""
    return min(scores, key=lambda step: (scores[step], step), default=None)


def _read_json(path: Path) -> dict[str, Any]:
    """Reads what is stored beside the arrays, and checks its format and its checksum."""
    whole = json.loads((path / "meta" / "metadata").read_bytes())
    if isinstance(whole["format"], int) and whole["format"] > _FORMAT:
        raise _IncompatibleError(
            f"checkpoint {path} is of format {whole['format']}, written by a newer version of planar_vae_jax; this one "
            f"reads format {_FORMAT} (if no newer version wrote it, it is damaged: move it elsewhere, and an older one "
            "is used)"
        )
    content = whole["content"]
    if whole["format"] != _FORMAT or whole["crc32"] != _crc(content):
        raise ValueError("its meta data do not fit their checksum")
    return content


def _read(path: Path) -> Stored:
    """Reads a checkpoint and checks it; any error but ``_IncompatibleError`` means that it is damaged or missing."""
    content = _read_json(path)
    entries = content["leaves"]
    ocp, epath = _orbax(), importlib.import_module("etils.epath")
    names = [name for name, entry in entries.items() if 0 not in entry["shape"]]
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet():
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        state = _arrays().restore(epath.Path(path / "state"), args=args)
    leaves = {}
    for name, entry in entries.items():
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        array = np.ascontiguousarray(state[name]) if name in names else np.zeros(shape, dtype)
        array = array.reshape(shape)
        if array.dtype != dtype or _crc_of(array) != entry["crc32"]:
            raise ValueError(f"{name} does not fit its checksum")
        key = entry.get("key")
        leaves[name] = array if key is None else jax.random.wrap_key_data(jax.device_put(array), impl=key)
    return Stored(int(path.name), leaves, content["meta"], content["score"])


def _arrays() -> Any:
    """Orbax's handler of trees of NumPy arrays, except that an array that fails waits for the others.

    Otherwise the first failure ends the event loop while TensorStore is still at work on the others, and each of them
    prints a traceback.
    """
    ocp = _orbax()
    handler: Any = ocp.type_handlers.NumpyHandler

    class Patient(handler):
        # Not public in Orbax; a version without it would only bring the tracebacks back.
        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            write, args = super()._background_serialize, args or [ocp.SaveArgs()] * len(values)
            each = zip(values, infos, args, strict=True)
            await _all(write([value], [info], [arg]) for value, info, arg in each)

        async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
            read, args = super().deserialize, args or [ocp.RestoreArgs()] * len(infos)
            found = await _all(read([info], [arg]) for info, arg in zip(infos, args, strict=True))
            return [arrays[0] for arrays in found]

    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, Patient()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


async def _all(coroutines: Iterable[Any]) -> list[Any]:
    """Returns the results of all coroutines; raises the first error once all of them are done."""
    found: list[Any] = await asyncio.gather(*coroutines, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def _pack(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Returns the leaves as NumPy arrays, and an entry with dtype, shape and checksum for each.

    Orbax stores no empty arrays, so an empty leaf has an entry alone.
    """
    leaves, entries = {}, {}
    for name, leaf in _named(tree).items():
        entry: dict[str, Any] = {}
        if is_key(leaf):
            entry["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if not hasattr(leaf, "dtype") or leaf.dtype.hasobject or leaf.dtype.kind in "US":
            raise TypeError(f"a checkpoint holds arrays of numbers and PRNG keys; got {type(leaf).__name__} as {name}")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)  # whole on every device
        array = np.array(leaf)  # a copy, also of a JAX array, whose memory is used again once it is donated
        array = array.astype(array.dtype.newbyteorder("="), copy=False)  # the byte order is not stored
        entries[name] = entry | {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": _crc_of(array)}
        if array.size:
            leaves[name] = array
    return leaves, entries


def _crc_of(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def _orbax() -> Any:
    return importlib.import_module("orbax.checkpoint")  # takes half a second, so it waits until a checkpoint is used


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which Orbax logs nothing: an error that matters is raised and reported in our words."""

    def is_ours(record: logging.LogRecord) -> bool:
        return _is_ours(record)

    logger = logging.getLogger("absl")
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _brief(error: BaseException) -> str:
    """Returns one line: the operating system's reason if the error contains one, else the error's text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    found = re.search(r"(?:OS error |os_error_code=')(\d+)", text)  # two forms in which TensorStore reports it
    return os.strerror(int(found[1])) if found else f"{type(error).__name__}: {text}"[:200]
