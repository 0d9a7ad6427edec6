"""The density experiment on points, from its command line."""

import json
import re
from html import unescape

import jax
import numpy as np
import pytest
from html_pages import Page, missing
from running import OneStep, result, stopped_after, timeless

from experiments import density
from planar_vae_jax import Planar, PlanarDensity
from planar_vae_jax.data import read_points
from planar_vae_jax.flows.targets import get_target
from planar_vae_jax.runs import fit
from planar_vae_jax.runs._signals import Stopped
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("standard_promotion")

FILES = {
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "density.npz",
    "loss.png",
    "checkpoints",
    ".lock",
}
ON_THE_PLANE = {"density.png", "layers.png"}
TINY = ("--flows=2", "--steps=6", "--batch_size=8")


def bent(count, dim):
    x = np.random.default_rng(0).normal(size=(count, dim))
    x[:, -1] += x[:, 0] ** 2
    return 1e3 + x * 10.0 ** np.arange(dim)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("points") / "bent.npy"
    np.save(path, bent(80, 2).astype(np.float32))
    return path


def run(target, workdir, *flags):
    density.main([f"--target={target}", *TINY, f"--workdir={workdir}", *flags])
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def plain(file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(file, workdir)
    return workdir


def stored_density(workdir):
    fitted = np.load(workdir / "density.npz")
    layers, affine = Planar(fitted["u"], fitted["w"], fitted["b"]), (fitted["loc"], fitted["log_scale"])
    return PlanarDensity(layers, *affine, h=str(fitted["h"]), inverted=bool(fitted["inverted"]))


def check_figures(workdir, points):
    """The figures are those of the stored density at the test points, in both units."""
    figures = json.loads((workdir / "summary.json").read_text())["test"]
    log_p = np.asarray(stored_density(workdir).log_prob(points.test.astype(np.float32)), np.float64)
    assert figures["log_likelihood"] == pytest.approx(np.mean(log_p), abs=2e-2)
    assert figures["log_likelihood_se"] == pytest.approx(np.std(log_p, ddof=1) / np.sqrt(len(log_p)), rel=2e-2)
    shift = figures["standardised_log_likelihood"] - figures["log_likelihood"]
    assert shift == pytest.approx(np.sum(np.log(np.std(points.train, axis=0))), abs=1e-9)
    assert figures["standardised_log_likelihood_se"] == pytest.approx(figures["log_likelihood_se"], rel=1e-9)


def test_points_on_the_plane(plain, file):
    assert {path.name for path in plain.iterdir()} == FILES | ON_THE_PLANE
    summary = json.loads((plain / "summary.json").read_text())
    expected = {"target": str(file), "flows": 2, "steps": 6, "seed": 0, "direction": "density", "dim": 2}
    assert {name: summary[name] for name in expected} == expected
    assert summary["points"] == {"train": 48, "validation": 16, "test": 16}
    assert stored_density(plain).inverted
    check_figures(plain, read_points(file))


def test_the_validation_points_choose_the_checkpoint(plain):
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["validation_loss"])
    assert json.loads((plain / "summary.json").read_text())["best_step"] == best["step"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_page_has_every_figure_and_picture_and_the_code_that_loads_the_density(plain):
    html = (plain / "report.html").read_text()
    page = Page(html)
    assert missing(page, json.loads((plain / "summary.json").read_text())) == []
    pictures = {(plain / name).read_bytes() for name in {"loss.png", *ON_THE_PLANE}}
    assert {page.png(number) for number in range(3)} == pictures
    (code,) = re.findall(r"<code>(from pathlib.*?)</code>", html, re.DOTALL)
    found = {}
    exec(unescape(code), found)
    np.testing.assert_array_equal(found["density"].params.u, stored_density(plain).params.u)


def test_figures_are_drawn_again_and_a_finished_run_is_left_alone(plain, file, capsys):
    before = timeless(json.loads((plain / "summary.json").read_text()))
    density.main(["--eval_only", f"--workdir={plain}"])
    assert timeless(json.loads((plain / "summary.json").read_text())) == before
    capsys.readouterr()
    run(file, plain)
    assert "is finished" in capsys.readouterr().out


def test_a_stopped_run_ends_as_an_uninterrupted_one(plain, file, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    with stopped_after(3), pytest.raises(Stopped):
        run(file, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    run(file, tmp_path)
    assert result(tmp_path) == result(plain)


@pytest.mark.parametrize("dim", [1, 3])
def test_points_off_the_plane_in_the_sampling_direction(tmp_path, dim):
    np.save(tmp_path / "points.npy", bent(60, dim))
    workdir = tmp_path / "run"
    summary = run(tmp_path / "points.npy", workdir, "--direction=sampling", "--h=softsign", "--seed=3")
    assert {path.name for path in workdir.iterdir()} == FILES | {"pairs.png"}
    assert (summary["dim"], summary["direction"]) == (dim, "sampling")
    assert not stored_density(workdir).inverted
    check_figures(workdir, read_points(tmp_path / "points.npy"))


def test_points_of_a_target_are_compared_with_their_density(tmp_path, monkeypatch):
    monkeypatch.setattr(density, "DRAWN", 48)
    summary = run("circles", tmp_path, "--flows=0")
    figures = summary["test"]
    points = density.drawn_points("circles", seed=0)
    log_p = np.asarray(get_target("circles").log_density(points.test.astype(np.float32)), np.float64)
    assert figures["truth_log_likelihood"] == pytest.approx(np.mean(log_p), abs=1e-4)
    assert figures["kl"] == pytest.approx(figures["truth_log_likelihood"] - figures["log_likelihood"], abs=1e-9)
    check_figures(tmp_path, points)
    assert {path.name for path in tmp_path.iterdir()} == FILES | ON_THE_PLANE


def test_an_epoch_has_enough_copies_of_few_points_and_the_batch_fits(tmp_path, file):
    density.main([f"--target={file}", "--flows=0", "--steps=250", f"--workdir={tmp_path}"])
    flags = json.loads((tmp_path / "config.json").read_text())["flags"]
    assert flags["batch_size"] == 48 // 4  # by default
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:2] == [3, 6]
    figures = json.loads((tmp_path / "summary.json").read_text())["test"]
    points = read_points(file)
    # Without layers, this is a normal density, which standardised points have already fitted best.
    normal = -0.5 * (np.mean(np.sum(points.standardised(points.test, np.float64) ** 2, -1)) + 2 * np.log(2 * np.pi))
    assert figures["standardised_log_likelihood"] == pytest.approx(normal, abs=0.1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target=nothing", ["--target", "two_moons, circles", "FILE.npy", "'nothing'"]),
        ("--target=none.npy", ["--target", "none.npy", "No such file"]),
        ("--target=FILE --direction=up", ["--direction", "density, sampling", "'up'"]),
        ("--target=U1 --direction=density", ["--direction", "two_moons, circles, eight_gaussians, FILE.npy", "U1"]),
        ("--target=FILE --anneal_steps=2", ["--anneal_steps", "mixture, U1, U2, U3, U4", "bent.npy"]),
        ("--target=FILE --learn_base", ["--learn_base", "mixture", "bent.npy"]),
        ("--target=FILE --scale=2", ["--scale", "mixture", "2.0"]),
        ("--target=FILE --batch_size=49", ["--batch_size", "48 training points of bent", "49"]),
        ("--target=FILE --steps=0", ["--steps", "at least 1"]),
        ("--target=FILE --checkpoint=best", ["--checkpoint", "--eval_only"]),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(file, tmp_path, flags, words):
    with pytest.raises(UsageError) as caught:
        density.main([*TINY, f"--workdir={tmp_path / 'run'}", *flags.replace("FILE", str(file)).split()])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_other_points_under_the_same_name_are_another_run(plain, file, tmp_path):
    np.save(tmp_path / "bent.npy", bent(80, 2)[::-1].astype(np.float32))
    (tmp_path / "run").mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["flags"]["target"] = str(tmp_path / "bent.npy")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"holds another run .*other data: bent from"):
        run(tmp_path / "bent.npy", tmp_path / "run")
