"""Real runs of the experiments that are stopped, killed, made longer, evaluated again (the loop itself: tests/runs)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_runs import TEST, TRAIN, write_noise

from experiments import density, mnist
from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError

ROOT = Path(__file__).parents[2]
# One model, so that all is compiled once; it learns noise by heart.
MNIST = ("--objective=reconstruction", "--optimizer=schedule_free", "--learning_rate=0.03", "--clip_norm=1")
MNIST += ("--amortized", "--flows=2", "--hidden=64", "--latent=4", "--batch_size=16", "--nll_samples=4")
MNIST += ("--validation=20", "--epochs=3")  # 4 steps each
DENSITY = ("--flows=2", "--steps=200", "--batch_size=32", "--checkpoint_every=10")


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(density, "SAMPLES", 2**14)  # a 64th


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    labels = {
        f"y_{split}": (np.arange(size) % 3).astype(np.uint8) for split, size in (("train", TRAIN), ("test", TEST))
    }
    return write_noise(tmp_path_factory.mktemp("data") / "images.npz", **labels)


@pytest.fixture(scope="module")
def images_to_train_on(images, tmp_path_factory):
    """Those without the 20 for validation."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    with np.load(images) as arrays:
        np.savez(path, **{name: array[20:] if "train" in name else array for name, array in arrays.items()})
    return path


def start(name, images, workdir, *flags, pictures=False):
    if name == "density":
        return density.main([*DENSITY, f"--workdir={workdir}", *flags])
    return mnist.main([*MNIST, f"--dataset={images}", f"--workdir={workdir}", *flags], pictures=pictures)


def timeless(line):
    return {key: value for key, value in line.items() if not key.startswith("seconds")}


def result(workdir):
    """All that a finished run leaves, but for its seconds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return {
        "summary": timeless(json.loads((workdir / "summary.json").read_text())),
        "metrics": [timeless(line) for line in lines],
        "figures": {path.name: path.read_bytes() for path in workdir.glob("*.png")},
        "step": newest.name,
        "leaves": json.loads((newest / "meta" / "metadata").read_text())["content"]["leaves"],
    }


def stopped_after(calls, monkeypatch):
    """As if SIGTERM came at the so-manieth look of the loop, which looks after each step."""
    looks = iter([None] * calls)
    monkeypatch.setattr(fit.Pace, "end", lambda self, start, stop: start + 1)
    monkeypatch.setattr(signals, "requested", lambda: next(looks, signal.SIGTERM))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param("mnist", ("--epochs=2",), marks=pytest.mark.slow),
        ("density", ("--learn_base", "--anneal_steps=100")),
    ],
)
def test_a_run_stopped_by_signals_ends_as_the_run_in_one_go(images, tmp_path, monkeypatch, name, flags):
    start(name, images, tmp_path / "whole", *flags, pictures=True)
    for calls in (1, 3, 2):
        with monkeypatch.context() as patch:
            stopped_after(calls, patch)
            with pytest.raises(signals.Stopped):
                start(name, images, tmp_path / "run", *flags)
    start(name, images, tmp_path / "run", *flags, pictures=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert result(tmp_path / "run")["figures"]


def test_more_epochs_give_the_longer_run_and_fewer_than_done_are_refused(images, tmp_path):
    start("mnist", images, tmp_path / "whole")
    start("mnist", images, tmp_path / "run", "--epochs=1")
    start("mnist", images, tmp_path / "run")
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"--epochs=2 is less .* another --workdir"):
        start("mnist", images, tmp_path / "run", "--epochs=2")


def figures(workdir):
    return json.loads((workdir / "summary.json").read_text())["test"]


def test_eval_only_with_other_importance_samples_changes_the_nll_alone(images_to_train_on, tmp_path):
    start("mnist", images_to_train_on, tmp_path, "--validation=0")
    before = figures(tmp_path)
    mnist.main([f"--workdir={tmp_path}", "--eval_only", "--nll_samples=40"], pictures=False)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("epoch-"))
    after = figures(folder)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"nll", "nll_se", "effective_sample_size", "effective_sample_size_se"}
    with pytest.raises((UsageError, RunError), match="--validation"):
        mnist.main([f"--workdir={tmp_path}", "--eval_only", "--checkpoint=best"], pictures=False)


def test_the_best_checkpoint_is_chosen_by_validation_images(images, tmp_path):
    # Noise is learned by heart: from some epoch on, validation images get worse.
    start("mnist", images, tmp_path, "--epochs=25")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = 1 + int(np.argmin([line["validation_loss"] for line in lines]))
    assert best < len(lines)
    assert not any("test" in name for line in lines for name in line)
    mnist.main([f"--workdir={tmp_path}", "--eval_only", "--checkpoint=best"], pictures=False)
    assert figures(tmp_path / f"epoch-{best}")["free_energy"] != figures(tmp_path)["free_energy"]


def test_early_stopping_reports_the_best_checkpoint_and_is_resumed_only_with_more_patience(images, tmp_path, capsys):
    flags = ("--checkpoint_every=100", "--epochs=60")
    start("mnist", images, tmp_path, *flags, "--patience=2")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["stopped_early"], found["patience"]) == (True, 2)
    assert found["best_epoch"] == found["epochs"] - 2 < 58
    start("mnist", images, tmp_path, *flags, "--patience=2", "--epochs=61")
    assert "is finished" in capsys.readouterr().out
    best = load_run(tmp_path, "best")
    assert best.step == found["best_epoch"] * 4
    with np.load(images) as arrays:
        test = evaluation.fixed_images(arrays["x_test"], np.arange(30), "test", "none")
    figures = evaluation.evaluate(best.model, test, nll_samples=4)
    assert float(np.mean(figures.squared_error)) == pytest.approx(found["test"]["squared_error"], rel=1e-5)
    start("mnist", images, tmp_path, *flags, "--patience=4")
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] >= found["epochs"] + 2


@pytest.mark.slow
def test_killed_processes_are_resumed_and_compile_nothing_again(images, tmp_path):
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

    def process():
        program = (
            "from experiments import mnist; from planar_vae_jax.runs.console import run_main; "
            "run_main(lambda argv: mnist.main(argv, pictures=False))"
        )
        command = [sys.executable, "-c", program, *MNIST, f"--dataset={images}"]
        command += [f"--workdir={tmp_path / 'run'}", "--epochs=20000"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def stopped_by(number, run, steps):
        """After so many steps, by this signal."""
        deadline = time.monotonic() + 300
        while newest_step(tmp_path / "run") < steps:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(number)
        run.communicate(timeout=300)

    run = process()
    stopped_by(signal.SIGKILL, run, steps=11)
    assert run.returncode == -signal.SIGKILL
    killed_at, programs = newest_step(tmp_path / "run"), set(cache.glob("*-cache"))
    run = process()
    stopped_by(signal.SIGTERM, run, steps=killed_at + 11)
    assert run.returncode == 128 + signal.SIGTERM
    assert any("train_steps" in path.name for path in programs)
    assert set(cache.glob("*-cache")) == programs
    epochs = f"--epochs={newest_step(tmp_path / 'run') // 4 + 1}"
    for name in ("run", "in-one-go"):
        start("mnist", images, tmp_path / name, epochs)
    assert result(tmp_path / "run") == result(tmp_path / "in-one-go")


def newest_step(workdir):
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)
