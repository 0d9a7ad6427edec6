"""What experiments.use does with a trained run, from its command line."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from image_runs import SHAPE, TEST, TINY, TRAIN
from PIL import Image

from experiments import mnist, use
from planar_vae_jax import load_run
from planar_vae_jax.analysis import evaluation
from planar_vae_jax.data import DataError
from planar_vae_jax.data.images import read_images
from planar_vae_jax.runs.config import UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (TRAIN, *SHAPE), np.uint8)


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained run, and its images in a file."""
    folder = tmp_path_factory.mktemp("use")
    labels = {"y_train": np.arange(TRAIN) % 3, "y_test": np.arange(TEST)}
    np.savez(folder / "images.npz", x_train=IMAGES, x_test=IMAGES[:TEST], **labels)
    with jax.numpy_dtype_promotion("standard"):
        mnist.main(
            [*TINY, "--epochs=1", f"--dataset={folder / 'images.npz'}", f"--workdir={folder / 'run'}"], pictures=False
        )
    return folder


@pytest.fixture
def start(place, tmp_path):
    def run(*flags):
        use.main([f"--workdir={place / 'run'}", f"--output={tmp_path / 'out'}", *flags])
        return tmp_path / "out"

    return run


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_samples(start, place):
    out = start("--samples=10", "--seed=3")
    assert {path.name for path in out.iterdir()} == {"samples.png", "samples.npz"}
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["samples"], load_run(place / "run").sample(jax.random.key(3), 10))


def test_reconstructions(start, place):
    out = start(f"--reconstruct={place / 'images.npz'}")
    assert (out / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "reconstructions.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], IMAGES[:TEST])
        expected = load_run(place / "run").reconstruct(IMAGES[:TEST])
        np.testing.assert_array_equal(arrays["reconstructions"], expected)


def test_interpolations(start, place):
    out = start("--interpolate=2,7")
    assert (out / "interpolation.png").exists()
    run = load_run(place / "run")
    test = evaluation.fixed_images(IMAGES[[2, 7]], np.array([2, 7]), "test", "dynamic")
    ends = evaluation.reconstruct(run.model, test.pixels)
    with np.load(out / "interpolation.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], test.pixels)
        for name in ("z_0", "z_K"):
            np.testing.assert_allclose(arrays[name][[0, -1]], ends, atol=1e-5)


def test_scores(start, place):
    out = start(f"--scores={place / 'images.npz'}", "--nll_samples=16")
    rows, summary = rows_of(out / "scores.csv"), json.loads((out / "scores.json").read_text())
    assert [int(row["index"]) for row in rows] == list(range(TEST))
    assert {row["file"] for row in rows} == {str(place / "images.npz")} == set(summary["files"])
    test = evaluation.fixed_images(IMAGES[:TEST], np.arange(TEST), "test", "dynamic")
    found = evaluation.evaluate(load_run(place / "run").model, test, nll_samples=16)
    for name, values in (("free_energy", found.free_energy), ("nll", found.nll)):
        np.testing.assert_allclose([float(row[name]) for row in rows], values, rtol=1e-5)
        assert summary[name] == pytest.approx(float(np.mean(values)), rel=1e-5)
    assert summary["images"] == TEST
    assert summary["nll_samples"] == 16


def test_scores_of_the_runs_own_test_images_are_those_of_its_summary(start, place):
    out = start(f"--scores={place / 'images.npz'}")
    ours, theirs = (json.loads(path.read_text()) for path in (out / "scores.json", place / "run" / "summary.json"))
    for name in ("free_energy", "free_energy_se", "nll", "nll_se"):
        assert ours[name] == pytest.approx(theirs["test"][name], rel=1e-5)
    # Each of the test images has as many below it as its rank says.
    rows = rows_of(out / "scores.csv")
    ranks = np.argsort(np.argsort([float(row["free_energy"]) for row in rows]))
    np.testing.assert_allclose([float(row["quantile"]) for row in rows], ranks / TEST)
    assert ours["test_images"] == TEST


def test_pictures_have_their_names_and_what_the_run_never_saw_a_larger_quantile(start, place, tmp_path, capsys):
    noise = np.random.default_rng(5).integers(0, 2, SHAPE, np.uint8) * np.uint8(255)
    for name, image in {"b": IMAGES[1], "a": noise}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    rows = rows_of(start(f"--scores={tmp_path / '*.png'}") / "scores.csv")
    assert [row["file"] for row in rows] == [str(tmp_path / name) for name in ("a.png", "b.png")]
    quantiles = [float(row["quantile"]) for row in rows]
    assert quantiles[0] > quantiles[1]
    assert "quantile" in capsys.readouterr().out


def test_without_the_runs_images_there_are_scores_but_no_quantiles(start, place, monkeypatch, capsys):
    def missing(*args):
        raise DataError("images.npz: no such file")

    monkeypatch.setattr(use, "load_images", missing)
    out = start(f"--scores={place / 'images.npz'}")
    assert "no quantiles, as the run's own test images are not to be had: images.npz" in capsys.readouterr().err
    assert "quantile" not in rows_of(out / "scores.csv")[0]
    assert json.loads((out / "scores.json").read_text())["test_images"] is None
    with pytest.raises(DataError, match="no such file"):
        start(f"--scores={place / 'images.npz'}", "--dataset=elsewhere.npz")


def test_latents(start, place):
    out = start(f"--latents={place / 'images.npz'}", "--seed=3")
    run = load_run(place / "run")
    with np.load(out / "latents.npz") as arrays:
        assert set(arrays) == {"means", "codes"}
        np.testing.assert_array_equal(arrays["means"], run.latents(IMAGES[:TEST]))
        np.testing.assert_array_equal(arrays["codes"], run.encode(IMAGES[:TEST], jax.random.key(3)))


def test_the_model_is_exported(start, place, tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="jax.export saves functions by flatbuffers")
    use.main([f"--workdir={place / 'run'}", f"--export={tmp_path / 'functions'}", "--nll_samples=3"])
    names = [f"{name}.jaxexport" for name in ("encoder", "decoder", "free_energy", "nll")]
    assert {path.name for path in (tmp_path / "functions").iterdir()} == {*names, "README.txt"}
    assert "from 3 importance samples" in (tmp_path / "functions" / "README.txt").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == names
    with pytest.raises(UsageError, match=r"--export: folder must be a new one, or one without a README\.txt"):
        use.main([f"--workdir={place / 'run'}", f"--export={tmp_path / 'functions'}"])


def test_images_are_resized_and_inverted_only_if_asked_and_never_silently(start, tmp_path, capsys):
    large = np.repeat(np.repeat(IMAGES[:3], 2, axis=1), 3, axis=2)
    np.savez(tmp_path / "large.npz", x_test=255 - large)
    with pytest.raises(UsageError, match=r"wanted images of 8 x 4 pixels.*got 16 x 12 \(resize scales them\)"):
        start(f"--reconstruct={tmp_path / 'large.npz'}", "--invert")
    out = start(f"--reconstruct={tmp_path / 'large.npz'}", "--invert", "--resize")
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 3 images resized to 8 x 4 pixels, from 16 x 12" in said
    assert "3 images inverted: black became white, and white black" in said
    with np.load(out / "reconstructions.npz") as arrays:
        correlation = np.corrcoef(arrays["images"].ravel(), IMAGES[:3].ravel())[0, 1]
    assert correlation > 0.9


def test_a_file_that_is_there_is_not_overwritten(start, place):
    for _ in range(3):
        out = start(f"--reconstruct={place / 'images.npz'}")
    names = {f"reconstructions{number}.{ending}" for number in ("", "-2", "-3") for ending in ("npz", "png")}
    assert {path.name for path in out.iterdir()} == names


def test_a_bucket_is_no_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--output must be a folder of this machine; got 'gs://bucket/use'"):
        use.main([f"--workdir={place / 'run'}", "--samples=4", "--output=gs://bucket/use"])
    assert not list(tmp_path.iterdir())


def test_the_gap(start, capsys):
    out = start("--gap=4", "--gap_steps=30", "--nll_samples=200")
    summary, rows = json.loads((out / "gap.json").read_text()), rows_of(out / "gap.csv")
    assert summary["images"] == 4
    assert [int(row["index"]) for row in rows] == [0, 9, 19, 29]
    assert [row["label"] for row in rows] == ["0", "9", "19", "29"]
    assert summary["settings"]["steps"] == 30
    whole = summary["own_family"]["amortisation"] + summary["own_family"]["approximation"]
    assert whole == pytest.approx(summary["encoder"]["gap"], abs=1e-3)
    assert summary["own_family"]["amortisation"] > -0.1
    assert "amortisation" in capsys.readouterr().out


def test_a_run_with_patience_is_used_at_its_best_checkpoint(start, monkeypatch):
    asked, load = [], use.load_run

    def load_run(workdir, checkpoint, build):
        asked.append(checkpoint)
        run = load(workdir)
        return dataclasses.replace(run, config={**run.config, "patience": 2})

    monkeypatch.setattr(use, "load_run", load_run)
    start("--samples=1")
    start("--samples=1", "--checkpoint=latest")
    assert asked == ["latest", "best", "latest"]


def test_without_output_it_writes_into_the_runs_folder(place):
    use.main([f"--workdir={place / 'run'}", "--samples=1"])
    assert (place / "run" / "use" / "samples.png").exists()
    load_run(place / "run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--reconstruct, --latents, --scores, --samples, --interpolate, --gap, --export", "none"]),
        (("--samples=3", "--invert"), ["--invert", "--reconstruct, --latents, --scores", "got --samples"]),
        (("--export=x",), ["--output", "--export=FOLDER"]),
        (("--latents=FILE",), ["--latents", "8 x 4", "3 x 2", "resize"]),
        (("--samples=3", "--gap=2"), ["--samples, --gap"]),
        (("--samples=0",), ["--samples", "at least 1"]),
        (("--interpolate=1",), ["--interpolate", "two numbers", "0 to 29", "got 1"]),
        (("--interpolate=1,30",), ["--interpolate", "0 to 29", "got 1,30"]),
        (("--gap=31",), ["--gap", "30 test images", "got 31"]),
        (("--reconstruct=nowhere/*.png",), ["--reconstruct", "nowhere/*.png", "no such file"]),
        (("--scores=FILE",), ["--scores", "8 x 4", "3 x 2", "resize"]),
        (("--interpolate=0,1", "--dataset=OTHER"), ["--dataset", "run's own images"]),
    ],
)
def test_mistakes_are_told(start, place, tmp_path, flags, words):
    np.savez(tmp_path / "small.npz", np.ones((30, 3, 2), np.uint8))
    np.savez(tmp_path / "other.npz", x_train=IMAGES[::-1], x_test=IMAGES[:TEST])
    places = {"FILE": tmp_path / "small.npz", "OTHER": tmp_path / "other.npz"}
    for name, path in places.items():
        flags = tuple(flag.replace(name, str(path)) for flag in flags)
    with pytest.raises(UsageError) as caught:
        start(*flags)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"--workdir: .*no config\.json"):
        use.main([f"--workdir={tmp_path}", "--samples=1"])
    with pytest.raises(UsageError, match="--workdir must be"):
        use.main(["--samples=1"])


# --- Files of images ---


def test_pictures_are_read_by_a_pattern_in_the_order_of_their_names(tmp_path):
    for name, image in zip("bac", IMAGES[:3], strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    read = read_images(str(tmp_path / "*.png"), SHAPE, print)
    np.testing.assert_array_equal(read.pixels, IMAGES[[1, 0, 2]])
    assert read.files == [str(tmp_path / f"{name}.png") for name in "abc"]
    np.testing.assert_array_equal(read_images(str(tmp_path / "b.png"), SHAPE, print).pixels, IMAGES[:1])
    Image.fromarray(np.repeat(IMAGES[0][..., None], 3, axis=-1)).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(read_images(str(tmp_path / "colour.png"), SHAPE, print).pixels, IMAGES[:1])


def test_one_array_alone_is_the_images_and_floats_are_told(tmp_path):
    np.savez(tmp_path / "alone.npz", IMAGES[:3] / 255.0)
    lines = []
    np.testing.assert_array_equal(read_images(str(tmp_path / "alone.npz"), SHAPE, lines.append).pixels, IMAGES[:3])
    assert len(lines) == 1


def test_notes_on_images_are_for_images_that_are_not_the_runs(start, place, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "other.npz", x_train=IMAGES[::-1], x_test=IMAGES[:TEST])
    load_images = use.load_images
    monkeypatch.setattr(use, "load_images", lambda *args: (args[-1]("a note"), load_images(*args))[1])
    start("--interpolate=0,1")
    assert "a note" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="own images"):
        start("--interpolate=0,1", f"--dataset={tmp_path / 'other.npz'}")
    assert "a note" in capsys.readouterr().err


def test_files_that_hold_something_else_are_told(tmp_path):
    np.savez(tmp_path / "two.npz", a=IMAGES, b=IMAGES)
    with pytest.raises(DataError, match="wanted x_test, or one array alone; got a, b"):
        read_images(str(tmp_path / "two.npz"), SHAPE, print)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png: wanted a picture"):
        read_images(str(tmp_path / "bad.png"), SHAPE, print)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"bad\.npz cannot be read"):
        read_images(str(tmp_path / "bad.npz"), SHAPE, print)
    Image.fromarray(np.ones(SHAPE, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8 bits"):
        read_images(str(tmp_path / "deep.png"), SHAPE, print)
    Image.fromarray(IMAGES[0][:3]).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=r"small\.png: wanted images of 8 x 4 pixels.*got 3 x 4"):
        read_images(str(tmp_path / "small.png"), SHAPE, print)
