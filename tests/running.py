"""Toy runs in this process, stopped, killed and compared; see toy.py."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import toy

from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit


class OneStep(fit.Pace):
    """A call takes one step, so that a run can be stopped after each of its few steps."""

    def end(self, start, stop):
        return start + 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@contextlib.contextmanager
def stopped_after(answers):
    """SIGTERM arrives after the run has asked for signals so many times."""
    asked = 0

    def requested():
        nonlocal asked
        asked += 1
        return signal.SIGTERM if asked > answers else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "requested", requested)
        yield


def stop(workdir, answers, *flags):
    """Runs the toy until a signal stops it; returns the message."""
    with stopped_after(answers), pytest.raises(signals.Stopped) as stopped:
        start(workdir, *flags)
    assert stopped.value.number == signal.SIGTERM
    return str(stopped.value)


def start(workdir, *flags):
    toy.main([f"--workdir={workdir}", *flags])


# Calls that change the disk; TensorStore makes others, which are not seen.
CALLS = ("replace", "rename", "fsync", "unlink", "rmdir", "truncate", "mkdir")


class Disk:
    """Counts the calls that change the disk, those of Orbax's threads too; at one of them the process is "killed".

    From then on, every such call of any thread raises.
    """

    def __init__(self, patch, kill_at=None, after=False):
        self.calls, self.kill_at, self.after = [], kill_at, after
        self.lock, self.dead = threading.Lock(), False
        for name in CALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, call):
        def counted(*args, **kwargs):
            with self.lock:
                now = len(self.calls) == self.kill_at
                self.calls.append(name)
                self.dead |= now and not self.after
                if self.dead:
                    raise Killed
                value = call(*args, **kwargs)
                self.dead |= now
            if now:
                raise Killed
            return value

        return counted


def timeless(content):
    return {key: value for key, value in content.items() if not key.startswith("seconds")}


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def result(workdir):
    """All that a run leaves, except its seconds and its place."""
    last = workdir / "checkpoints" / str(steps(workdir)[-1])
    content = json.loads((last / "meta" / "metadata").read_text())["content"]
    assert not list(workdir.rglob("*unfinished*"))
    assert not list(workdir.rglob("*checkpoint-tmp*"))
    assert page_is_of_the_summary(workdir)
    return {
        "summary": timeless(json.loads((workdir / "summary.json").read_text())),
        "metrics": [timeless(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        "step": last.name,
        "leaves": (content["leaves"], content["score"]),  # with the CRC-32 of each
    }


def page_is_of_the_summary(workdir):
    """Whether report.html is whole and shows the seconds of summary.json, by which no two runs are alike."""
    seconds = json.loads((workdir / "summary.json").read_text())["seconds"]
    page = (workdir / "report.html").read_text()
    return page.endswith("</html>\n") and f"<dd>{seconds:.4g}</dd>" in page


def contents(folder: Path):
    """Every file except the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 16
    path.write_bytes(raw)
