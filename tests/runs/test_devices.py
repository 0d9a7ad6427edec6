"""One run on 1, 2 and 4 devices: the same losses and figures, to the rounding of float32; what is said of devices."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from running import timeless

from planar_vae_jax.runs import devices

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    """What a program says that has several devices."""
    command = [sys.executable, "-m", f"tests.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def numbers(workdir):
    """Every figure of a toy run except its seconds, in order."""
    lines = [timeless(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    summary = timeless(json.loads((workdir / "summary.json").read_text()))
    figures = [value for line in lines for _, value in sorted(line.items())]
    return np.array([*figures, *summary["w"], summary["b"]], float)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs on 1, 2 and 4 of 4 devices, whole, in chunks and resumed; what was said."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        "1": "--devices=1",
        "2": "--devices=2",
        "4": "",
        "2 in chunks": "--devices=2 --chunk=200",
        "resumed": "--epochs=1",
        "resumed ": "--devices=2",
        "6": "--batch=6",
        "3": "--devices=3",
        "9": "--devices=9",
        "many": "--devices=many",
        "2 ": "--eval_only --devices=4",
    }
    commands = [
        f"{'' if 'batch' in more else '--batch=4 '}--workdir={folder / name.strip().replace(' ', '-')} {more}"
        for name, more in flags.items()
    ]
    return folder, run("device_runs", 4, *commands)


@pytest.mark.parametrize("name", ["2", "4", "resumed"])
def test_the_curve_and_the_figures_are_those_of_one_device(runs, name):
    np.testing.assert_allclose(numbers(runs[0] / name), numbers(runs[0] / "1"), rtol=2e-5, atol=1e-6)


def test_chunks_on_two_devices_give_the_bits_of_whole_examples(runs):
    np.testing.assert_array_equal(numbers(runs[0] / "2-in-chunks"), numbers(runs[0] / "2"))


@pytest.mark.slow
def test_one_of_many_devices_is_a_machine_with_one_bit_for_bit(runs, tmp_path):
    run("device_runs", 1, f"--batch=4 --workdir={tmp_path}")
    np.testing.assert_array_equal(numbers(tmp_path), numbers(runs[0] / "1"))


def test_the_devices_in_use_are_said_and_stored(runs):
    folder, said = runs
    assert "computing on 1 of 4 devices (cpu)\n" in said
    assert "computing on 4 of 4 devices (cpu), 1 examples of a step on each\n" in said
    assert "computing on 3 of 4 devices (cpu), 2 examples of a step on each\n" in said  # of batches of 6
    stored = json.loads((folder / "2" / "config.json").read_text())
    assert (stored["device"]["used"], stored["device"]["count"]) == (2, 4)
    assert "used 4 there, 2 here" in " ".join(said.split())


def test_a_wrong_number_of_devices_is_refused_with_the_nearest(runs):
    folder, said = runs
    assert "error: --devices must divide --batch_size=4; got 3; the nearest: 2, 4\n" in said
    assert "error: --devices must be at most the 4 there are; got 9; the nearest: 4\n" in said
    assert "error: --devices must be all, or a whole number of at least 1; got 'many'\n" in said
    assert not (folder / "3").exists()


@pytest.mark.slow
def test_seeds_over_two_devices_are_those_seeds_alone_and_can_be_resumed(tmp_path):
    assert "all the same 4" in run("device_seeds", tmp_path)


@pytest.fixture
def free_choice():
    """JAX in a process that did not ask for the CPU."""
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", asked)


def test_a_missing_accelerator_is_reported_where_one_was_expected(monkeypatch, free_choice, tmp_path):
    monkeypatch.setattr(devices, "_PACKAGES", ())
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path / "nothing"),))
    assert devices.missing_accelerator() is None
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path),))
    assert f"an accelerator was expected, as {tmp_path} exists" in devices.missing_accelerator()
    monkeypatch.setattr(devices, "_SIGNS", ())
    monkeypatch.setattr(devices, "_PACKAGES", ("jax",))
    assert "jax is installed, but JAX found none: this run computes on the CPU" in devices.missing_accelerator()


def test_nothing_is_reported_where_the_cpu_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path),))
    assert devices.missing_accelerator() is None
