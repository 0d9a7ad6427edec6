"""Experiments as processes of their own, started as from a shell, and what their folders hold."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
LONGEST = 120.0  # seconds that anything here may take, on a busy machine
STRENGTH = int(os.environ.get("FAULTS", "1"))  # a multiple of the default number of tries; the campaign: 10

# A line of metrics of "mnist" is an epoch of 400 steps, about 0.1 s; one of "density" 20 of its steps.
STEPS_PER_LINE = 20
MODULES = {"mnist": "experiments.mnist", "density": "experiments.density", "toy": "tests.toy"}
FLAGS = {
    "toy": ("--epochs=12", "--pause=0.05"),
    "mnist": ("--epochs=12", "--hidden=8", "--latent=2", "--flows=2", "--batch_size=4", "--nll_samples=2"),
    "density": ("--steps=2000", "--flows=2", "--batch_size=64", "--checkpoint_every=10"),
}


class Run:
    """A running ``python -m experiments.NAME``, or the toy of the tests."""

    def __init__(self, name: str, workdir: Path, *flags: str, program: tuple[str, ...] = (), **popen: Any):
        program = program or ("-m", MODULES[name])
        command = [sys.executable, *program, *FLAGS[name], f"--workdir={workdir}", *flags]
        self.name, self.workdir = name, Path(workdir)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", **popen
        )
        self.out: list[str] = []  # lines so far
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=_collect, args=both)
            for both in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def until(self, happened: Callable[[], Any]) -> bool:
        """Waits until it has happened; returns whether it did before the process ended."""
        end = time.monotonic() + LONGEST
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"nothing happened: {self.out[-3:]} {self.err[-3:]}")
            time.sleep(0.0005)
        return True

    def said(self, text: str) -> bool:
        return any(text in line for line in (*self.out, *self.err))

    def begun(self) -> bool:
        """Whether it has its folder and the training is next."""
        return self.said("writing to") or self.said("resuming")

    def lines(self) -> int:
        """Lines of metrics, as far as it has said so."""
        return max((count(found) for line in self.out if (found := re.match(r"(epoch|step) (\d+)/", line))), default=0)

    def resumed_from(self) -> int | None:
        """The lines of metrics after which it resumes; None: it has not said so yet."""
        for line in self.out:
            if line.startswith("writing to") or line.endswith("from the beginning"):
                return 0
            if found := re.search(r"resuming the run in .* after (epoch|step) (\d+)", line):
                return count(found)
        return None

    def stop(self, signal_number: int) -> int:
        """Sends a signal and waits for the end: the status (``-N``: ended by the system for signal N)."""
        self.process.send_signal(signal_number)
        return self.end()

    def end(self) -> int:
        """Waits for the end: the status."""
        try:
            status = self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for reader in self._readers:
            reader.join()
        assert not self.said("Traceback"), "\n".join(self.err)
        return status

    def error(self) -> str:
        """The one line on stderr of a run that was refused or has failed."""
        lines = [line for line in self.err if line]
        assert len(lines) == 1, lines
        return lines[0]


def count(found: re.Match[str]) -> int:
    """Lines of metrics of ``epoch N`` or ``step N``."""
    return int(found[2]) // (1 if found[1] == "epoch" else STEPS_PER_LINE)


def _collect(stream: IO[str], lines: list[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line.rstrip("\n"))


def finish(name: str, workdir: Path, *flags: str) -> Run:
    """A run to its end, which must be a good one."""
    run = Run(name, workdir, *flags)
    status = run.end()
    assert status == 0, "\n".join(run.err)
    return run


def refuse(name: str, workdir: Path, *flags: str, status: int, words: str) -> None:
    """A run that must end with this status and one line, in which ``words`` (a pattern) is found."""
    run = Run(name, workdir, *flags)
    assert run.end() == status
    line = run.error()
    assert line.startswith("error: ")
    assert re.search(words, line), line


def strict(text: str | bytes) -> Any:
    """JSON without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def timeless(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if not key.startswith("seconds")}


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics; each must be there once, in order."""
    path = workdir / "metrics.jsonl"
    lines = [strict(line) for line in path.read_text().splitlines()] if path.exists() else []
    numbers = [line.get("epoch", line.get("step")) for line in lines]
    assert numbers == [(index + 1) * numbers[0] for index in range(len(numbers))]
    return [timeless(line) for line in lines]


def steps(workdir: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def result(workdir: Path) -> dict[str, Any]:
    """All that a finished run leaves, except its seconds and its place."""
    last = workdir / "checkpoints" / str(steps(workdir)[-1])
    content = strict((last / "meta" / "metadata").read_text())["content"]
    assert not list(workdir.rglob("*unfinished*"))
    assert not list(workdir.rglob("*checkpoint-tmp*"))
    page(workdir)
    return {
        "summary": timeless(strict((workdir / "summary.json").read_text())),
        "metrics": metrics(workdir),
        "figures": {path.name: path.read_bytes() for path in workdir.glob("*.png")},
        "step": last.name,
        "leaves": content["leaves"],  # with the CRC-32 of each
    }


def page(workdir: Path) -> str:
    """The page of the run, which must be whole."""
    found = (workdir / "report.html").read_text(encoding="utf-8")
    assert found.endswith("</html>\n")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file except the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
