"""A run's folder: who may write into it, whether it holds the same run, and what ``config.json`` says.

data = ...                                          # loaded first: a run that is refused leaves no folder
with open_run(config, "mnist", identity) as run:    # compares flags and data, locks the folder
    if run.finished: return
    fitted = fit(run, ...)                          # goes on from the newest checkpoint
    run.save_figure("loss.png", figure)
    run.finish(summary)
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import filelock

from planar_vae_jax.runs import processes, signals
from planar_vae_jax.runs.config import (
    LAYOUT,
    RunFlags,
    UsageError,
    default_workdir,
    flag_of_run,
    read_config,
    shown,
)
from planar_vae_jax.runs.console import warn
from planar_vae_jax.runs.description import common, describe, shown_data
from planar_vae_jax.runs.devices import Devices, missing_accelerator, one_device
from planar_vae_jax.runs.files import RunError, read_json, remove_unfinished, replacing, sync, write_json
from planar_vae_jax.runs.lock import expand, locked, make

# What a folder holds that holds a run, or what is left of one.
_TRACES = ("config.json", "checkpoints", "metrics.jsonl", "summary.json")


class RunFolder:
    """A run's folder, this process's alone while :func:`open_run` lasts.

    Attributes:
        workdir: where figures and ``summary.json`` go.
        config: the run's flags.
        new: whether the run begins now.
        devices: what it computes on.
        finished: whether there is nothing left to do.
        sharing: how many runs this process's time is spent on, all of them at once.
    """

    sharing = 1

    def __init__(self, config: RunFlags, experiment: str, data: dict[str, Any] | None, devices: Devices):
        """Looks at the folder, and writes nothing.

        Raises:
            UsageError: see :func:`open_run`.
        """
        self.config = config
        self.devices = devices
        self._named = config.workdir or default_workdir(config, experiment)
        self.workdir = expand(self._named)
        self._description = describe(config, experiment, data, devices)
        self._started, self._earlier = time.perf_counter(), 0.0
        self._lock: filelock.FileLock | None = None
        processes.check_same(common(self._description))
        self._stored, self.finished = processes.on_first(self._look)

    @property
    def eval_only(self) -> bool:
        """Whether figures are to be computed again, and nothing trained."""
        return self.config.eval_only

    @property
    def new(self) -> bool:
        """Whether the run begins now."""
        return self._stored is None

    def seconds(self) -> float:
        """Spent on this run so far (its share), in earlier processes up to the checkpoint and in this one."""
        return self._earlier + (time.perf_counter() - self._started) / self.sharing

    def save_figure(self, name: str, figure: Any) -> None:
        """Writes a matplotlib figure as ``name`` in the folder."""
        if processes.index() == 0:
            with replacing(self.workdir / name) as temporary:
                figure.savefig(temporary)

    def save_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        with replacing(self.workdir / name) as temporary:
            temporary.write_text(text)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``, by which the run is finished, and says where everything is."""
        processes.on_first(write_json, self.workdir / "summary.json", summary)
        print(f"figures and summary.json are in {self.workdir}", flush=True)

    def go_on(self, seconds: float, where: str | None) -> None:
        """The training goes on; the files that say otherwise are brought to that (by process 0).

        Args:
            seconds: spent so far.
            where: it goes on from, in words; ``None`` at its beginning.
        """
        self._earlier = seconds
        if self._stored is None or processes.index():
            return
        print(f"going on in {self.workdir} {where or 'from the beginning'}", flush=True)
        (self.workdir / "summary.json").unlink(missing_ok=True)  # of a shorter run, or damaged
        if self._stored["flags"] != self._description["flags"]:  # longer now, say
            write_json(self.workdir / "config.json", {**self._stored, "flags": self._description["flags"]})

    def evaluate_into(self, name: str, final: bool, seconds: float) -> None:
        """Where ``--eval_only`` writes: into the folder if the run's own figures come out, else into one beside.

        Args:
            name: of the checkpoint, for the folder's.
            final: whether it is the run's last.
            seconds: spent on the run up to it.
        """
        stored, flags = self._stored, self._description["flags"]
        assert stored is not None
        self._earlier = seconds
        free = [field for field in dataclasses.fields(self.config) if field.metadata["evaluation"]]
        if not final or any(flags[field.name] != flag_of_run(stored, field) for field in free):
            self.workdir = self.workdir / name
            processes.on_first(self._make_ready)
        print(f"writing to {self.workdir}: figures of {name.replace('-', ' ')}", flush=True)

    def _make_ready(self) -> None:
        make(self.workdir, str(self.workdir))
        remove_unfinished(self.workdir)

    # --- For open_run

    def _look(self) -> tuple[dict[str, Any] | None, bool]:
        """Compares what is there with this run, and returns it and whether it is finished; nothing is written."""
        self._stored = None if self.config.overwrite else self._stored_run()
        self.finished = self._stored is not None and not self.eval_only and self._is_finished()
        layout = LAYOUT if self._stored is None else self._stored.get("layout", 1)
        if layout < LAYOUT and not (self.eval_only or self.finished):
            raise UsageError(
                f"--workdir={self._named} holds a run of version 0.1, whose figures were defined otherwise: it cannot "
                "go on; name another, or move it aside by --overwrite (--eval_only still reads it)"
            )
        return self._stored, self.finished

    def _take(self) -> tuple[dict[str, Any] | None, bool]:
        """Locks the folder and writes into it that this run is there; returns what :meth:`_look` does."""
        make(self.workdir, self._named)
        self._lock = locked(self.workdir, self._named)
        self._look()  # it may have changed until then
        remove_unfinished(self.workdir)
        if self._stored is not None:
            self._compare_machine(self._stored)
            return self._stored, self.finished
        if self.config.overwrite:  # again, that would begin afresh again
            signals.advice = "run the same command without --overwrite to go on"
            if any((self.workdir / name).exists() for name in _TRACES):
                self._move_aside()
        write_json(self.workdir / "config.json", self._description)
        print(f"writing to {self.workdir}", flush=True)
        return None, False

    def _tell_devices(self) -> None:
        print(f"computing on {self.devices}", flush=True)
        missing = missing_accelerator()
        if missing is not None:
            warn(missing)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

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
                raise UsageError(f"{which} needs a run to go on with; --workdir={self._named} holds none")
            return None
        if config.resume == "never" and not config.eval_only:
            raise UsageError(
                f"--workdir={self._named} holds a run already; name another, go on with it by --resume=auto, or "
                "move it aside by --overwrite"
            )
        differences = self._differences(stored, self.eval_only)
        if differences:
            again = self.config.drawn_again and not self._differences(stored, True)
            figures = "compute these figures of it by --eval_only, " if again else ""
            told = f"holds another run ({'; '.join(differences)}); {figures}{self._otherwise()}"
            raise UsageError(f"--workdir={self._named} {told}")
        return stored

    def _otherwise(self) -> str:
        """What to do where this folder cannot be taken; ``--overwrite`` contradicts ``--eval_only``."""
        return "name another" if self.eval_only else "name another, or move it aside by --overwrite"

    def _differences(self, stored: dict[str, Any], but_figures: bool) -> list[str]:
        """What makes the stored run (``but_figures``: them left aside) another, ``--flag: theirs there, ours here``."""
        ours = self._description
        if stored["experiment"] != ours["experiment"]:
            return [f"experiments.{stored['experiment']}, not {ours['experiment']}"]
        differences = []
        for field in dataclasses.fields(self.config):
            free = field.metadata["resumable"] or (but_figures and field.metadata["evaluation"])
            there, here = flag_of_run(stored, field), ours["flags"][field.name]
            if there != here and not free:
                differences.append(f"--{field.name}: {shown(there)} there, {shown(here)} here")
        there, here = stored.get("data"), ours["data"]
        if there and here and (there["name"], there["crc32"]) != (here["name"], here["crc32"]):
            differences.append(f"other data: {shown_data(there)} there, {shown_data(here)} here")
        elif there and here and "crc32_valid" in there and there["crc32_valid"] != here.get("crc32_valid"):
            differences.append("other validation images")
        return differences

    def _is_finished(self) -> bool:
        """Whether ``summary.json`` is there and whole, and as long a run as this one."""
        try:
            summary = read_json(self.workdir / "summary.json")
        except (OSError, ValueError):
            return False
        flags = self._description["flags"]
        fields = {field.name for field in dataclasses.fields(self.config) if field.metadata["resumable"]}
        early = summary is not None and summary.get("stopped_early")  # then more epochs alone do not make it go on
        names = fields - {"epochs"} if early else fields
        return summary is not None and all(summary.get(name, flags[name]) == flags[name] for name in names)

    def _say_finished(self) -> None:
        again = f"; --workdir={self._named} --eval_only draws its figures again" if self.config.drawn_again else ""
        print(f"the run in {self.workdir} is finished (summary.json){again}", flush=True)

    def _compare_machine(self, stored: dict[str, Any]) -> None:
        """Other versions or another device go on with the run, but not to the same bits."""
        differences = [
            f"{name} {there[name]} there, {here[name]} here"
            for there, here in ((stored[key], self._description[key]) for key in ("versions", "device"))
            for name in here
            if name in there and there[name] != here[name]
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
            sync(path.parent)
        except OSError as error:
            raise RunError(f"{path} could not be moved to {target}: {error.strerror}") from error
        print(f"the run that was there is in {target} now", flush=True)
        make(path, self._named)
        old, self._lock = self._lock, locked(path, self._named)
        if old is not None:
            old.release()


@contextmanager
def open_run(
    config: RunFlags, experiment: str, data: dict[str, Any] | None = None, devices: Devices | None = None
) -> Iterator[RunFolder]:
    """The folder of a run; of one that is not finished, this process's alone until the end.

    Args:
        config: ``config.workdir`` names the folder.
        experiment: the run is of.
        data: what tells its data from others: ``name``, ``source``, ``crc32``; ``None``: it has none.
        devices: what it computes on (:func:`planar_vae_jax.runs.devices.choose_devices`); ``None``: one device.

    Raises:
        UsageError: the folder cannot be written, another process has it, or it holds another run, or none where one is
            needed. Nothing is left there then.
    """
    run = RunFolder(config, experiment, data, devices or one_device())
    try:
        if not run.finished:
            run._stored, run.finished = processes.on_first(run._take)
            run._tell_devices()
        if run.finished:
            run._say_finished()
        with signals.time_limit(config.max_seconds):
            yield run
    finally:
        run._release()


def is_finished(config: RunFlags, experiment: str, data: dict[str, Any] | None = None) -> bool:
    """Whether nothing is left to do of a run; looks, writes and says nothing. UsageError: the folder holds another."""
    return RunFolder(config, experiment, data, one_device()).finished
