"""What every experiment's run does outside its mathematics: its folder, its files, its progress and its errors."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.flags import UsageError
from planar_vae_jax.data import DataError


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs ``main(argv)``; a user's mistake becomes one line on stderr and exit status 2."""
    keep_compiled_programs()
    try:
        main(sys.argv[1:])
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a second start compiles nothing.

    In the user's cache folder, unless ``JAX_COMPILATION_CACHE_DIR`` names one (empty: no cache).
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "planar_vae_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` at the end: whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON; numbers that are not finite become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content


def warn(text: str) -> None:
    """Shows a warning of several lines on stderr, whatever the terminal's log level."""
    print(f"\n{text}\n", file=sys.stderr, flush=True)


def check_workdir(workdir: str) -> Path:
    """Makes the folder and checks that a run can be written into it.

    Raises:
        UsageError: if it cannot be written, or holds a run already.
    """
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--workdir must be a folder that can be written; got {workdir!r} ({reason})") from None
    if (path / "config.json").exists():
        raise UsageError(f"--workdir={workdir} holds a run already; name another, or move it away")
    return path


class Run:
    """A run's folder: ``config.json`` at the start, a line of ``metrics.jsonl`` a step of logging, ``summary.json``."""

    def __init__(self, config: Any, experiment: str):
        """Makes the folder ``config.workdir`` (:func:`check_workdir`) and writes ``config.json``."""
        self.workdir = check_workdir(config.workdir)
        device = jax.devices()[0]
        packages = ("jax", "jaxlib", "flax", "optax", "numpy")
        versions = {name: importlib.metadata.version(name) for name in packages}
        write_json(
            self.workdir / "config.json",
            {
                "experiment": experiment,
                "flags": dataclasses.asdict(config),
                "versions": {"python": platform.python_version(), **versions},
                "device": {
                    "platform": device.platform,
                    "kind": device.device_kind,
                    "count": jax.device_count(),
                },
            },
        )
        print(f"writing to {self.workdir}", flush=True)

    def log(self, **metrics: Any) -> None:
        """Appends one line to ``metrics.jsonl``."""
        with (self.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        write_json(self.workdir / "summary.json", summary)

    def save_figure(self, name: str, figure: Any) -> None:
        """Writes a matplotlib figure as ``name`` in the folder."""
        with replacing(self.workdir / name) as temporary:
            figure.savefig(temporary)


class Progress:
    """A progress bar on a terminal; elsewhere a line of text for each update."""

    def __init__(self, total: int, unit: str):
        self._bar = tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True)
        self._done, self._total, self._unit = 0, total, unit

    def update(self, done: int, **values: float) -> None:
        """``done`` more units, with the figures to show."""
        self._done += done
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done)
        if self._bar.disable:
            print(f"{self._unit} {self._done}/{self._total}: {text}", flush=True)

    def close(self) -> None:
        self._bar.close()
