"""One run in 2 and 4 processes on the loopback address: the curve of one process, also when one of them is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from running import start
from test_devices import numbers

from planar_vae_jax.runs import _hosts as hosts
from planar_vae_jax.runs.config import UsageError

ROOT = Path(__file__).parents[2]
TINY = ("--batch=4", "--epochs=6")


class Processes:
    """The processes of one toy run."""

    def __init__(self, number, workdir, *flags, of_the_last=(), devices=1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tests.toy", *TINY, f"--workdir={workdir}", *flags]
        if number > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}"]
        device_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.all = []
        for i in range(number):
            own = [*([f"--process_id={i}"] if number > 1 else []), *(of_the_last if i == number - 1 else [])]
            environment = {**os.environ, "XLA_FLAGS": device_flags}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.all.append(subprocess.Popen([*command, *own], cwd=ROOT, env=environment, **pipes))
        self.said = [""] * number
        self.heard = [threading.Condition() for _ in self.all]
        self.readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(number)]
        for reader in self.readers:
            reader.start()

    def _read(self, i):
        for line in self.all[i].stdout:
            with self.heard[i]:
                self.said[i] += line
                self.heard[i].notify_all()

    def until(self, text):
        """Waits until process 0 says that."""
        with self.heard[0]:
            assert self.heard[0].wait_for(lambda: text in self.said[0], timeout=300), self.said

    def end(self, timeout=300):
        """Waits for all; returns their statuses."""
        try:
            statuses = [process.wait(timeout) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        for reader, process in zip(self.readers, self.all, strict=True):
            reader.join()
            process.stdout.close()
        return statuses


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The figures of one process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    start(workdir, *TINY)
    return numbers(workdir)


def assert_same(workdir, one):
    np.testing.assert_allclose(numbers(workdir), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_curve_and_the_figures_are_those_of_one_process(tmp_path, one, number):
    run = Processes(number, tmp_path)
    assert run.end() == [0] * number, run.said
    assert f"computing on {number} of {number} devices (cpu) of {number} processes" in run.said[0]
    assert all("epoch" not in said for said in run.said[1:])
    assert not any("Traceback" in said for said in run.said), run.said
    assert_same(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "killed", "then"), [(4, 2, 2), (2, 0, 1)])
def test_a_killed_process_ends_the_others_and_another_number_can_resume_the_run(tmp_path, one, number, killed, then):
    run = Processes(number, tmp_path, "--pause=0.5")
    run.until("epoch 2/")
    run.all[killed].kill()
    statuses = run.end(timeout=120)
    assert statuses.pop(killed) == -signal.SIGKILL
    assert 0 not in statuses, run.said
    again = Processes(then, tmp_path, devices=4 // then)
    assert again.end() == [0] * then, again.said
    assert "resuming the run in" in again.said[0]
    assert_same(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(tmp_path, one, number):
    run = Processes(2, tmp_path, "--pause=0.5")
    run.until("epoch 2/")
    run.all[1].send_signal(number)
    assert run.end() == [128 + number] * 2, run.said
    assert all(f"stopped by {number.name} after epoch" in said for said in run.said)
    again = Processes(2, tmp_path)
    assert again.end() == [0, 0], again.said
    assert_same(tmp_path, one)
    figures = Processes(2, tmp_path, "--eval_only", "--samples=8")
    assert figures.end() == [0, 0], figures.said
    assert (tmp_path / "epoch-6-samples=8" / "summary.json").exists()  # of process 0


@pytest.mark.slow
def test_all_stop_early_at_the_same_epoch(tmp_path):
    run = Processes(2, tmp_path / "run", "--patience=2", "--epochs=30")
    assert run.end() == [0, 0], run.said
    start(tmp_path / "one", *TINY, "--patience=2", "--epochs=30")
    assert_same(tmp_path / "run", numbers(tmp_path / "one"))


@pytest.mark.slow
def test_an_error_of_one_is_the_error_of_all(tmp_path):
    run = Processes(2, tmp_path / "run", of_the_last=["--seed=1"])
    assert run.end() == [2, 2], run.said
    assert all("all processes need the same flags" in said for said in run.said)
    assert not (tmp_path / "run").exists()
    run = Processes(2, "/dev/null/run")
    assert run.end() == [2, 2], run.said
    assert all("--workdir must be a folder" in said for said in run.said)
    run = Processes(2, tmp_path / "bomb", "--bomb=7")
    assert 0 not in run.end(), run.said
    assert "step 8 of the run, is not finite" in run.said[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num_processes=2 --process_id=0", "--coordinator missing"),
        ("--coordinator=host:1", "--num_processes and --process_id missing"),
        ("--coordinator=host --num_processes=2 --process_id=0", "--coordinator must be HOST:PORT"),
        ("--coordinator=host:1 --num_processes=2 --process_id=2", "--process_id must be less than --num_processes=2"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        start(tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # of the job, as a batch script has it
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
    ids=str,
)
def test_the_environment_asks_for_several_processes(monkeypatch, environment, several):
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.are_asked_for(None, None, None) == several
