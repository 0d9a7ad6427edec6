"""What a run prints: progress, figures, warnings and its last line, all readable in 80 columns."""

import contextlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from planar_vae_jax.data import ArgumentError, DataError
from planar_vae_jax.runs import _hosts, _signals
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.statistics import with_error

_WIDTH = 80  # columns
_CACHE_BYTES = 2**29  # limit for the compiled programs that are kept from one process to the next


def run_main(main: Callable[[list[str]], object]) -> None:
    """Runs ``main(argv)`` and exits: each error becomes one line on stderr and a status.

    0: done. 1: the run failed (not finite, no space, no whole checkpoint, no memory). 2: a user's mistake.
    128 + N: stopped by signal N.
    """
    _open_streams()
    _signals.install()
    _keep_programs()
    try:
        main(sys.argv[1:])
        _hosts.leave()
    except UsageError as error:
        _exit(2, f"error: {error}")
    except ArgumentError as error:  # its first word is the name of an argument, which is a flag
        _exit(2, f"error: --{error}")
    except DataError as error:
        _exit(2, f"error: {error}")
    except (RunError, OSError) as error:
        _exit(1, f"error: {error}")
    except _signals.Stopped as stopped:
        _exit(128 + stopped.number, str(stopped))
    except Exception as error:
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            _exit(1, f"error: out of memory; try smaller sizes ({' '.join(str(error).split())[:200]})")
        if _hosts.count() == 1:
            raise
        traceback.print_exc()
        os._exit(1)  # at the interpreter's end JAX would wait for the other hosts
    _signals.ignore()


def _open_streams() -> None:
    """Makes stdout and stderr usable where they are closed, as some daemons leave them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # no file of the run may become file 1 or 2, into which libraries write messages
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 # until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a locale without ±, for example


def _is_out_of_memory(error: Exception) -> bool:
    words = ("RESOURCE_EXHAUSTED", "Out of memory")  # the second alone if memory runs out during the computation
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


def _exit(status: int, text: str) -> None:
    _signals.ignore()
    print(text, file=sys.stderr, flush=True)
    if status != 1:
        _hosts.leave()
    elif _hosts.count() > 1:  # the other hosts may not know yet, so nobody waits for them
        os._exit(status)
    sys.exit(status)


def _keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a second start compiles nothing.

    It lies in the user's cache folder and is bounded in size, unless ``JAX_COMPILATION_CACHE_DIR`` names another one
    (empty: no cache). If the folder cannot be written, there is no cache.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planar_vae_jax" / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        for program in folder.glob("*-cache"):  # JAX writes a program, then its time; it may be killed in between
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)
    except (RuntimeError, OSError):  # no HOME, and the user is not in the list of users; or no right to write
        return
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def say(text: str = "") -> None:
    """Prints a line on stdout; a pipe that its reader has closed (``| head``) does not end the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """Prints a warning on stderr, wrapped to 80 columns, in process 0 alone."""
    if _hosts.index():
        return
    wrap = textwrap.TextWrapper(_WIDTH - 1, break_on_hyphens=False, break_long_words=False).wrap  # paths stay whole
    lines = [wrapped for line in text.split("\n") for wrapped in wrap(line) or [""]]
    tqdm.write("\n".join(["", *lines, ""]), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A progress bar on a terminal; elsewhere a line of text for each update."""

    def __init__(self, total: int, unit: str, done: int = 0):
        form = "{desc} {n_fmt}/{total_fmt} |{bar:8}| {elapsed}<{remaining}{postfix}"
        disable = True if _hosts.index() else None  # None: if there is no terminal
        self._bar = tqdm(total=total, initial=done, desc=unit, bar_format=form, disable=disable, dynamic_ncols=True)
        self._done, self._total, self._unit = done, total, unit

    def update(self, done: int, values: Mapping[str, float | None]) -> None:
        """Shows how many are done, and figures, each with its standard error ``NAME_se`` if there is one."""
        shown = {name: value for name, value in values.items() if not name.endswith("_se")}
        text = ", ".join(f"{name} {with_error(value, values.get(f'{name}_se'))}" for name, value in shown.items())
        self._bar.set_postfix_str(text.replace("_loss ", " "), refresh=False)  # 80 columns have room for no more
        self._bar.update(done - self._done)
        self._done = done
        if self._bar.disable:
            say(f"{self._unit} {done}/{self._total}: {text}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar on the terminal, and ends its line."""
        self._bar.close()


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints a line for each of ``rows``; each column shows a mean with its standard error ``COLUMN_se``."""
    say(table(rows, columns))


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Returns the text of :func:`print_table`; columns that do not fit beside the others follow in blocks below."""
    blocks = [[["", *rows]]]
    for column in columns:
        cells = [column.replace("_", " "), *(_cell(row, column) for row in rows.values())]
        if len(blocks[-1]) > 1 and _width([*blocks[-1], cells]) > _WIDTH:
            blocks.append([["", *rows]])
        blocks[-1].append(cells)
    return "\n\n".join(_lines(block) for block in blocks)


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return str(value) if isinstance(value, int) else with_error(value, row.get(f"{column}_se"))


def _width(block: list[list[str]]) -> int:
    return sum(max(map(len, cells)) + 2 for cells in block) - 2


def _lines(block: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in block]
    rows = zip(*block, strict=True)
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
