"""Real processes of a toy run: stopped, killed, two in one folder; streams that are closed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import contents, result, start

from planar_vae_jax.runs import _files as files
from planar_vae_jax.runs.config import UsageError

ROOT = Path(__file__).parents[2]


class Process:
    """``python -m tests.toy``, and what it says."""

    def __init__(self, workdir, *flags):
        self.workdir = workdir
        command = [sys.executable, "-m", "tests.toy", f"--workdir={workdir}", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        self.said = ""

    def until(self, text):
        """Reads until it says that."""
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"it never said {text!r}: {self.said}")

    def end(self):
        """Its status."""
        with self.process:
            self.said += self.process.stdout.read()
        assert "Traceback" not in self.said, self.said
        return self.process.returncode

    def stop(self, number):
        self.process.send_signal(number)
        return self.end()


OTHERS = (signal.SIGINT, signal.SIGKILL, signal.SIGUSR1, signal.SIGHUP)
SIGNALS = (signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in OTHERS))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_stopped_by_a_signal_is_resumed(tmp_path, whole, number):
    process = Process(tmp_path, "--pause=0.3")
    process.until("epoch 1/3")
    if number == signal.SIGKILL:
        assert process.stop(number) == -number
    else:
        assert process.stop(number) == 128 + number
        assert "finishing the step and saving; a second Ctrl-C ends at once" in process.said
        assert "run the same command again to resume it from there" in process.said
    start(tmp_path)
    assert result(tmp_path) == whole()


@pytest.mark.slow
def test_a_time_limit_is_as_sigterm(tmp_path, whole):
    process = Process(tmp_path, "--pause=1", "--max_seconds=3")  # the reports alone take longer
    assert process.end() == 143
    assert "stopped by --max_seconds=3" in process.said
    assert "run the same command again to resume" in process.said
    start(tmp_path)
    assert result(tmp_path) == whole()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = Process(tmp_path, "--pause=1", "--epochs=2")
    process.until("epoch 1/2")  # and the next report takes a second
    time.sleep(0.3)
    process.process.send_signal(signal.SIGINT)
    process.until("a second Ctrl-C ends at once")
    assert process.stop(signal.SIGINT) == 130
    assert "stopped at once; run the same command again to resume from the last checkpoint" in process.said
    assert "epoch 2/2" not in process.said


@pytest.mark.slow
def test_a_signal_while_a_finished_training_is_restored_ends_the_process(tmp_path):
    start(tmp_path)
    (tmp_path / "summary.json").unlink()
    os.mkfifo(tmp_path / "wait")
    meta = tmp_path / "checkpoints" / "12" / "meta" / "metadata"
    whole = meta.read_bytes()
    meta.unlink()
    meta.symlink_to(tmp_path / "wait")  # whoever reads it waits
    process = Process(tmp_path)
    with (tmp_path / "wait").open("wb") as pipe:  # opened: it restores
        assert process.stop(signal.SIGTERM) == 143
        del pipe
    assert "stopped by SIGTERM; run the same command again to resume" in process.said
    assert "saving" not in process.said
    meta.unlink()
    meta.write_bytes(whole)
    start(tmp_path)
    assert files.read_json(tmp_path / "summary.json")


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_first_is_not_disturbed(tmp_path, whole):
    first = Process(tmp_path, "--pause=0.2")
    first.until("writing to")
    first.process.send_signal(signal.SIGSTOP)
    before = contents(tmp_path)
    with pytest.raises(UsageError) as refused:  # the status is in the next test
        start(tmp_path)
    assert str(refused.value) == f"--workdir={tmp_path} is in use by another process; name another, or wait for it"
    assert contents(tmp_path) == before
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0
    assert result(tmp_path) == whole()


@pytest.mark.slow
def test_of_processes_started_at_once_one_has_the_folder(tmp_path, whole):
    processes = [Process(tmp_path / "run", "--pause=0.5") for _ in range(2)]
    assert sorted(process.end() for process in processes) == [0, 2]
    refused = f"error: --workdir={tmp_path / 'run'} is in use by another process; name another, or wait for it\n"
    assert sum(process.said == refused for process in processes) == 1
    assert result(tmp_path / "run") == whole()


def shell(command):
    """The status of a shell command in which TOY stands for the toy experiment."""
    command = command.replace("TOY", f"{sys.executable} -m tests.toy")
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, check=False).returncode


@pytest.mark.parametrize("closed", [">&- 2>&-", pytest.param("| head -1 > /dev/null", marks=pytest.mark.slow)])
def test_streams_that_are_closed_do_not_end_a_run(tmp_path, whole, closed):
    """Some daemons start programs without stderr, and ``head`` closes its pipe after the first line."""
    assert shell(f"TOY --workdir={tmp_path} {closed}") == 0
    assert result(tmp_path) == whole()
