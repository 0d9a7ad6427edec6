"""One run in 2 and 4 processes on the loopback address: the curve of one process, also when one of them is killed."""

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from image_runs import write_noise
from test_devices import TINY, numbers

from experiments import mnist
from planar_vae_jax.runs.config import UsageError

ROOT = Path(__file__).parents[2]
EPOCHS = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("data") / "noise.npz")


class Processes:
    """The processes of one run."""

    def __init__(self, number, images, workdir, flags="", of_the_last="", devices=1, module="tests.undrawn mnist"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", *module.split(), f"--dataset={images}", *TINY.split()]
        command += [f"--epochs={EPOCHS}", f"--workdir={workdir}", *flags.split()]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}"] if number > 1 else []
        self.all = [
            subprocess.Popen(
                [
                    *command,
                    *together,
                    *([f"--process_id={i}"] if number > 1 else []),
                    *(of_the_last.split() if i == number - 1 else []),
                ],
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(number)
        ]
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
        """Until process 0 says that."""
        with self.heard[0]:
            assert self.heard[0].wait_for(lambda: text in self.said[0], timeout=300), self.said

    def end(self, timeout=300):
        """Their statuses."""
        try:
            statuses = [process.wait(timeout) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        for reader, process in zip(self.readers, self.all, strict=True):
            reader.join()
            process.stdout.close()
        assert not any("Traceback" in said or "stack trace" in said for said in self.said), self.said
        return statuses


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The figures of one process with one device after so many epochs."""

    @functools.cache
    def after(epochs):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        with jax.numpy_dtype_promotion("standard"):
            mnist.main([f"--dataset={images}", *TINY.split(), f"--epochs={epochs}", f"--workdir={workdir}"])
        return numbers(workdir)

    return after


def assert_same(workdir, whole, epochs=EPOCHS):
    np.testing.assert_allclose(numbers(workdir), whole(epochs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_curve_and_the_figures_are_those_of_one_process(images, tmp_path, whole, number):
    run = Processes(number, images, tmp_path / "run", "--epochs=2")
    assert run.end() == [0] * number, run.said
    assert f"computing on {number} of {number} devices (cpu) of {number} processes" in run.said[0]
    assert all("epoch" not in said for said in run.said[1:])
    assert_same(tmp_path / "run", whole, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "killed", "then"), [(4, 2, 2), (2, 0, 1)])
def test_a_killed_process_stops_the_others_and_the_run_goes_on_in_another_number(
    images, tmp_path, whole, number, killed, then
):
    run = Processes(number, images, tmp_path / "run")
    run.until("epoch 2/")
    run.all[killed].kill()
    statuses = run.end(timeout=120)
    assert statuses.pop(killed) == -signal.SIGKILL
    assert statuses == [1] * (number - 1), run.said
    for said in (said for i, said in enumerate(run.said) if i != killed):
        assert said.count("error: another process of this run has ended; run the same command again in all of") == 1
    again = Processes(then, images, tmp_path / "run", devices=2)
    assert again.end() == [0] * then, again.said
    assert "going on in" in again.said[0]
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(images, tmp_path, whole):
    run = Processes(2, images, tmp_path / "run")
    run.until("epoch 2/")
    run.all[1].terminate()
    assert run.end() == [143, 143], run.said
    assert all("stopped by SIGTERM after epoch" in said for said in run.said)
    again = Processes(2, images, tmp_path / "run")
    assert again.end() == [0, 0], again.said
    assert_same(tmp_path / "run", whole)
    figures = Processes(2, images, tmp_path / "run", "--eval_only --nll_samples=8", module="experiments.mnist")
    assert figures.end() == [0, 0], figures.said
    assert (tmp_path / "run" / f"epoch-{EPOCHS}" / "reconstructions.png").exists()  # of process 0


@pytest.mark.slow
def test_what_all_have_in_common_is_checked_and_an_error_of_one_is_everyones(images, tmp_path):
    run = Processes(2, images, tmp_path / "run", of_the_last="--seed=1")
    assert run.end() == [2, 2], run.said
    assert all("all processes need the same flags" in said for said in run.said)
    run = Processes(2, images, "/dev/null/run")
    assert run.end() == [2, 2], run.said
    assert all("--workdir must be a folder" in said for said in run.said)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num_processes=2 --process_id=0", "--coordinator missing"),
        ("--coordinator=host:1", "--num_processes and --process_id missing"),
        ("--coordinator=host --num_processes=2 --process_id=0", "--coordinator must be HOST:PORT"),
        ("--coordinator=host:1 --num_processes=2 --process_id=2", "--process_id must be less than --num_processes=2"),
    ],
)
def test_wrong_flags_are_refused(images, tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        mnist.main([f"--dataset={images}", f"--workdir={tmp_path / 'run'}", *TINY.split(), *flags.split()])
    assert not (tmp_path / "run").exists()
