"""What a run says: its progress, its figures, its warnings, its end; all readable in 80 columns."""

import io
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from planar_vae_jax.runs import compiled, processes, signals
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.files import RunError
from planar_vae_jax.statistics import with_error

WIDTH = 80  # columns


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs ``main(argv)`` and exits: each error becomes one line on stderr and a status.

    0: done. 1: the run failed (not finite, no space, no whole checkpoint, no memory). 2: a user's mistake.
    128 + N: stopped by signal N.
    """
    signals.install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it has no ±, say
    compiled.keep_programs()
    try:
        main(sys.argv[1:])
        processes.leave()
    except UsageError as error:
        _exit(2, f"error: {error}")
    except (RunError, OSError) as error:
        _exit(1, f"error: {error}")
    except signals.Stopped as stopped:
        _exit(128 + stopped.number, str(stopped))
    except Exception as error:
        if processes.is_of_others(error):
            _exit(1, f"error: {processes.LOST}")
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            _exit(1, f"error: out of memory; try smaller sizes ({' '.join(str(error).split())[:200]})")
        if processes.count() == 1:
            raise
        traceback.print_exc()  # at the interpreter's end JAX would wait for the others
        processes.end()
    signals.ignore()


def _is_out_of_memory(error: Exception) -> bool:
    words = ("RESOURCE_EXHAUSTED", "Out of memory")  # the latter alone where the device finds out as it computes
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


def _exit(status: int, text: str) -> None:
    signals.ignore()
    print(text, file=sys.stderr, flush=True)
    if status != 1:
        processes.leave()
    elif processes.count() > 1:  # the others may not know yet: nobody waits for them
        processes.end()
    sys.exit(status)


def warn(text: str) -> None:
    """Shows a warning on stderr, whatever the terminal's log level: its lines, wrapped; by process 0."""
    if processes.index():
        return
    wrap = textwrap.TextWrapper(WIDTH - 1, break_on_hyphens=False, break_long_words=False).wrap  # paths stay whole
    lines = [wrapped for line in text.split("\n") for wrapped in wrap(line) or [""]]
    tqdm.write("\n".join(["", *lines, ""]), file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A progress bar on a terminal; elsewhere a line of text for each update."""

    def __init__(self, total: int, unit: str, done: int = 0):
        form = "{desc} {n_fmt}/{total_fmt} |{bar:8}| {elapsed}<{remaining}{postfix}"
        disable = True if processes.index() else None  # None: where there is no terminal
        self._bar = tqdm(total=total, initial=done, desc=unit, bar_format=form, disable=disable, dynamic_ncols=True)
        self._done, self._total, self._unit = done, total, unit

    def update(self, done: int, values: Mapping[str, float | None]) -> None:
        """``done`` of them are done, with the figures to show, each beside its standard error ``NAME_se``."""
        shown = {name: value for name, value in values.items() if not name.endswith("_se")}
        text = ", ".join(f"{name} {with_error(value, values.get(f'{name}_se'))}" for name, value in shown.items())
        self._bar.set_postfix_str(text.replace("_loss ", " "), refresh=False)  # 80 columns have room for no more
        self._bar.update(done - self._done)
        self._done = done
        if self._bar.disable:
            print(f"{self._unit} {done}/{self._total}: {text}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the bar, and a new line for what is said next."""
        self._bar.close()


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints figures: a line for each of ``rows``, its mean of each column beside its standard error ``COLUMN_se``."""
    print(table(rows, columns), flush=True)


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The text of :func:`print_table`: as many columns side by side as there is room for, then the rest."""
    blocks = [[["", *rows]]]
    for column in columns:
        cells = [column.replace("_", " "), *(_cell(row, column) for row in rows.values())]
        if len(blocks[-1]) > 1 and _width([*blocks[-1], cells]) > WIDTH:
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
