"""A folder as a place: its path, whether it can be written, and its lock."""

import sys
import tempfile
from pathlib import Path

import filelock

from planar_vae_jax.runs.config import UsageError


def expand(workdir: str) -> Path:
    """The folder's path.

    Raises:
        UsageError: it cannot be one.
    """
    try:
        path = Path(workdir).expanduser()
        str(path.absolute()).encode()  # TensorStore takes no other name
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name, or not UTF-8; ~ of nobody
        raise _not_a_folder(workdir, error) from None
    return path


def make(path: Path, named: str) -> None:
    """Makes the folder and checks that it can be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        raise _not_a_folder(named, error) from None


def _not_a_folder(named: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--workdir must be a folder that can be written; got {named!r} ({reason})")


def locked(workdir: Path, named: str) -> filelock.FileLock | None:
    """A lock on the folder that ends with this process, however it ends; ``None`` where files cannot be locked."""
    lock = filelock.FileLock(workdir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"--workdir={named} is in use by another process; name another, or wait for it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError):
            raise _not_a_folder(named, error) from None
        print(f"{workdir / '.lock'} cannot be locked ({error}): see that no other run uses it", file=sys.stderr)
        return None
    return lock
