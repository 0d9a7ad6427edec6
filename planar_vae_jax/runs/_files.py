"""Writes files whole or not at all, and returns when they are on the disk; reads and cuts ``metrics.jsonl``."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_UNFINISHED = ".unfinished-"


class RunError(Exception):
    """A run cannot continue, for a reason other than a mistake in its flags; the message is one line."""


@contextmanager
def as_run_error(kind: type[Exception]) -> Iterator[None]:
    """Turns errors of this kind into a :class:`RunError` with their text."""
    try:
        yield
    except kind as error:
        raise RunError(str(error)) from error


def sync(path: Path) -> None:
    """Returns when a file's contents, or a folder's list of names, would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Syncs everything in a folder, the folder, and its parent, which holds the folder's name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        sync(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the system into a :class:`RunError` that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` at the end: whole or not at all.

    No other process may be writing into the folder.

    Raises:
        RunError: the file could not be written (no space, no permission ...); what was at ``path`` is still there.
    """
    temporary = path.with_name(_UNFINISHED + path.name)
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of a process that was killed; no process may be writing into ``folder``."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON; numbers that are not finite become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or ``None`` if there is no such file.

    Raises:
        ValueError: the file holds anything but a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    """Appends one strict JSON object as a line, and returns when it is on the disk.

    Raises:
        RunError: the line could not be written; part of it may be in the file.
    """
    new = not path.exists()
    with writing(path):
        with path.open("a") as file:
            file.write(json.dumps(finite(content), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(path.parent)


def write_json_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replaces a file by strict JSON objects, one on each line."""
    with replacing(path) as temporary:
        text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def read_json_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Returns the first ``count`` lines of a file of JSON objects.

    Raises:
        RunError: the file has fewer lines, or one of them is damaged.
    """
    return [json.loads(line) for line in _whole_lines(path, count)]


def cut_json_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Cuts the file after its first ``count`` lines, and returns them.

    Raises:
        RunError: the file has fewer lines, one of them is damaged, or the file cannot be written.
    """
    size = sum(map(len, _whole_lines(path, count)))
    if path.exists() and path.stat().st_size > size:
        with writing(path), path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return read_json_lines(path, count)


def _whole_lines(path: Path, count: int) -> list[bytes]:
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    lines = raw.splitlines(keepends=True)[:count]
    whole = next((number for number, line in enumerate(lines) if not _is_object(line)), len(lines))
    if whole < count:
        raise RunError(
            f"{path}: line {whole + 1} of the {count} up to the checkpoint is missing or damaged; what is lost is only "
            "the history of the losses: put the file back, or write {} in place of each line that is lost"
        )
    return lines


def _is_object(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def finite(content: Any) -> Any:
    """Returns the content with ``None`` in place of every float that is not finite, which JSON cannot hold."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content


def write_failure(folder: Path, arrays: Mapping[str, Any], facts: dict[str, Any]) -> None:
    """Writes ``state.npz`` and ``failure.json``: the state in which a training failed, and the facts of the failure."""
    folder.mkdir(exist_ok=True)
    with replacing(folder / "state.npz") as temporary:
        np.savez(temporary, **arrays)
    write_json(folder / "failure.json", facts)
