"""The MNIST experiment from its command line, on a few tiny images."""

import json
import re
import subprocess
import sys
from html import unescape

import jax
import numpy as np
import pytest
from helpers import precision
from html_pages import Page, missing
from image_runs import TINY, write_bars

from experiments import mnist
from planar_vae_jax.data import ArgumentError
from planar_vae_jax.runs.config import UsageError

LATENT_PAGES = {"posteriors.png", "interpolations.png", "traversals.png", "aggregate.png"}
PICTURES = {*LATENT_PAGES, "reconstructions.png", "loss.png", "samples.png", "classes.png"}
FILES = {*PICTURES, "config.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints", ".lock"}
RUNS = {  # flags, and the pages that are not drawn; each choice of a flag is in one of them or in test_mnist_models
    "default": ("", set()),
    "no flow": (
        "--flows=0 --validation=30 --binarization=static --kl_warmup=1 --prng=rbg --precision=bfloat16",
        PICTURES,
    ),
    "64-bit types": (
        "--amortized --posterior=full --h=softsign --binarization=threshold --energy_annealing=2 --prng=unsafe_rbg",
        PICTURES,
    ),
    "importance-weighted": ("--objective=iwae --train_samples=9", PICTURES),
    "reconstruction": ("--objective=reconstruction", {"posteriors.png"}),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz")


def arguments(images, workdir, *flags):
    return [*TINY, f"--dataset={images}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def default(images, tmp_path_factory):
    """A run without flags, with every page."""
    workdir = tmp_path_factory.mktemp("default") / "run"
    with jax.numpy_dtype_promotion("standard"):
        mnist.main(arguments(images, workdir))
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def numbers(tree):
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    return [tree] if isinstance(tree, float) else []


def test_another_seed_gives_another_run_and_compiles_nothing(images, default, tmp_path, caplog):
    # The first test: programs are kept for two losses alone.
    with jax.log_compiles():
        mnist.main(arguments(images, tmp_path, "--seed=1"))
    assert not [line for line in caplog.messages if line.startswith("Compiling")]
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert summary(tmp_path)["test"] != summary(default)["test"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_every_file_with_finite_figures(images, tmp_path, name, request):
    flags, missing = RUNS[name]
    if name == "default":
        tmp_path = request.getfixturevalue("default")
    else:
        with precision(np.float64 if name == "64-bit types" else np.float32):
            mnist.main(arguments(images, tmp_path, *flags.split()), pictures=missing != PICTURES)
    assert {path.name for path in tmp_path.iterdir()} == FILES - missing
    found = summary(tmp_path)
    for key in ("dataset", "source", "binarization", "flows", "epochs", "seed", "objective", "seconds"):
        assert found[key] is not None
    assert found["dataset"] == "bars"
    assert set(found["per_class"]) == {"0", "1", "2"}
    for name in ("free_energy", "nll", "reconstruction", "kl", "squared_error"):
        assert found["test"][f"{name}_se"] > 0
        assert found["per_class"]["1"][f"{name}_se"] > 0
    assert np.all(np.isfinite(numbers(found)))
    assert list(found["nll_by_samples"]) == ["1", "2", "4"]
    assert found["nll_by_samples"]["4"] == pytest.approx(found["test"]["nll"], rel=1e-6)
    by_class = np.mean([row["free_energy"] for row in found["per_class"].values()])  # 10 images each
    assert by_class == pytest.approx(found["test"]["free_energy"], rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["train_loss"] == found["train"]["final_loss"]
    held_out = "validation" if "--validation=30" in flags else "test"
    assert all(line[f"{held_out}_loss_se"] > 0 for line in lines)
    if "--objective=iwae" in flags:  # more samples: a better bound
        assert lines[-1]["test_loss"] < found["test"]["free_energy"]
        assert lines[0]["first_test_loss"] == pytest.approx(lines[0]["first_train_loss"], rel=0.1)
    elif held_out == "test":  # the curve's last point is the table's figure
        name = "squared_error" if "--objective=reconstruction" in flags else "free_energy"
        assert lines[-1]["test_loss"] == found["test"][name]
    annealed = "warmup" in flags or "annealing" in flags
    assert ("annealed_loss" in lines[0]) == annealed
    if annealed:
        assert lines[0]["annealed_loss"] < lines[0]["train_loss"]
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_page_has_every_figure_and_picture_and_the_code_that_loads_the_run(default):
    html = (default / "report.html").read_text()
    page = Page(html)
    assert missing(page, summary(default)) == []
    shown = {page.png(number) for number in range(len(page.images))}
    assert shown == {(default / name).read_bytes() for name in PICTURES}
    assert all("bars" in image["alt"] for image in page.images)  # the titles
    differ = [row[0] for row in page.rows if row[0].startswith("--") and len(row) == 4]
    assert set(differ) == {"--workdir", "--dataset", *(flag.split("=")[0] for flag in TINY)}  # not --optimizer
    (code,) = re.findall(r"<code>(import jax.*?)</code>", html, re.DOTALL)
    found = {}
    exec(unescape(code), found)
    assert found["nats"].shape == (8,)


def test_training_lowers_the_loss_and_learns_the_images(images, tmp_path):
    mnist.main(
        arguments(images, tmp_path, "--epochs=60", "--learning_rate=0.02", "--checkpoint_every=60"), pictures=False
    )
    found = summary(tmp_path)
    assert found["train"]["final_loss"] < 0.8 * found["train"]["first_loss"]
    assert found["test"]["nll"] < found["test"]["free_energy"]
    # Independent pixels at their mean: what a decoder that ignores z cannot beat.
    with np.load(images) as arrays:
        mean = arrays["x_train"].mean(0) / 255.0
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum()
    assert found["test"]["nll"] < entropy - 0.5


@pytest.mark.slow
def test_no_nan_is_made_on_the_way(images, tmp_path):
    with jax.debug_nans(True):
        mnist.main(arguments(images, tmp_path, "--amortized", "--posterior=full"), pictures=False)
    assert np.all(np.isfinite(numbers(summary(tmp_path))))


def test_the_same_seed_gives_the_same_run(images, default, tmp_path):
    mnist.main(arguments(images, tmp_path), pictures=False)
    ours, theirs = ({**summary(one), "seconds": 0, "seconds_per_epoch": 0} for one in (tmp_path, default))
    assert ours == theirs


def test_one_sample_of_iwae_is_the_elbo(images, tmp_path):
    for name, flags in (("elbo", ()), ("one", ("--objective=iwae",))):
        mnist.main(arguments(images, tmp_path / name, "--epochs=1", *flags), pictures=False)
    elbo, one = (summary(tmp_path / name) for name in ("elbo", "one"))
    assert one["test"]["free_energy"] == pytest.approx(elbo["test"]["free_energy"], rel=1e-5)


def test_images_without_labels_run_without_a_table_by_class(images, tmp_path):
    unlabelled = tmp_path / "plain.npz"
    with np.load(images) as arrays:
        np.savez(unlabelled, x_train=arrays["x_train"], x_test=arrays["x_test"])
    mnist.main(arguments(unlabelled, tmp_path / "run"))
    assert summary(tmp_path / "run")["per_class"] == {}
    assert not (tmp_path / "run" / "classes.png").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--flows=-1", ["--flows", "at least 0", "-1"]),
        ("--flows=2.5", ["flows", "2.5"]),
        ("--epochs=0", ["--epochs", "at least 1", "0"]),
        ("--seed=-1", ["--seed", "at least 0", "-1"]),
        ("--batch_size=1000", ["--batch_size", "at most the 90", "1000"]),
        ("--learning_rate=0", ["--learning_rate", "greater than 0", "0.0"]),
        ("--learning_rate=nan", ["--learning_rate", "finite", "nan"]),
        ("--h=relu", ["--h", "tanh", "'relu'"]),
        ("--objective=vae", ["--objective", "elbo", "'vae'"]),
        ("--binarization=coin", ["--binarization", "dynamic", "'coin'"]),
        ("--dataset=cifar", ["--dataset", "cifar"]),
        ("--dataset=missing.npz", ["--dataset", "missing.npz"]),
        ("--validation=90", ["--validation", "90"]),
        ("--classes=3,x", ["--classes", "whole numbers", "3,x"]),
        ("--classes=7", ["--classes", "7"]),
        ("--flos=3", ["flos", "flows"]),
        ("--objective=reconstruction --kl_warmup=2", ["--kl_warmup", "reconstruction"]),
        ("--patience=3", ["--patience=3", "--validation"]),
        ("--train_samples=2", ["--train_samples=2", "--objective=iwae"]),
        ("--objective=iwae --kl_warmup=2", ["--kl_warmup", "iwae"]),
        ("--flows=0 --amortized", ["--amortized", "--flows=0"]),
        ("stray", ["stray"]),
        ("--workdir=/dev/null/run", ["--workdir", "/dev/null/run"]),
    ],
)
def test_bad_flags_are_refused_in_one_line_that_names_them(images, tmp_path, flag, words):
    with pytest.raises((UsageError, ArgumentError)) as caught:
        mnist.main(arguments(images, tmp_path / "run", *flag.split()))
    message = f"{'--' if caught.type is ArgumentError else ''}{caught.value}"  # as run_main shows it
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_is_left_alone(images, default, capsys):
    before = contents(default)
    mnist.main(arguments(images, default))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UsageError, match="holds a run already"):
        mnist.main(arguments(images, default, "--resume=never"))
    assert before == contents(default)


def test_from_the_shell_a_mistake_is_one_line_and_a_status_without_traceback(images, tmp_path):
    command = [sys.executable, "-m", "experiments.mnist", *arguments(images, tmp_path, "--epochs=0")]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines() == ["error: --epochs must be at least 1; got 0"]


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit) as left:
        mnist.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--flows" in shown
    assert "planar layers" in shown
