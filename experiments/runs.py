"""What every experiment's run does outside its mathematics: its folder, its files, its progress and its errors."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments import signals
from experiments.files import RunError, finite, replacing, write_json
from experiments.flags import UsageError
from planar_vae_jax.checkpoints import CheckpointError
from planar_vae_jax.data import DataError


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs ``main(argv)`` and exits: each error becomes one line on stderr and a status.

    0: done. 1: the run failed (not finite, no space, no whole checkpoint, no memory). 2: a user's mistake.
    128 + N: stopped by signal N.
    """
    signals.install()
    keep_compiled_programs()
    try:
        main(sys.argv[1:])
    except (UsageError, DataError) as error:
        _exit(2, f"error: {error}")
    except (RunError, CheckpointError) as error:
        _exit(1, f"error: {error}")
    except signals.Stopped as stopped:
        _exit(128 + stopped.number, str(stopped))
    except OSError as error:
        _exit(1, f"error: {error}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _exit(1, f"error: out of memory; try smaller sizes ({' '.join(str(error).split())[:200]})")
    signals.ignore()


def _exit(status: int, text: str) -> None:
    signals.ignore()
    print(text, file=sys.stderr, flush=True)
    sys.exit(status)


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a second start compiles nothing.

    In the user's cache folder, unless ``JAX_COMPILATION_CACHE_DIR`` names one (empty: no cache).
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "planar_vae_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def warn(text: str) -> None:
    """Shows a warning of several lines on stderr, whatever the terminal's log level."""
    print(f"\n{text}\n", file=sys.stderr, flush=True)


def make_workdir(workdir: str) -> Path:
    """Makes the folder and checks that it can be written into.

    Raises:
        UsageError: it cannot.
    """
    try:
        path = Path(workdir).expanduser()
        str(path.absolute()).encode()  # TensorStore takes no other name
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name, or not UTF-8; ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--workdir must be a folder that can be written; got {workdir!r} ({reason})") from None
    return path


def describe(config: Any, experiment: str) -> dict[str, Any]:
    """The contents of ``config.json``: every flag, the versions, the device."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "experiment": experiment,
        "flags": dataclasses.asdict(config),
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpus": os.cpu_count(),
        },
    }


class Run:
    """A run's folder: ``config.json`` at the start, figures, ``summary.json`` at the end."""

    def __init__(self, config: Any, experiment: str):
        """Makes the folder ``config.workdir`` and writes ``config.json``.

        Raises:
            UsageError: the folder cannot be written, or holds a run already.
        """
        self.workdir = make_workdir(config.workdir)
        if (self.workdir / "config.json").exists():
            raise UsageError(f"--workdir={config.workdir} holds a run already; name another, or move it away")
        write_json(self.workdir / "config.json", describe(config, experiment))
        print(f"writing to {self.workdir}", flush=True)

    def log(self, **metrics: Any) -> None:
        """Appends one line to ``metrics.jsonl``."""
        with (self.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json`` and says where everything is."""
        write_json(self.workdir / "summary.json", summary)
        print(f"figures and summary.json are in {self.workdir}", flush=True)

    def save_figure(self, name: str, figure: Any) -> None:
        """Writes a matplotlib figure as ``name`` in the folder."""
        with replacing(self.workdir / name) as temporary:
            figure.savefig(temporary)


class Progress:
    """A progress bar on a terminal; elsewhere a line of text for each update."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=None, dynamic_ncols=True)
        self._done, self._total, self._unit = done, total, unit

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
