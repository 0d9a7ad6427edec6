"""Runs of experiments.mnist whose images do not fit in --device_memory: the bits of those whose images do."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import running
from conftest import weights
from planar_vae_jax.runs.placement import Placement, rooms

from experiments import flow_length, mnist, use
from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluation, latent
from planar_vae_jax.data.dataset import assemble
from planar_vae_jax.runs import compiled, fit, memory
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import one_device
from planar_vae_jax.vae.model import VAE

ROOT = Path(__file__).parents[2]
# 22 steps of an epoch; 120 kB are chunks of 3 of them, and of 1000 images that are evaluated
TINY = ("--epochs=2", "--hidden=8", "--latent=2", "--batch_size=400", "--nll_samples=4")
CHUNKS = "--device_memory=120KB"

pytestmark = pytest.mark.usefixtures("standard_promotion")


def noise():
    generator = np.random.default_rng(0)
    sizes = {"train": 9000, "valid": 1700, "test": 1700}
    return {f"x_{split}": generator.integers(0, 256, (size, 5, 4), np.uint8) for split, size in sizes.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same images as an npz file and as a folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "noise").mkdir()
    for field, array in noise().items():
        np.save(folder / "noise" / f"{field}.npy", array)
    np.savez(folder / "noise.npz", **noise())
    return folder / "noise.npz", folder / "noise"


def run(images, workdir, *flags):
    mnist.main([*TINY, "--flows=2", f"--dataset={images}", f"--workdir={workdir}", *flags])
    return result(workdir)


def result(workdir):
    """All that a run leaves, but for its seconds and where its images were."""
    found = running.result(workdir)
    del found["summary"]["source"]
    return {**found, "figures": {path.name: path.read_bytes() for path in workdir.glob("*.png")}}


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(places[0], tmp_path_factory.mktemp("whole") / "run")


def live():
    """Bytes of images on the device."""
    shapes = [array.shape for array in jax.live_arrays() if array.dtype == np.uint8]
    return sum(int(np.prod(shape)) for shape in shapes if shape[-2:] == (5, 4))


def test_a_streamed_run_has_the_bits_of_a_whole_one_and_keeps_to_its_memory(
    places, whole, tmp_path, monkeypatch, capsys
):
    gc.collect()
    before, there = live(), []

    def watched(function):
        def called(*args, **kwargs):
            there.append(live() - before)
            value = jax.block_until_ready(function(*args, **kwargs))
            there.append(live() - before)
            return value

        return called

    for module, name in ((compiled, "train_steps"), (evaluation, "free_energy_terms")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    assert run(places[0], tmp_path, CHUNKS) == whole
    said = capsys.readouterr().out
    chunks = "180 kB of training images in chunks, 60 kB at once, 95.2 kB of test and validation images in chunks, 60"
    assert f"images on each device: {chunks} kB at once\n" in said
    assert 0 < max(there) <= 120_000
    gc.collect()
    assert live() == before


def test_a_run_goes_on_with_another_memory(places, tmp_path, monkeypatch):
    whole = run(places[0], tmp_path / "whole", "--epochs=1")
    assert whole["figures"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "Pace", running.OneStep)
        with running.stopped_after(4), pytest.raises(running.signals.Stopped, match="epoch 0 and 4 steps"):
            run(places[0], tmp_path / "run", CHUNKS, "--epochs=1")
        with running.stopped_after(3), pytest.raises(running.signals.Stopped, match="epoch 0 and 7 steps"):
            run(places[0], tmp_path / "run", "--epochs=1")
    assert run(places[0], tmp_path / "run", CHUNKS, "--epochs=1") == whole


def test_static_images_are_drawn_alike_in_chunks():
    data = assemble("noise", "here", noise())
    ours, theirs = (Placement(data, "static", one_device(), 400, asked) for asked in ("120KB", None))
    rows = np.arange(1200) * 7 % 9000
    drawn = np.asarray(ours.train().take(rows))
    np.testing.assert_array_equal(drawn, theirs.train()[rows])
    assert set(np.unique(drawn)) == {0, 255}


def test_a_folder_is_the_npz_file_of_its_arrays_also_in_a_sweep_and_in_use(places, whole, tmp_path):
    flags = [*TINY, "--lengths=2", "--seeds=1", f"--dataset={places[1]}", f"--workdir={tmp_path}", CHUNKS]
    flow_length.main(flags)
    workdir = tmp_path / "flows=2-seed=0"
    assert result(workdir) == whole
    use.main([f"--workdir={workdir}", "--interpolate=0,1699"])
    with np.load(workdir / "use" / "interpolation.npz") as arrays:
        assert arrays["images"].shape == (2, 5, 4)
    assert load_run(workdir).config["dataset"] == str(places[1])
    mnist.main([f"--workdir={workdir}", "--eval_only"])
    assert result(workdir) == whole


def test_every_figure_of_streamed_images_is_that_of_whole_ones():
    samples = 20  # so that 800 images are decoded at a time, and 1000 encoded
    data = assemble("noise", "here", noise())
    vae = VAE((5, 4), latent=2, hidden=8, flow_length=2)  # as of the runs
    params = weights(vae)
    ours, theirs = (Placement(data, "dynamic", one_device(), 400, asked).test() for asked in ("120KB", None))
    assert len(ours) == 1700
    assert isinstance(theirs, evaluation.Images)
    for function in (
        lambda images: evaluation.evaluate(vae, params, images, nll_samples=4),
        lambda images: evaluation.mean_loss(vae, params, images, "iwae", "test", samples),
        lambda images: latent.latent_units(vae, params, images),
        lambda images: latent.aggregate_posterior(vae, params, images),
        lambda images: latent.kl_by_dimension(vae, params, images),
        lambda images: images.take(np.array([3, 1699])).pixels,
    ):
        jax.tree.map(np.testing.assert_array_equal, function(ours), function(theirs))


@pytest.mark.slow  # two processes' worth of compilation
def test_on_two_devices_and_in_two_processes_too(places, tmp_path):
    flags = [*TINY, "--flows=2", f"--dataset={places[1]}", "--epochs=1"]
    runs = [[*flags, f"--workdir={tmp_path / 'whole'}"], [*flags, f"--workdir={tmp_path / 'run'}", CHUNKS]]
    command = [sys.executable, "-m", "tests.device_runs", "2", *map(" ".join, runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computing on 2 of 2 devices" in done.stdout
    assert "in chunks, 60 kB at once" in done.stdout
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    from test_processes import Processes

    together = Processes(2, places[1], tmp_path / "together", " ".join([*flags, "--validation=0", CHUNKS]))
    assert together.end() == [0, 0], together.said
    ours, theirs = (result(tmp_path / name) for name in ("together", "whole"))
    for line, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


# --- Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("64000", 64_000),
        ("2GB", 2 * 10**9),
        ("512mb", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("7B", 7),
        ("0.3KB", 300),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "1 G B", "2XB", "2G", "1e9", "0.1B", "nan", "all", "1,5GB"])
def test_what_is_no_size_is_refused_before_any_data_is_read(tmp_path, text):
    with pytest.raises(UsageError) as caught:
        mnist.main(["--dataset=auto", f"--workdir={tmp_path / 'run'}", f"--device_memory={text}"])
    message = str(caught.value)
    assert message.startswith("--device_memory must be a size as in 2GB")
    assert message.endswith(f"got {text!r}")
    assert not (tmp_path / "run").exists()


def test_a_bad_folder_is_refused_with_the_flag_and_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "x_train.npy", noise()["x_train"] / 255)
    for words in (": wanted x_test.npy, got x_train.npy", "/x_train.npy: wanted .*float64"):
        with pytest.raises(UsageError, match=f"^--dataset: {tmp_path}/images{words}"):
            run(tmp_path / "images", tmp_path / "run")
        np.save(tmp_path / "images" / "x_test.npy", noise()["x_test"])
    with pytest.raises(UsageError, match="IDX files need --data_dir"):
        run(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_memory_too_small_for_four_batches_is_refused(places, tmp_path):
    with pytest.raises(UsageError, match=r"--device_memory must be at least 32 kB, four batches .* got 31KB"):
        run(places[0], tmp_path / "run", "--device_memory=31KB")
    assert not (tmp_path / "run").exists()


def test_show_bytes():
    sizes = (12, 47_040_000, 1_999_999_999, 5 * 10**12, 999)
    assert [memory.show_bytes(size) for size in sizes] == ["12 bytes", "47 MB", "2 GB", "5 TB", "999 bytes"]


@pytest.mark.parametrize(
    ("train", "evaluated", "limit", "expected"),
    [
        (10, 10, None, (None, None)),
        (10, 10, 20, (None, None)),
        (10, 10, 19, (9, 9)),
        (30, 10, 20, (10, None)),
        (100, 5, 20, (15, None)),
        (10, 90, 20, (None, 10)),
        (100, 100, 20, (10, 10)),
    ],
)
def test_rooms(train, evaluated, limit, expected):
    assert rooms(train, evaluated, limit) == expected


def test_by_default_half_of_a_device_and_of_a_mapped_set_a_gibibyte_where_none_tells(monkeypatch, places):
    class Device(SimpleNamespace):
        def memory_stats(self):
            return self.stats

    told = [Device(process_index=0, stats={"bytes_limit": size}) for size in (80, 60)]
    other = Device(process_index=1, stats={"bytes_limit": 2})
    assert memory.device_limit(None, [*told, other]) == 30
    assert memory.device_limit("1KB", told) == 1000
    assert memory.device_limit(None, jax.devices("cpu")) is None
    data = assemble("noise", "here", noise())
    assert "chunks" not in str(Placement(data, "none", one_device(), 4, None))
    told = "180 kB of training images in chunks, 105 kB at once, 95.2 kB of test and validation images"
    assert str(Placement(data, "none", one_device(), 400, "0.2MB")) == told
    from planar_vae_jax.data import load_dataset
    from planar_vae_jax.runs import placement

    monkeypatch.setattr(placement, "MAPPED_LIMIT", 100_000)
    assert "chunks" not in str(Placement(data, "none", one_device(), 4, None))
    assert "chunks" in str(Placement(load_dataset(str(places[1])), "none", one_device(), 4, None))
