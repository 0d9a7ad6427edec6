"""The sweep over flow lengths and seeds from its command line, on a few tiny images."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import jax
import numpy as np
import pytest
from html_pages import Page
from image_runs import SHAPE, TRAIN, write_noise
from scipy.stats import t as student_t

from experiments import flow_length, mnist
from planar_vae_jax import load_run, report
from planar_vae_jax.data import ArgumentError
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit
from planar_vae_jax.runs.config import UsageError

ROOT = Path(__file__).parents[2]
TINY = ("--epochs=1", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--checkpoint_every=9")
FIGURES = ("free_energy", "nll", "reconstruction", "kl", "squared_error", "effective_sample_size")


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of three classes: two of class 0 are tested, many of class 1."""
    y_train, y_test = (np.arange(TRAIN) % 3).astype(np.uint8), np.array([0] * 2 + [1] * 17 + [2] * 11, np.uint8)
    return write_noise(tmp_path_factory.mktemp("data") / "noise.npz", y_train=y_train, y_test=y_test)


def arguments(images, workdir, *flags):
    return [*TINY, "--lengths=0,2", "--seeds=3", f"--dataset={images}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def swept(images, tmp_path_factory):
    """A sweep of two lengths and three seeds, amortised."""
    workdir = tmp_path_factory.mktemp("sweep") / "run"
    with jax.numpy_dtype_promotion("standard"):
        flow_length.main(arguments(images, workdir, "--amortized", "--seed=5"), pictures=False)
    return workdir


def read(path):
    return json.loads(path.read_text())


def timeless(content):
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if not key.startswith("seconds")}
    return content


def result(workdir):
    """All that a sweep leaves, but for its seconds."""
    names = ("table.md", "table.csv", "flow_length.png")
    runs = {path.parent.name: timeless(read(path)) for path in workdir.glob("*/summary.json")}
    return timeless(read(workdir / "summary.json")), runs, {name: (workdir / name).read_bytes() for name in names}


def test_each_run_lies_in_its_folder_as_experiments_mnist_trains_it(images, swept, tmp_path):
    names = {f"flows={flows}-seed={seed}" for flows in (0, 2) for seed in (5, 6, 7)}
    assert {path.name for path in swept.iterdir() if path.is_dir()} == names
    mnist.main(
        [*TINY, "--flows=2", "--seed=6", "--amortized", f"--dataset={images}", f"--workdir={tmp_path}"], pictures=False
    )
    assert timeless(read(tmp_path / "summary.json")) == timeless(read(swept / "flows=2-seed=6" / "summary.json"))
    run = load_run(swept / "flows=0-seed=7")
    assert (run.config["amortized"], run.model.posterior.flow_length) == (False, 0)
    assert load_run(swept / "flows=2-seed=5").model.posterior.amortized


def test_the_summary_holds_means_spreads_and_paired_differences_of_the_runs(swept):
    found = read(swept / "summary.json")
    assert (found["lengths"], found["seeds"], found["seed"]) == ([0, 2], 3, 5)
    assert [row["flows"] for row in found["rows"]] == [0, 2]
    for label in (None, "0", "1", "2"):
        for name in FIGURES:
            by_seed = {}
            for row in found["rows"]:
                summaries = [read(swept / f"flows={row['flows']}-seed={seed}" / "summary.json") for seed in (5, 6, 7)]
                values = [(one["test"] if label is None else one["per_class"][label])[name] for one in summaries]
                group = row if label is None else row["per_class"][label]
                assert group[name]["by_seed"] == values
                assert group[name]["mean"] == pytest.approx(np.mean(values))
                assert group[name]["std"] == pytest.approx(np.std(values, ddof=1))
                by_seed[row["flows"]] = np.array(values)
            differences = by_seed[2] - by_seed[0]
            reach = student_t.ppf(0.975, 2) * np.std(differences, ddof=1) / np.sqrt(3)
            minus = group["minus_first"][name]
            assert minus["mean"] == pytest.approx(np.mean(differences))
            assert minus["low"] == pytest.approx(np.mean(differences) - reach)
            assert minus["high"] == pytest.approx(np.mean(differences) + reach)
    assert found["rows"][0]["minus_first"]["nll"] == {"mean": 0, "low": 0, "high": 0}


def test_a_sweep_tells_what_its_runs_are_and_what_each_latent_dimension_carries(swept):
    found, table = read(swept / "summary.json"), (swept / "table.md").read_text()
    assert (found["binarization"], found["nats_of"]) == ("dynamic", "binary images")
    assert (found["latent"], found["optimizer"], found["amortized"]) == (2, "schedule_free", True)
    for words in ("each image its own flow", "3 seeds", "latent=2", "Nats are of binary images."):
        assert words in table
    row = found["rows"][1]
    units = [read(swept / f"flows=2-seed={seed}" / "summary.json")["active_units"] for seed in (5, 6, 7)]
    assert row["active_units"]["by_seed"] == [unit["count"] for unit in units]
    assert row["kl_by_dimension"] == [sorted(unit["kl"], reverse=True) for unit in units]
    assert f"| 2 | {np.mean(row['kl_by_dimension'], axis=0)[0]:.2f} " in table


def test_the_page_compares_the_runs_and_leads_to_theirs(swept):
    page, table = Page((swept / "report.html").read_text()), (swept / "table.md").read_text()
    for line in table.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            assert line.strip("| ").split(" | ") in page.rows
    links = [link for link in page.links if not link.startswith("#")]
    assert len(links) == 6
    for link in links:
        assert Page((swept / unquote(link)).read_text()).text.startswith(unquote(link).split("/")[0])
    assert page.png(0) == (swept / "flow_length.png").read_bytes()


def test_the_tables_hold_the_same_figures_and_there_is_a_picture(swept):
    (row,) = (row for row in read(swept / "summary.json")["rows"] if row["flows"] == 2)
    with (swept / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (4 * len(FIGURES) + 1)  # units are active over all classes alone
    (line,) = (one for one in lines if (one["class"], one["flows"], one["figure"]) == ("1", "2", "nll"))
    assert float(line["mean"]) == row["per_class"]["1"]["nll"]["mean"]
    assert float(line["high"]) == row["per_class"]["1"]["minus_first"]["nll"]["high"]
    assert [float(line[f"seed={seed}"]) for seed in (5, 6, 7)] == row["per_class"]["1"]["nll"]["by_seed"]
    table = (swept / "table.md").read_text()
    assert f"{row['free_energy']['mean']:.4g}"[:4] in table
    assert "3 seeds" in table
    assert (swept / "flow_length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [{}, {"latent": 2}, {"objective": "iwae"}, {"posterior": "full"}, {"classes": (3,)}])
def test_published_figures_stand_beside_those_of_their_setting_alone(other):
    flags = vars(flow_length.Config(**{"layers": 2, "amortized": True, **other}))
    assert report.comparable_to_published(flags, "binarized_mnist", (10_000, 28, 28)) == (not other)
    assert not report.comparable_to_published(flags, "binarized_mnist", (300, 28, 28))
    assert not report.comparable_to_published(flags, "mnist", (10_000, 28, 28))


def test_a_finished_sweep_says_so_and_more_lengths_and_seeds_go_on_with_what_there_is(images, tmp_path, capsys, caplog):
    flow_length.main(arguments(images, tmp_path, "--amortized", "--lengths=0", "--seeds=1"), pictures=False)
    alone = read(tmp_path / "summary.json")
    assert alone["rows"][0]["nll"]["std"] is None
    assert alone["rows"][0]["minus_first"]["nll"] == {"mean": 0, "low": None, "high": None}
    assert "One seed" in (tmp_path / "table.md").read_text()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("flows=*/summary.json")}
    capsys.readouterr()
    flow_length.main(arguments(images, tmp_path, "--amortized", "--lengths=0", "--seeds=1"), pictures=False)
    said = capsys.readouterr().out
    assert "is finished" in said
    assert "--eval_only" not in said  # of a single run
    flow_length.main(arguments(images, tmp_path, "--amortized", "--lengths=2,0", "--seeds=1"), pictures=False)
    with jax.log_compiles():
        flow_length.main(arguments(images, tmp_path, "--amortized", "--lengths=2,0", "--seeds=2"), pictures=False)
    assert not [line for line in caplog.messages if line.startswith("Compiling")]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "run 4 of 4" in capsys.readouterr().out
    rows = read(tmp_path / "summary.json")["rows"]
    assert [row["flows"] for row in rows] == [2, 0]
    assert rows[1]["nll"]["by_seed"][0] == alone["rows"][0]["nll"]["mean"]
    with pytest.raises(UsageError, match="--latent: 2 there, 3 here"):
        flow_length.main(arguments(images, tmp_path, "--amortized", "--latent=3"), pictures=False)


@pytest.mark.slow
def test_each_class_has_a_model_of_its_own(images, tmp_path):
    flags = ("--lengths=2", "--seeds=2", "--amortized", "--each_class", "--classes=0,2")
    flow_length.main(arguments(images, tmp_path, *flags), pictures=False)
    names = {f"classes={c}-flows=2-seed={seed}" for c in (0, 2) for seed in (0, 1)}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == names
    found = read(tmp_path / "summary.json")
    assert found["each_class"]
    (row,) = found["rows"]
    assert set(row["per_class"]) == {"0", "2"}
    tests = {c: read(tmp_path / f"classes={c}-flows=2-seed=1" / "summary.json")["test"] for c in (0, 2)}
    for name in FIGURES:
        assert row["per_class"]["2"][name]["by_seed"][1] == tests[2][name]
        assert row[name]["by_seed"][1] == pytest.approx((2 * tests[0][name] + 11 * tests[2][name]) / 13)
    assert (tmp_path / "each_class.png").read_bytes().startswith(b"\x89PNG")
    run = read(tmp_path / "classes=2-flows=2-seed=0" / "config.json")
    assert run["flags"]["classes"] == [2]


@pytest.mark.slow
def test_the_page_shows_the_first_length_above_the_last_for_each_class(images, tmp_path, monkeypatch):
    drawn = {}
    rows = report.image_rows
    monkeypatch.setattr(
        report, "image_rows", lambda found, **rest: (drawn.update({rest["title"]: found}), rows(found, **rest))[1]
    )
    flow_length.main(arguments(images, tmp_path, "--lengths=0,1,2", "--seeds=1", "--each_class"), pictures=False)
    (page,) = (found for title, found in drawn.items() if "model of their class" in title)
    assert list(page) == [f"{c}: {row}" for c in (0, 1, 2) for row in ("original", "K = 0", "K = 2")]
    with np.load(images) as arrays:
        of_class = arrays["x_test"][arrays["y_test"] == 1]
    np.testing.assert_array_equal(page["1: original"], of_class[:2] / 255.0)  # as many as the smallest class has
    assert page["2: K = 2"].shape == (2, *SHAPE)


def test_without_labels_there_are_no_classes_to_train_on(images, tmp_path):
    with np.load(images) as arrays:
        np.savez(tmp_path / "plain.npz", x_train=arrays["x_train"], x_test=arrays["x_test"])
    with pytest.raises(UsageError, match="--each_class needs labels"):
        flow_length.main(arguments(tmp_path / "plain.npz", tmp_path / "sweep", "--each_class"), pictures=False)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_stopped_by_a_signal_in_a_run_ends_as_the_sweep_in_one_go(images, swept, tmp_path, monkeypatch):
    for calls in (2, 3, 1):
        looks = iter([None] * calls)
        with monkeypatch.context() as patch:
            patch.setattr(fit.Pace, "end", lambda self, start, stop: start + 1)
            patch.setattr(signals, "requested", lambda looks=looks: next(looks, signal.SIGTERM))
            with pytest.raises(signals.Stopped):
                flow_length.main(arguments(images, tmp_path, "--amortized", "--seed=5"), pictures=False)
    flow_length.main(arguments(images, tmp_path, "--amortized", "--seed=5"), pictures=False)
    assert result(tmp_path) == result(swept)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(images, swept, tmp_path):
    program = "import sys; from experiments import flow_length; flow_length.main(sys.argv[1:], pictures=False)"
    command = [sys.executable, "-c", program]
    command += arguments(images, tmp_path, "--amortized", "--seed=5")
    run = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "flows=2-seed=5" / "config.json").exists():  # the fourth of six
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not (tmp_path / "summary.json").exists()
    flow_length.main(arguments(images, tmp_path, "--amortized", "--seed=5"), pictures=False)
    assert result(tmp_path) == result(swept)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--flows=5", ["--flows", "--lengths", "5"]),
        ("--eval_only", ["--eval_only"]),
        ("--lengths=", ["--lengths", "at least one"]),
        ("--lengths=0,2,0", ["--lengths", "none twice", "0,2,0"]),
        ("--lengths=0,2,-1", ["--lengths", "at least 0", "-1"]),
        ("--lengths=0,2,x", ["--lengths", "whole numbers", "0,2,x"]),
        ("--lengths=0,2,10001", ["--lengths", "at most 10000", "10001"]),
        ("--seeds=0", ["--seeds", "at least 1", "0"]),
        ("--seed=4294967294", ["--seed", "at most 4294967295", "4294967296"]),
        ("--hidden=0", ["--hidden", "at least 1"]),
        ("--batch_size=91", ["--batch_size", "at most the 90", "91"]),
        ("--each_class --batch_size=31", ["--batch_size", "at most the 30", "31"]),
        ("--each_class --validation=30", ["--validation", "30"]),
        ("--objective=reconstruction --kl_warmup=2", ["--kl_warmup", "reconstruction"]),
        ("--together=always", ["--together", "yes, no", "always"]),
        ("--together=yes --prng=rbg", ["--together=yes", "--prng=threefry2x32", "rbg"]),
        ("--together=yes --validation=30", ["--together=yes", "--validation"]),
        ("--together=yes --images=host", ["--together=yes", "--images=host"]),
    ],
)
def test_bad_flags_are_refused_before_any_run_begins(images, tmp_path, flag, words):
    with pytest.raises((UsageError, ArgumentError)) as caught:
        flow_length.main(arguments(images, tmp_path / "sweep", *flag.split()), pictures=False)
    message = f"{'--' if caught.type is ArgumentError else ''}{caught.value}"  # as run_main shows it
    for word in words:
        assert word in message
    assert not (tmp_path / "sweep").exists()


def test_a_run_of_other_flags_in_the_folder_is_told_before_any_begins(images, tmp_path):
    other = ["--flows=0", "--seed=2", f"--dataset={images}", f"--workdir={tmp_path / 'flows=2-seed=2'}"]
    mnist.main([*TINY, *other], pictures=False)
    with pytest.raises(UsageError, match="flows=2-seed=2 holds another run"):
        flow_length.main(arguments(images, tmp_path), pictures=False)
    assert not (tmp_path / "flows=0-seed=0").exists()
