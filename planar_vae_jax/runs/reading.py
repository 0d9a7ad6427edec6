"""Checkpoints read, whole or not at all; nothing in their folder is changed, also beside a process that writes there.

found = read_checkpoint(workdir / "checkpoints", "best")    # found.leaves["['params']['w']"]
"""

import contextlib
import importlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planar_vae_jax.runs import leaves as packing
from planar_vae_jax.runs.files import RunError

FORMAT = 2  # of the contents; to be raised whenever an older program could misread them
READABLE = (1, 2)  # 1: version 0.1


class CheckpointError(RunError):
    """A checkpoint that cannot be written, or none that can be read: one line."""


class NoCheckpointError(CheckpointError):
    """There is none, or none that has a score."""


class NotDamagedError(CheckpointError):
    """Of a newer format or another tree: nothing to pass over."""


class Stored(NamedTuple):
    """A checkpoint's contents, read without knowing its tree."""

    step: int
    leaves: dict[str, Any]  # by name, as in "['state'].params['w']": NumPy arrays, typed keys, Python numbers
    meta: dict[str, Any]


def read_checkpoint(
    directory: Path,
    which: int | str = "latest",
    *,
    warn: Callable[[str], object] = lambda line: None,
    check: Callable[[dict[str, Any]], object] = lambda leaves: None,
    name: Callable[[int], str] = "step {}".format,
) -> Stored:
    """A checkpoint of a folder that somebody else may be writing into; nothing there is changed.

    Args:
        directory: of the checkpoints.
        which: a step; "latest": the newest that is whole; "best": of those that are there, that of the lowest score.
        warn: is given a line for each damaged checkpoint that is passed over.
        check: is given the leaves that are read; a ``ValueError`` of its makes that checkpoint a damaged one.
        name: a step in people's words, for ``warn``.

    Raises:
        NoCheckpointError: there is none.
        CheckpointError: it is damaged, or none is whole; or it is of a newer format.
    """
    directory = Path(directory).absolute()

    def checked(step: int) -> Stored:
        found = read(directory / str(step))
        check(found.leaves)
        return found

    if which == "latest":
        found, damaged = newest_whole(directory, checked)
        tell_damaged(directory, damaged, found.step, warn, name)
        return found
    chosen = best(scores(directory)) if which == "best" else int(which)
    if chosen is None:
        raise NoCheckpointError(f"{directory} holds no checkpoint with a score")
    with whole(directory / str(chosen)):
        return checked(chosen)


def tell_damaged(
    directory: Path, damaged: dict[int, str], used: int, warn: Callable[[str], object], name: Callable[[int], str]
) -> None:
    """A line for each checkpoint that is passed over (:func:`newest_whole`)."""
    for step, reason in damaged.items():
        warn(f"checkpoint {directory / str(step)} ({name(step)}) is damaged ({reason}): {name(used)} is used instead")


def check_finite(leaves: dict[str, Any]) -> None:
    """For :func:`read_checkpoint`: training saves no state that is not finite, but a fault of the memory may make one.

    Raises:
        ValueError: a number of the state is not finite.
    """
    arrays = [leaf for name, leaf in leaves.items() if name.startswith("['state']") and isinstance(leaf, np.ndarray)]
    if not all(np.all(np.isfinite(leaf)) for leaf in arrays):
        raise ValueError("not every parameter is finite")


def steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def newest_whole(directory: Path, read: Callable[[int], Any]) -> tuple[Any, dict[int, str]]:
    """The newest step that can be read, and why those above it cannot."""
    damaged: dict[int, str] = {}
    for step in reversed(steps(directory)):
        try:
            return read(step), damaged
        except NotDamagedError:
            raise
        except Exception as error:  # Orbax's have no class in common
            if (directory / str(step)).exists():  # else another process has deleted it meanwhile
                damaged[step] = brief(error)
    if not damaged:
        raise NoCheckpointError(f"{directory} holds no checkpoint")
    newest = max(damaged)
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoints in {directory} is whole; step {newest}: {damaged[newest]}"
    )


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Tells that what cannot be read is damaged."""
    try:
        yield
    except NotDamagedError:
        raise
    except Exception as error:
        what = f"is damaged ({brief(error)})" if path.exists() else "is not there"
        raise CheckpointError(f"checkpoint {path} {what}") from error


def scores(directory: Path) -> dict[int, float]:
    """Of those that have one; one that cannot be read has none, so nothing keeps it once it is old."""
    found: dict[int, float] = {}
    for step in steps(directory):
        with contextlib.suppress(Exception):
            score = read_content(directory / str(step))["score"]
            found |= {} if score is None else {step: score}
    return found


def best(scores: dict[int, float]) -> int | None:
    """The step of the lowest score, the first of equals."""
    return min(scores, key=lambda step: (scores[step], step), default=None)


def read_content(path: Path) -> dict[str, Any]:
    whole = json.loads((path / "meta" / "metadata").read_bytes())
    if isinstance(whole["format"], int) and whole["format"] > FORMAT:
        raise NotDamagedError(
            f"checkpoint {path} is of format {whole['format']}, written by a newer version of planar_vae_jax; this one "
            f"reads up to format {FORMAT} (if no newer one wrote it, it is damaged: move it elsewhere, and an older "
            "one is used)"
        )
    if whole["format"] not in READABLE or whole["crc32"] != crc(whole["content"]):
        raise ValueError("its meta data do not fit their checksum")
    return whole["content"]


def read(path: Path) -> Stored:
    """A checkpoint, as it is at this moment."""
    content = read_content(path)
    epath = importlib.import_module("etils.epath")
    silence(True)
    try:
        handler, args = orbax().ArrayCheckpointHandler(), orbax().args.ArrayRestore()
        vector = np.ascontiguousarray(handler.restore(epath.Path(path / "arrays"), args=args))
    finally:
        silence(False)
    if zlib.crc32(vector.data) != content["crc32"]:
        raise ValueError("its arrays do not fit their checksum")
    return Stored(int(path.name), packing.named(vector, content["leaves"]), content["meta"])


def crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def orbax() -> Any:
    return importlib.import_module("orbax.checkpoint")  # half a second: only where a checkpoint is


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


_calls = 0  # of Orbax that are under way, of all checkpoints


def silence(on: bool) -> None:
    """While we call Orbax, it logs nothing: what matters is raised, and told in our words."""
    global _calls
    _calls += 1 if on else -1
    change = logging.getLogger("absl").addFilter if _calls > 0 else logging.getLogger("absl").removeFilter
    change(_is_not_orbax)


def brief(error: BaseException) -> str:
    """One line: what the operating system said, if it can be told from the rest, else the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    said = re.search(r"(?:OS error |os_error_code=')(\d+)", text)  # TensorStore's ways to put it
    return os.strerror(int(said[1])) if said else f"{type(error).__name__}: {text}"[:200]
