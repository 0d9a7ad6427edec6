"""The folder of a run: who may write into it, whether it holds the same run, and what ``config.json`` says.

::

    data = ...                                          # loaded first: a run that is refused leaves no folder
    with open_run(config, "mnist", identity) as run:    # compares flags and data, locks the folder
        if run.finished: return
        fitted = fit(run, ...)                          # resumes from the newest checkpoint
        run.save_figure("loss.png", figure)
        run.finish(summary)
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from planar_vae_jax import __version__
from planar_vae_jax.runs import _hosts, _signals, _tensorboard
from planar_vae_jax.runs._about import command, facts, settings, shown_data, usage
from planar_vae_jax.runs._files import RunError, finite, read_json, remove_unfinished, replacing, sync, write_json
from planar_vae_jax.runs.config import (
    LAYOUT,
    RunFlags,
    UsageError,
    as_json,
    default_workdir,
    read_config,
    shown,
)
from planar_vae_jax.runs.console import say, warn
from planar_vae_jax.runs.devices import Devices, missing_accelerator, one_device
from planar_vae_jax.runs.page import Picture, render
from planar_vae_jax.statistics import Table

# Files that mark a folder as a run's, or as the remains of one.
_TRACES = ("config.json", "checkpoints", "metrics.jsonl", "summary.json")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


class RunFolder:
    """The folder of a run; while :func:`open_run` lasts, no other process may write into it.

    Attributes:
        workdir: the folder for figures, ``summary.json`` and ``report.html``.
        config: the run's flags.
        devices: the devices that the run computes on.
        finished: whether the run has nothing left to do.
    """

    def __init__(
        self,
        config: RunFlags,
        experiment: str,
        data: dict[str, Any] | None,
        devices: Devices,
        defaults: Mapping[str, Any] | None = None,
    ):
        """Looks at the folder and writes nothing.

        Raises:
            UsageError: see :func:`open_run`.
        """
        self.config = config
        self.devices = devices
        self._named = config.workdir or default_workdir(config, experiment)
        self.workdir = _expand(self._named)
        self._description = _describe(config, experiment, data, devices)
        self._defaults = dict(defaults or {})
        self._titles: dict[str, str] = {}  # of the pictures saved so far, by the names of their files
        self._lines: Sequence[Mapping[str, Any]] = ()
        self._best = False
        self._started, self._earlier = time.perf_counter(), 0.0
        self._lock: filelock.FileLock | None = None
        _hosts.check_same(_in_common(self._description))
        self._stored, self.finished = _hosts.on_first(self._look)

    @property
    def new(self) -> bool:
        """Whether the folder holds no earlier part of this run."""
        return self._stored is None

    @property
    def advice(self) -> str:
        """One clause that says how to resume this run."""
        if self.config.overwrite:  # which would begin afresh again
            return "run the same command without --overwrite to resume it"
        return "run the same command again to resume it"

    def seconds(self) -> float:
        """Returns the seconds spent on this run: by earlier processes up to the checkpoint, and by this process."""
        return self._earlier + time.perf_counter() - self._started

    def save_figure(self, name: str, figure: Any) -> None:
        """Writes a matplotlib figure as ``name``, a PNG file in the folder; ``report.html`` will show it."""
        if _hosts.index() == 0:
            with replacing(self.workdir / name) as temporary:
                figure.savefig(temporary)
            self._titles[name] = figure.get_suptitle()

    def save_text(self, name: str, text: str) -> None:
        """Writes a text file, in UTF-8 whatever the locale."""
        if _hosts.index() == 0:
            with replacing(self.workdir / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def trained(self, lines: Sequence[Mapping[str, Any]], best: bool) -> None:
        """Notes for ``report.html`` how the training went; ``fit`` calls it.

        Args:
            lines: the lines of ``metrics.jsonl``.
            best: whether the parameters to evaluate are those of the best checkpoint, not of the latest.
        """
        self._lines, self._best = lines, best

    def finish(self, summary: dict[str, Any], tables: Mapping[str, Sequence[Table]] | None = None) -> dict[str, Any]:
        """Writes ``report.html``, and ``summary.json``, which marks the run as finished.

        Args:
            summary: the final figures; a number has its standard error beside it as ``NAME_se``.
            tables: tables that the page shows in place of entries of the summary, by the entry's name.

        Returns:
            The summary.
        """
        _hosts.on_first(self._write_end, summary, tables or {})
        say(f"figures, report.html and summary.json are in {self.workdir}")
        return summary

    def _write_end(self, summary: dict[str, Any], tables: Mapping[str, Sequence[Table]]) -> None:
        pictures = [
            Picture(name, (self.workdir / name).read_bytes(), title)
            for name, title in self._titles.items()
            if name.endswith(".png")
        ]
        if self.config.tensorboard and pictures:
            last = self._lines[-1] if self._lines else {}
            _tensorboard.write_pictures(self.workdir, pictures, int(last.get("epoch", last.get("step", 0))))
        # Before the summary: every finished run has its page, and no page is older than the summary beside it.
        seconds = summary.get("seconds")
        page = render(
            title=", ".join(dict.fromkeys([_expand(self._named).resolve().name, self.workdir.resolve().name])),
            command=command(self.config, self._defaults),
            usage=usage(self.config, self._named, self._description["data"], best=self._best),
            settings=settings(self.config, self._defaults),
            facts=facts(
                {**self._description, **(self._stored or {})},
                str(self.devices),
                seconds if isinstance(seconds, float) else self.seconds(),
            ),
            summary=json.loads(json.dumps(finite(summary))),
            tables=tables,
            lines=self._lines,
            pictures=pictures,
        )
        with replacing(self.workdir / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
        write_json(self.workdir / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        """Returns the contents of ``summary.json`` of a finished run."""
        return _hosts.on_first(read_json, self.workdir / "summary.json") or {}

    def go_on(self, seconds: float, where: str | None) -> None:
        """Marks the run as unfinished again: process 0 removes its summary and page and updates ``config.json``.

        Args:
            seconds: time spent on the run so far.
            where: the state from which the run resumes, in words; None at its beginning.
        """
        self._earlier = seconds
        stored = self._stored
        if stored is None or _hosts.index():
            return
        say(f"resuming the run in {self.workdir} {where or 'from the beginning'}")
        for name in ("summary.json", "report.html"):  # of a shorter run, or damaged
            (self.workdir / name).unlink(missing_ok=True)
        now = {**stored, "flags": self._description["flags"]}
        if self.config.resume == "always":
            now["code"] = self._description["code"]
        if now != stored:
            write_json(self.workdir / "config.json", now)

    def evaluate_into(self, name: str, final: bool, seconds: float) -> None:
        """Sets where ``--eval_only`` writes: the folder if the figures are the run's own, else a folder inside it.

        Args:
            name: the name of the checkpoint, and of that folder.
            final: whether the run's own figures are those of this checkpoint.
            seconds: time spent on the run up to this checkpoint.
        """
        stored, flags = self._stored, self._description["flags"]
        assert stored is not None
        self._earlier = seconds
        free = [field.name for field in dataclasses.fields(self.config) if field.metadata["evaluation"]]
        changed = [f"{name}={shown(flags[name])}" for name in free if flags[name] != stored["flags"].get(name)]
        if not final or changed:
            self.workdir = self.workdir / "-".join([name, *changed])
            _hosts.on_first(self._make_ready)
        say(f"writing to {self.workdir}: figures of {name.replace('-', ' ')}")

    def _make_ready(self) -> None:
        _make(self.workdir, str(self.workdir))
        remove_unfinished(self.workdir)

    # --- For open_run

    def _look(self) -> tuple[dict[str, Any] | None, bool]:
        """Returns the stored run and whether it is finished; process 0 calls it."""
        self._stored = self._stored_run() if not self.config.overwrite else None
        finished = self._stored is not None and not self.config.eval_only and self._is_finished()
        return self._stored, finished

    def _take(self) -> dict[str, Any] | None:
        """Locks the folder and marks it as this run's; returns the stored run."""
        _make(self.workdir, self._named)
        self._lock = _locked(self.workdir, self._named)
        self._look()  # another process may have changed the folder meanwhile
        remove_unfinished(self.workdir)
        if self._stored is not None:
            self._compare_machine(self._stored)
            self._compare_code(self._stored)
            return self._stored
        if self.config.overwrite and any((self.workdir / name).exists() for name in _TRACES):
            self._move_aside()
        write_json(self.workdir / "config.json", self._description)
        say(f"writing to {self.workdir}")
        return None

    def _open(self) -> None:
        if self.finished:
            again = f"; --workdir={self._named} --eval_only draws its figures again" if self.config.drawn_again else ""
            say(f"the run in {self.workdir} is finished (summary.json){again}")
            assert self._stored is not None
            if _hosts.index() == 0:
                self._compare_code(self._stored)
            return
        self._stored = _hosts.on_first(self._take)
        say(f"computing on {self.devices}")
        missing = missing_accelerator()
        if missing is not None:
            warn(missing)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _forget(self) -> None:
        """Removes what a new run wrote if a mistake ended it before it trained, so that its flags can be corrected."""
        trained = ("checkpoints", "metrics.jsonl", "failed")
        if self.new and self._lock is not None and not any((self.workdir / name).exists() for name in trained):
            (self.workdir / "config.json").unlink(missing_ok=True)
            (self.workdir / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder holds other files
                self.workdir.rmdir()

    def _stored_run(self) -> dict[str, Any] | None:
        config = self.config
        stored = read_config(self.workdir)
        if stored is None:
            traces = [name for name in _TRACES if (self.workdir / name).exists()]
            if traces:
                raise UsageError(
                    f"--workdir={self._named} holds {traces[0]} of a run but no config.json; {self._otherwise()}"
                )
            if config.resume == "always" or config.eval_only:
                which = "--eval_only" if config.eval_only else "--resume=always"
                raise UsageError(f"{which} needs a run; --workdir={self._named} holds none")
            if config.init_from is not None and read_config(config.init_from) is None:
                raise UsageError(f"--init_from must be the folder of a run; {config.init_from!r} holds none")
            return None
        if config.resume == "never" and not config.eval_only:
            raise UsageError(
                f"--workdir={self._named} holds a run already; name another, resume it by --resume=auto, or move it "
                "aside by --overwrite"
            )
        differences = self._differences(stored, config.eval_only)
        if differences:
            again = config.drawn_again and not self._differences(stored, True)
            figures = "compute these figures of it by --eval_only, " if again else ""
            found = f"holds another run ({'; '.join(differences)}); {figures}{self._otherwise()}"
            raise UsageError(f"--workdir={self._named} {found}")
        return stored

    def _otherwise(self) -> str:
        """Returns what to do if this folder cannot be used; ``--overwrite`` contradicts ``--eval_only``."""
        return "name another" if self.config.eval_only else "name another, or move it aside by --overwrite"

    def _differences(self, stored: dict[str, Any], figures_are_free: bool) -> list[str]:
        """Returns what makes the stored run another run, as ``--flag: stored value there, given value here``."""
        ours = self._description
        if stored["experiment"] != ours["experiment"]:
            return [f"experiments.{stored['experiment']}, not {ours['experiment']}"]
        differences = []
        for field in dataclasses.fields(self.config):
            free = field.metadata["resumable"] or (figures_are_free and field.metadata["evaluation"])
            there, here = stored["flags"].get(field.name, as_json(field.default)), ours["flags"][field.name]
            if there != here and not free:
                differences.append(f"--{field.name}: {shown(there)} there, {shown(here)} here")
        there, here = stored.get("data"), ours["data"]
        if there and here and (there["name"], there["crc32"]) != (here["name"], here["crc32"]):
            differences.append(f"other data: {shown_data(there)} there, {shown_data(here)} here")
        elif there and here and there.get("crc32_valid") != here.get("crc32_valid"):
            differences.append("other validation images")
        return differences

    def _is_finished(self) -> bool:
        """Returns whether ``summary.json`` exists, is whole, and belongs to a run of this length."""
        try:
            summary = read_json(self.workdir / "summary.json")
        except (OSError, ValueError):
            return False
        flags = self._description["flags"]
        names = {field.name for field in dataclasses.fields(self.config) if field.metadata["resumable"]}
        if summary is not None and summary.get("stopped_early"):  # more epochs alone do not make this run longer
            names -= {"epochs"}
        return summary is not None and all(summary.get(name, flags[name]) == flags[name] for name in names)

    def _compare_machine(self, stored: dict[str, Any]) -> None:
        """Warns if the run was begun with other versions or on another device: its last bits may then differ."""
        differences = [
            f"{name} {there[name]} there, {here[name]} here"
            for there, here in ((stored[key], self._description[key]) for key in ("versions", "device"))
            for name in here
            if name in there and there[name] != here[name]
        ]
        if differences:
            warn(f"{self.workdir}: the last bits may come out differently than in one go ({'; '.join(differences)})")

    def _compare_code(self, stored: dict[str, Any]) -> None:
        """Warns if the experiment's file or the package has changed since the run was begun."""
        there, here = stored.get("code", {}), self._description["code"]
        changed = [name for name in here if name in there and there[name] != here[name]]
        if changed and self.config.resume != "always":
            warn(
                f"{' and '.join(changed)} changed since the run in {self.workdir} was begun, so its figures may be of "
                "two programs; --resume=always accepts the change, --overwrite begins afresh"
            )

    def _move_aside(self) -> None:
        """Renames the whole folder to the first free ``WORKDIR.old-N`` and makes it anew."""
        path = self.workdir.resolve()
        number = 1
        while (target := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        try:
            path.rename(target)
            sync(path.parent)
        except OSError as error:
            raise RunError(f"{path} could not be moved to {target}: {error.strerror}") from error
        say(f"the run that was there is in {target} now")
        _make(path, self._named)
        old, self._lock = self._lock, _locked(path, self._named)
        if old is not None:
            old.release()


@contextmanager
def open_run(
    config: RunFlags,
    experiment: str,
    data: dict[str, Any] | None = None,
    devices: Devices | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[RunFolder]:
    """Yields the folder of a run. Unless the run is finished, no other process may write into the folder meanwhile.

    Args:
        config: the run's flags; ``config.workdir`` names the folder.
        experiment: the name of the experiment.
        data: identifies the run's data by ``name``, ``source`` and ``crc32``; None: the run has no data.
        devices: the devices of the run (:func:`planar_vae_jax.runs.devices.choose_devices`); None: one device.
        defaults: for ``report.html``, the defaults of flags that the experiment has filled in, by name.

    Raises:
        UsageError: the folder cannot be written, another process uses it, it holds another run, or it holds no run
            where one is needed. The folder is then left as it was.
    """
    run = RunFolder(config, experiment, data, devices or one_device(), defaults)
    try:
        run._open()
        with _signals.time_limit(config.max_seconds):
            yield run
    except (UsageError, ValueError, TypeError):
        run._forget()
        raise
    finally:
        run._release()


# --- The contents of config.json


def _describe(config: RunFlags, experiment: str, data: dict[str, Any] | None, devices: Devices) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "experiment": experiment,
        "flags": {name: as_json(value) for name, value in dataclasses.asdict(config).items()},
        "versions": {
            "python": platform.python_version(),
            "planar_vae_jax": __version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "code": _code(config),
        "device": devices.describe(),
        "data": data,
    }


def _in_common(description: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of the description that must be the same in all processes of a run."""
    own = ("process_id", "data_dir", "workdir")
    flags = {name: value for name, value in description["flags"].items() if name not in own}
    data = description["data"]
    return {
        **description,
        "flags": flags,
        "device": None,
        "data": data and [data["name"], data["crc32"], data.get("crc32_valid")],
    }


def _code(config: RunFlags) -> dict[str, int]:
    """Returns the CRC-32 of the file that defines the experiment's flags, and that of the package's files."""
    package = Path(__file__).parents[1]
    found = {"planar_vae_jax": _crc(*sorted(package.rglob("*.py")))}
    file = getattr(sys.modules.get(type(config).__module__), "__file__", None)
    if file is not None and Path(file).is_file():
        found[Path(file).name] = _crc(Path(file))
    return found


def _crc(*files: Path) -> int:
    crc = 0
    for file in files:
        crc = zlib.crc32(file.read_bytes(), crc)
    return crc


# --- The folder in the file system


def _expand(workdir: str) -> Path:
    """Returns the path of the folder.

    Raises:
        UsageError: the name cannot be that of a folder.
    """
    try:
        path = Path(workdir).expanduser()
        str(path.absolute()).encode()  # TensorStore accepts no other names
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; not UTF-8; an unknown ~user
        raise _not_a_folder(workdir, error) from None
    return path


def _make(path: Path, named: str) -> None:
    """Makes the folder and checks that it can be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:
        raise _not_a_folder(named, error) from None


def _not_a_folder(named: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--workdir must be a folder that can be written; got {named!r} ({reason})")


def _locked(workdir: Path, named: str) -> filelock.FileLock | None:
    """Locks the folder until this process ends, however it ends; returns None if the file system has no locks."""
    lock = filelock.FileLock(workdir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"--workdir={named} is in use by another process; name another, or wait for it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError):
            raise _not_a_folder(named, error) from None
        warn(f"{workdir / '.lock'} cannot be locked ({error}): make sure that no other run uses the folder")
        return None
    return lock
