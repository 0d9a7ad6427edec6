"""Files that are whole or not there."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNFINISHED = ".unfinished-"


class RunError(Exception):
    """A run that cannot go on, through no mistake in its flags; the message is one line."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` at the end: whole or not at all.

    Raises:
        RunError: the file could not be written (no space, no permission ...); what was at ``path`` is still there.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_UNFINISHED}{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of a process that was killed; nobody may be writing into ``folder``."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON; numbers that are not finite become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes one strict JSON object a line; numbers that are not finite become null."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or ``None`` if there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def finite(content: Any) -> Any:
    """The same with ``None`` for numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content
