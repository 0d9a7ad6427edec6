"""One run on 1, 2 and 8 devices: the same losses and figures, to the rounding of float32; what is said of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import image_runs
import jax
import numpy as np
import pytest

from planar_vae_jax.runs import devices, reading

ROOT = Path(__file__).parents[2]
TINY = " ".join((*image_runs.TINY, "--validation=30"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_runs.write_noise(tmp_path_factory.mktemp("data") / "noise.npz")


def run(there, images, *runs):
    """What several runs say, one after the other in one process with so many devices; each a workdir and flags."""
    flags = [f"--dataset={images} {TINY} --workdir={workdir} {more}" for workdir, more in runs]
    command = [sys.executable, "-m", "tests.device_runs", str(there), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def numbers(workdir):
    """Every figure of a run but its seconds, in order."""
    summary = json.loads((workdir / "summary.json").read_text())
    return np.array(lines(workdir) + list(summary["test"].values()), float)


def lines(workdir):
    """Those of the training alone."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [value for line in found for name, value in sorted(line.items()) if name != "seconds"]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """The folder of runs on 1, 2 and 8 of 8 devices, and one that begins on 8 and goes on with 2; what was said."""
    folder = tmp_path_factory.mktemp("runs")
    said = run(
        8,
        images,
        *((folder / str(count), f"--devices={count}") for count in (1, 2)),
        (folder / "8", ""),
        (folder / "on", "--epochs=1"),
        (folder / "on", "--devices=2"),
        (folder / "amortised-1", "--devices=1 --amortized --objective=reconstruction"),
        (folder / "amortised-8", "--amortized --objective=reconstruction"),
        (folder / "12", "--batch_size=12 --epochs=1"),
        (folder / "3", "--devices=3"),
        (folder / "9", "--devices=9"),
        (folder / "many", "--devices=many"),
        (folder / "8", "--eval_only --devices=4 --nll_samples=8"),
    )
    return folder, said


@pytest.mark.parametrize(
    ("name", "of"), [("2", "1"), ("8", "1"), ("on", "1"), ("amortised-8", "amortised-1")], ids=lambda name: name
)
@pytest.mark.slow  # in test_processes a run with two devices is quicker
def test_the_curve_and_the_figures_are_those_of_one_device(runs, name, of):
    np.testing.assert_allclose(numbers(runs[0] / name), numbers(runs[0] / of), rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_one_of_many_devices_is_a_machine_with_one_bit_for_bit(runs, images, tmp_path):
    run(1, images, (tmp_path / "run", ""))
    np.testing.assert_array_equal(numbers(tmp_path / "run"), numbers(runs[0] / "1"))


@pytest.mark.slow
def test_what_is_used_is_said_and_stored(runs):
    folder, said = runs
    assert "computing on 1 of 8 devices (cpu)\n" in said
    assert "computing on 8 of 8 devices (cpu), 2 examples of a step on each\n" in said
    assert "computing on 6 of 8 devices (cpu), 2 examples of a step on each\n" in said  # of batches of 12
    stored = json.loads((folder / "2" / "config.json").read_text())
    assert (stored["device"]["used"], stored["device"]["count"], stored["flags"]["devices"]) == (2, 8, "2")
    assert "used 8 there, 2 here" in " ".join(said.split())


@pytest.mark.slow
def test_a_wrong_number_of_devices_is_refused_with_the_nearest(runs):
    folder, said = runs
    assert "error: --devices must divide --batch_size=16; got 3; the nearest: 2, 4\n" in said
    assert "error: --devices must be at most the 8 there are; got 9; the nearest: 8\n" in said
    assert "error: --devices must be all, or a whole number of at least 1; got 'many'\n" in said
    assert not (folder / "3").exists()


@pytest.mark.slow
def test_figures_can_be_computed_again_on_other_devices(runs):
    again = json.loads((runs[0] / "8" / "epoch-2" / "summary.json").read_text())
    first = json.loads((runs[0] / "8" / "summary.json").read_text())
    assert again["test"]["free_energy"] == pytest.approx(first["test"]["free_energy"], rel=1e-5)


def test_seeds_over_eight_devices_are_eight_runs(images, tmp_path):
    command = [sys.executable, "-m", "tests.device_seeds", str(images), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in range(8):
        alone, together = (tmp_path / way / f"seed={seed}" for way in ("alone", "together"))
        np.testing.assert_allclose(lines(together), lines(alone), rtol=2e-5, atol=1e-6)
        ours, theirs = (reading.read_checkpoint(one / "checkpoints", "best") for one in (together, alone))
        assert ours.step == theirs.step
        for name, leaf in theirs.leaves.items():
            if isinstance(leaf, np.ndarray):
                np.testing.assert_allclose(ours.leaves[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len({tuple(lines(tmp_path / "alone" / f"seed={seed}")) for seed in range(8)}) == 8
    assert "computing on 8 of 8 devices (cpu), 1 of the 8 seeds on each\n" in done.stdout
    assert "\nall 6 6 of 8 devices (cpu), 1 of the 6 seeds on each\n" in done.stdout
    assert "\n4 6 3 of 8 devices (cpu), 2 of the 6 seeds on each\n" in done.stdout
    assert "\nall 5 5 of 8 devices (cpu), 1 of the 5 seeds on each\n" in done.stdout
    assert "\nall 13 1 of 8 devices (cpu)\n" in done.stdout  # a prime
    assert "\n2 8 2 of 8 devices (cpu), 4 of the 8 seeds on each\n" in done.stdout
    assert "\n9 8 error: --devices must be at most the 8 there are; got 9\n" in done.stdout


@pytest.fixture
def free_choice():
    """JAX as where nobody has asked for the CPU."""
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", asked)


def test_a_missing_accelerator_is_told_where_one_was_expected(monkeypatch, free_choice, tmp_path):
    monkeypatch.setattr(devices, "_PACKAGES", ())
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path / "nothing"),))
    assert devices.missing_accelerator() is None
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path),))
    assert f"an accelerator was expected, as {tmp_path} is there" in devices.missing_accelerator()
    monkeypatch.setattr(devices, "_SIGNS", ())
    monkeypatch.setattr(devices, "_PACKAGES", ("jax",))
    assert "jax is installed, but JAX found none: this run computes on the CPU" in devices.missing_accelerator()


def test_nothing_is_told_where_the_cpu_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_SIGNS", (str(tmp_path),))
    assert devices.missing_accelerator() is None
