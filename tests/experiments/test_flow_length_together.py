"""A sweep whose seeds train together: its figures are those of seeds alone, and a stop changes no bit."""

import json

import jax
import pytest
from image_runs import write_bars
from running import OneStep, stopped_after

from experiments import flow_length
from planar_vae_jax import load_run
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit

pytestmark = pytest.mark.usefixtures("standard_promotion")
TINY = ("--epochs=2", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--seeds=2", "--amortized")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz")


def sweep(images, workdir, *flags):
    flow_length.main([*TINY, "--lengths=2", f"--dataset={images}", f"--workdir={workdir}", *flags], pictures=False)


@pytest.fixture(scope="module")
def together(images, tmp_path_factory):
    """A sweep of two seeds that train together."""
    workdir = tmp_path_factory.mktemp("together") / "sweep"
    with jax.numpy_dtype_promotion("standard"):
        sweep(images, workdir, "--together=yes")
    return workdir


def read(path):
    return json.loads(path.read_text())


def runs(workdir):
    return sorted(path.parent for path in workdir.glob("*/summary.json"))


def numbers(content):
    """Every number of a summary or a line but seconds, in order."""
    if isinstance(content, dict):
        return [one for name, value in content.items() if "seconds" not in name for one in numbers(value)]
    if isinstance(content, list):
        return [one for value in content for one in numbers(value)]
    return [content] if isinstance(content, int | float) else []


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_each_seed_gets_a_folder_of_its_own_with_the_figures_that_it_has_alone(images, together, tmp_path):
    sweep(images, tmp_path)
    names = ["flows=2-seed=0", "flows=2-seed=1"]
    assert sorted(path.name for path in together.iterdir() if path.is_dir()) == names
    assert [path.name for path in runs(tmp_path)] == names
    for ours, theirs in zip(runs(together), runs(tmp_path), strict=True):
        assert [line.keys() for line in lines(ours)] == [line.keys() for line in lines(theirs)]
        assert numbers(lines(ours)) == pytest.approx(numbers(lines(theirs)), rel=1e-4, abs=1e-5)
        assert numbers(read(ours / "summary.json")) == pytest.approx(
            numbers(read(theirs / "summary.json")), rel=1e-3, abs=1e-4
        )
    rows = [numbers(read(one / "summary.json")["rows"]) for one in (together, tmp_path)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-2, abs=1e-3)
    assert [load_run(path).config["seed"] for path in runs(together)] == [0, 1]


def test_a_stop_changes_no_bit(images, together, tmp_path, monkeypatch, capsys):
    for answers in (0, 7):
        with monkeypatch.context() as patch:
            patch.setattr(fit, "Pace", OneStep)
            with stopped_after(answers), pytest.raises(signals.Stopped):
                sweep(images, tmp_path, "--together=yes")
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["flows=2-seeds=0+1"]
    capsys.readouterr()
    sweep(images, tmp_path, "--together=yes")
    assert "flows=2-seeds=0+1 after epoch 1" in capsys.readouterr().out
    for ours, theirs in zip(runs(tmp_path), runs(together), strict=True):
        assert numbers(lines(ours)) == numbers(lines(theirs))
        assert numbers(read(ours / "summary.json")) == numbers(read(theirs / "summary.json"))
    assert read(tmp_path / "summary.json")["rows"] == read(together / "summary.json")["rows"]
