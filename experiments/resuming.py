"""A run that can be stopped anywhere: who may write into its folder, whether it is the same run, where it goes on.

with open_run(config, "mnist") as run:      # locks the folder, compares flags
    if run.finished: return
    data = ...
    run.begin(data_identity(data))          # compares the data; writes config.json, moves an old run aside
    fitted = fit(course, ..., run)          # experiments/fitting.py: goes on from the newest checkpoint
    run.finish(summary)
"""

import dataclasses
import errno
import fcntl
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments import signals
from experiments.files import RunError, read_json, remove_unfinished, write_json, write_json_lines
from experiments.flags import UsageError, flag, parse
from experiments.runs import Run, describe, make_workdir, warn
from planar_vae_jax.checkpoints import Checkpoints
from planar_vae_jax.data import Dataset

Config = TypeVar("Config", bound="RunFlags")

# What a folder holds that holds a run, or what is left of one.
_TRACES = ("config.json", "checkpoints", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class RunFlags:
    """Flags of every run that can be resumed. Those that are not ``identity`` may differ when it goes on."""

    workdir: str | None = flag(None, "folder for what the run writes", identity=False)
    resume: str = flag(
        "auto",
        "auto: go on with the run that --workdir holds, or begin one; always: only go on; never: only begin",
        choices=("auto", "always", "never"),
        identity=False,
    )
    overwrite: bool = flag(False, "begin afresh; the run in --workdir is moved to WORKDIR.old-N", identity=False)
    keep: int = flag(3, "how many of the newest checkpoints stay, beside the best", at_least=1, identity=False)
    eval_only: bool = flag(
        False,
        "recompute figures and pictures of the run in --workdir from a checkpoint; its flags are read from there",
        identity=False,
    )
    checkpoint: str = flag(
        "latest", "the one that --eval_only takes; best: lowest loss", choices=("latest", "best"), identity=False
    )


def parse_run(config_class: type[Config], argv: Sequence[str], doc: str) -> Config:
    """:func:`experiments.flags.parse`; with ``--eval_only`` the run in ``--workdir`` gives the defaults.

    Raises:
        UsageError: as there; flags that contradict each other; no run to evaluate.
    """
    config = parse(config_class, argv, doc)
    if config.checkpoint != "latest" and not config.eval_only:
        raise UsageError(f"--checkpoint={config.checkpoint} needs --eval_only")
    if config.overwrite and (config.eval_only or config.resume == "always"):
        other = "--eval_only" if config.eval_only else "--resume=always"
        raise UsageError(f"--overwrite begins afresh, which contradicts {other}")
    if not config.eval_only:
        return config
    if config.workdir is None:
        raise UsageError("--eval_only needs --workdir, the folder of a run")
    stored = _read_config(Path(os.path.expanduser(config.workdir)))
    if stored is None:
        raise UsageError(f"--eval_only needs a run; --workdir={config.workdir} holds none")
    names = {field.name for field in dataclasses.fields(config) if field.metadata["identity"]} | {"data_dir", "epochs"}
    defaults = {name: value for name, value in stored["flags"].items() if name in names}
    return parse(config_class, argv, doc, defaults)


def default_workdir(config: RunFlags, experiment: str, *always: str) -> str:
    """``runs/EXPERIMENT-FLAG=VALUE-...`` of the flags in ``always`` and of those that are not at their defaults.

    So that two runs have one folder only if they are the same run.
    """
    parts = [experiment]
    fields = {field.name: field for field in dataclasses.fields(config) if field.metadata["identity"]}
    for name in (*always, *(name for name in fields if name not in always)):
        value = getattr(config, name)
        if name in always or value != fields[name].default:
            text = _shown(_as_json(value)).removesuffix(".npz")
            parts.append(f"{name}={re.sub(r'[^-+.,0-9A-Za-z]', '_', text)}")
    name = "-".join(parts)
    return f"runs/{name}" if len(name) <= 200 else f"runs/{name[:190]}-{zlib.crc32(name.encode()):08x}"


def data_identity(data: Dataset) -> dict[str, Any]:
    """What tells one data set from another, wherever it was read from."""
    crc = 0
    for name in ("x_train", "y_train", "x_test", "y_test"):
        array = getattr(data, name)
        if array is not None:
            crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return {"name": data.name, "source": data.source, "crc32": crc}


class ResumableRun(Run):
    """A run's folder, held by this process alone until :meth:`close`."""

    def __init__(self, config: Any, experiment: str):
        """Locks the folder ``config.workdir`` and compares the run that it holds with this one.

        Raises:
            UsageError: another process has the folder, or it holds another run, or none where one is needed.
        """
        self._started = time.perf_counter()
        self._earlier = 0.0
        self._config = config
        self._description = describe(config, experiment)
        self.workdir = make_workdir(config.workdir)
        self._lock = _lock(self.workdir, config.workdir)
        try:
            remove_unfinished(self.workdir)
            self._stored = None if config.overwrite else self._stored_config()
            self.finished = self._is_finished()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def seconds(self) -> float:
        """Spent on this run so far, in earlier processes up to the checkpoint and in this one."""
        return self._earlier + time.perf_counter() - self._started

    def begin(self, data: dict[str, Any] | None = None) -> None:
        """Compares the data with those of the run that is there, or begins a new one and writes ``config.json``.

        Args:
            data: :func:`data_identity`, if the run has data.

        Raises:
            UsageError: the data are others.
        """
        if self._stored is not None:
            self._compare_data(data)
            self._compare_machine()
            return
        if self._config.overwrite:  # again, that would begin afresh again
            signals.advice = "run the same command without --overwrite to go on"
        if self._config.overwrite and any((self.workdir / name).exists() for name in _TRACES):
            self._move_aside()
        self._description["data"] = data
        write_json(self.workdir / "config.json", self._description)
        print(f"writing to {self.workdir}", flush=True)

    def checkpoints(self, check: Callable[[Any], object]) -> Checkpoints:
        """The run's checkpoints; ``check`` raises ``ValueError`` where what one holds is of no use."""
        return Checkpoints(self.workdir / "checkpoints", keep=self._config.keep, tell=warn, check=check)

    def go_on(self, lines: list[dict[str, Any]], seconds: float, where: str | None) -> None:
        """Brings the files to where the training is: a run may have been killed, or be longer now.

        Args:
            lines: of ``metrics.jsonl``, so far.
            seconds: spent so far.
            where: the run goes on from, in words; ``None`` at its beginning.
        """
        self._earlier = seconds
        if self._stored is not None:
            print(f"going on in {self.workdir} {where or 'from the beginning'}", flush=True)
            (self.workdir / "summary.json").unlink(missing_ok=True)  # of a shorter run, or damaged
            if self._stored["flags"] != self._description["flags"]:  # longer now, say
                write_json(self.workdir / "config.json", {**self._stored, "flags": self._description["flags"]})
        self.write_metrics(lines)

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Writes ``metrics.jsonl`` anew: whole at every moment, each line once."""
        write_json_lines(self.workdir / "metrics.jsonl", lines)

    def evaluate_into(self, step: int, final: bool, seconds: float) -> None:
        """Where ``--eval_only`` writes: into the folder if the run's own figures come out, else into one beside."""
        assert self._stored is not None
        own = self._stored["flags"]
        same = all(_as_json(getattr(self._config, name)) == own[name] for name in self._config.EVALUATION_FLAGS)
        self._earlier = seconds
        if not (final and same):
            self.workdir = make_workdir(str(self.workdir / f"step-{step}"))
            remove_unfinished(self.workdir)
        print(f"writing to {self.workdir}: figures of step {step}", flush=True)

    def _stored_config(self) -> dict[str, Any] | None:
        config, shown = self._config, self._config.workdir
        stored = _read_config(self.workdir)
        if stored is None:
            traces = [name for name in _TRACES if (self.workdir / name).exists()]
            if traces:
                raise UsageError(
                    f"--workdir={shown} holds {traces[0]} of a run but no config.json; name another, or move it aside "
                    "by --overwrite"
                )
            if config.resume == "always":
                raise UsageError(f"--resume=always needs a run to go on with; --workdir={shown} holds none")
            return None
        if config.resume == "never" and not config.eval_only:
            raise UsageError(
                f"--workdir={shown} holds a run already; name another, go on with it by --resume=auto, or "
                "move it aside by --overwrite"
            )
        differences = self._differences(stored)
        if differences:
            raise UsageError(
                f"--workdir={shown} holds another run ({'; '.join(differences)}); name another, or move it aside by "
                "--overwrite"
            )
        return stored

    def _differences(self, stored: dict[str, Any]) -> list[str]:
        """What makes the stored run another one, as ``--flag: theirs there, ours here``."""
        ours, theirs = self._description["flags"], stored["flags"]
        if stored["experiment"] != self._description["experiment"]:
            return [f"experiments.{stored['experiment']}, not {self._description['experiment']}"]
        fields = {field.name: field for field in dataclasses.fields(self._config) if field.metadata["identity"]}
        free = self._config.EVALUATION_FLAGS if self._config.eval_only else ()
        differences = []
        for name, field in fields.items():
            there, here = theirs.get(name, _as_json(field.default)), _as_json(ours[name])
            if there != here and name not in free:
                differences.append(f"--{name}: {_shown(there)} there, {_shown(here)} here")
        return differences

    def _is_finished(self) -> bool:
        """Whether ``summary.json`` is there and whole, and as long a run as this one; tells so."""
        if self._stored is None or self._config.eval_only:
            return False
        length = getattr(self._config, "epochs", None)
        try:
            summary = read_json(self.workdir / "summary.json")
        except ValueError:
            return False
        if summary is None or summary.get("epochs") != length:
            return False
        print(
            f"the run in {self.workdir} is finished (summary.json); "
            f"--workdir={self._config.workdir} --eval_only draws its figures again",
            flush=True,
        )
        return True

    def _compare_data(self, data: dict[str, Any] | None) -> None:
        assert self._stored is not None
        theirs = self._stored.get("data")
        if theirs is None or data is None or (theirs["name"], theirs["crc32"]) == (data["name"], data["crc32"]):
            return
        there, here = (f"{one['name']} from {one['source']} (CRC-32 {one['crc32']:08x})" for one in (theirs, data))
        raise UsageError(
            f"--workdir={self._config.workdir} holds a run on other data ({there}; here {here}); name another, or move "
            "it aside by --overwrite"
        )

    def _compare_machine(self) -> None:
        """Other versions or another device go on with the run, but not to the same bits."""
        assert self._stored is not None
        differences = [
            f"{name} {there.get(name)} there, {here[name]} here"
            for key in ("versions", "device")
            for there, here in [(self._stored[key], self._description[key])]
            for name in here
            if there.get(name) != here[name]
        ]
        if differences:
            warn(f"{self.workdir}: the last bits may come out differently than in one go ({'; '.join(differences)})")

    def _move_aside(self) -> None:
        """Renames the whole folder to the first free ``WORKDIR.old-N`` and makes it anew."""
        path = self.workdir.resolve()
        number = 1
        while (target := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        try:
            path.rename(target)
        except OSError as error:
            raise RunError(f"{path} could not be moved to {target}: {error.strerror}") from error
        print(f"the run that was there is in {target} now", flush=True)
        make_workdir(str(path))
        old, self._lock = self._lock, _lock(path, self._config.workdir)
        if old is not None:
            os.close(old)


@contextmanager
def open_run(config: Any, experiment: str) -> Iterator[ResumableRun]:
    """A :class:`ResumableRun` that is closed at the end."""
    run = ResumableRun(config, experiment)
    try:
        yield run
    finally:
        run.close()


def _read_config(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "config.json"
    try:
        stored = read_json(path)
        if stored is not None and not all(
            isinstance(stored.get(key), kind)
            for key, kind in {
                "experiment": str,
                "flags": dict,
                "versions": dict,
                "device": dict,
                "data": dict | None,
            }.items()
        ):
            raise ValueError("not the config of a run")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); name another --workdir, or --overwrite it") from None
    return stored


def _lock(workdir: Path, shown: str) -> int | None:
    """A lock on the folder that ends with this process, however it ends; ``None`` where files cannot be locked."""
    path = workdir / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"--workdir must be a folder that can be written; got {shown!r} ({error.strerror})") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(f"--workdir={shown} is in use by another process; name another, or wait for it") from None
        print(f"{path} cannot be locked ({error.strerror}): see that no other run uses this folder", file=sys.stderr)
        return None
    return handle


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
