"""experiments.mnist with its images on the host: every bit of the run whose images are on the device."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from image_runs import SHAPE, TEST, bars, run, write_bars

from experiments import flow_length, use
from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.data.streamed import Streamed

pytestmark = pytest.mark.usefixtures("standard_promotion")
FLAGS = ("--binarization=static",)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images with a validation split of their own; one that is held out is copied into memory."""
    path = write_bars(tmp_path_factory.mktemp("data") / "bars.npz")
    x_valid, y_valid = bars(20, SHAPE, seed=2)
    with np.load(path) as arrays:
        np.savez(path, **arrays, x_valid=x_valid, y_valid=y_valid)
    return path


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """The same images as npy files."""
    folder = tmp_path_factory.mktemp("data") / "bars"
    folder.mkdir()
    with np.load(images) as arrays:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
    return folder


@dataclasses.dataclass(frozen=True)
class SmallChunks(Streamed):
    """Chunks of one batch of training images."""

    chunk_bytes: int = 16 * 32


@pytest.fixture(scope="module")
def small_chunks():
    """Images are sent in small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Streamed", SmallChunks)
        yield


@pytest.fixture(scope="module")
def on_host(folder, small_chunks, tmp_path_factory):
    """The folder of a run on the npy files, which stay on the host without a flag."""
    workdir = tmp_path_factory.mktemp("host") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(folder, workdir, *FLAGS)
    return workdir


def timeless(content):
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if not key.startswith("seconds")}
    return content


def left(workdir):
    """What does not depend on where the images come from: figures, metrics and parameters."""
    summary = timeless(json.loads((workdir / "summary.json").read_text()))
    lines = [timeless(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    parameters = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_run(workdir).model)]
    return {name: value for name, value in summary.items() if name not in ("dataset", "source")}, lines, parameters


def test_a_folder_of_npy_files_stays_on_the_host_and_no_bit_changes(images, on_host, tmp_path, capsys):
    run(images, tmp_path / "device", *FLAGS)
    assert "whole on each device" in capsys.readouterr().out
    run(images, tmp_path / "host", *FLAGS, "--images=host")
    assert "sent in chunks from the host" in capsys.readouterr().out
    assert left(tmp_path / "device") == left(on_host)
    assert left(tmp_path / "host") == left(on_host)


def test_a_run_is_resumed_with_its_images_elsewhere(folder, on_host, tmp_path, capsys):
    run(folder, tmp_path, *FLAGS, "--epochs=1", "--images=device")
    assert "whole on each device" in capsys.readouterr().out
    run(folder, tmp_path, *FLAGS)
    shown = capsys.readouterr().out
    assert "after epoch 1" in shown
    assert "sent in chunks from the host" in shown
    assert left(tmp_path) == left(on_host)


def test_use_takes_the_images_of_the_folder(on_host, tmp_path):
    use.main([f"--workdir={on_host}", "--interpolate=0,3", f"--output={tmp_path}"])
    with np.load(tmp_path / "interpolation.npz") as arrays:
        assert arrays["images"].shape[0] == 2


def test_a_sweep_takes_the_images_of_the_folder(folder, on_host, tmp_path):
    tiny = ("--epochs=2", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4")
    places = (f"--dataset={folder}", f"--workdir={tmp_path}")
    flow_length.main([*tiny, *FLAGS, *places, "--lengths=2", "--seeds=1"], pictures=False)
    assert left(tmp_path / "flows=2-seed=0") == left(on_host)


def test_training_starts_from_the_parameters_of_another_run(images, on_host, tmp_path):
    run(images, tmp_path / "run", *FLAGS, "--epochs=1", "--seed=5", f"--init_from={on_host}")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((on_host / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["first_validation_loss"] == last["validation_loss"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_images"] == TEST
