"""Sweeps whose seeds are trained together: the figures are those of seeds alone; what is chosen is told and kept."""

import dataclasses
import json
import re

import pytest
from image_runs import write_bars
from running import OneStep, stopped_after

from experiments import flow_length
from planar_vae_jax import load_run
from planar_vae_jax.runs import _files as files
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import choice, processes, together
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import one_device

pytestmark = pytest.mark.usefixtures("standard_promotion")
TINY = ("--epochs=2", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--seeds=2")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("data") / "bars.npz")


def sweep(images, workdir, *flags):
    flow_length.main([*TINY, "--lengths=2", f"--dataset={images}", f"--workdir={workdir}", *flags], pictures=False)


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


def assert_same(workdir, other):
    assert [path.name for path in runs(workdir)] == [path.name for path in runs(other)]
    for ours, theirs in zip(runs(workdir), runs(other), strict=True):
        assert numbers(lines(ours)) == pytest.approx(numbers(lines(theirs)), rel=1e-4, abs=1e-5)
        assert numbers(read(ours / "summary.json")) == pytest.approx(
            numbers(read(theirs / "summary.json")), rel=1e-3, abs=1e-4
        )
    rows = [numbers(read(one / "summary.json")["rows"]) for one in (workdir, other)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-2, abs=1e-3)


def test_figures_are_those_of_seeds_alone_and_a_stop_changes_no_bit(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "SECONDS", 0.002)
    shared = ("--amortized", "--validation=30", "--patience=1")
    sweep(images, tmp_path / "alone", "--together=no", *shared)
    sweep(images, tmp_path / "together", "--together=yes", *shared)
    assert_same(tmp_path / "together", tmp_path / "alone")
    assert [load_run(path, "best").config["seed"] for path in runs(tmp_path / "together")] == [0, 1]
    capsys.readouterr()
    for calls in (0, 4):
        with monkeypatch.context() as patch:
            patch.setattr(together, "Pace", OneStep)
            with stopped_after(calls), pytest.raises(signals.Stopped):
                sweep(images, tmp_path / "stopped", *shared)
        if not calls:
            measured = read(tmp_path / "stopped" / "together.json")["flows=2"]
            files.write_json(tmp_path / "stopped" / "together.json", {"flows=2": {**measured, "together": True}})
    assert measured["seeds"] == 2
    assert measured["together"] == (choice.GAIN * measured["milliseconds_together"] < measured["milliseconds_alone"])
    sweep(images, tmp_path / "stopped", *shared)
    said = capsys.readouterr().out
    assert re.search(r"flows=2: \S+ ms a step and seed alone, \S+ for 2 seeds together: (seeds tog|one seed)", said)
    assert said.count("flows=2: seeds together, as before") == 2
    for ours, theirs in zip(runs(tmp_path / "stopped"), runs(tmp_path / "together"), strict=True):
        assert numbers(lines(ours)) == numbers(lines(theirs))
        assert numbers(read(ours / "summary.json")) == numbers(read(theirs / "summary.json"))
    assert read(tmp_path / "stopped" / "summary.json")["trained_together"]["flows=2"] == {**measured, "together": True}


def choose(path, asked="auto", obstacle=None, timing=(0.001, 0.0005)):
    def measure():
        return choice.Timing(*timing)

    here = dataclasses.replace(one_device(), size=4)
    return choice.Choices(path, asked).together("flows=5", here, here, measure, obstacle)


@pytest.mark.parametrize(
    ("timing", "told", "chosen"),
    [
        (
            (0.00183, 0.00203),
            "1.83 ms a step and seed alone, 2.03 for 4 seeds together: one seed after the other",
            False,
        ),
        ((0.001, 0.0005), "1 ms a step and seed alone, 0.5 for 4 seeds together: seeds together", True),
        ((0.001, 0.00096), "1 ms a step and seed alone, 0.96 for 4 seeds together: one seed after the other", False),
    ],
    ids=str,
)
def test_what_is_faster_is_told_and_kept(tmp_path, capsys, timing, told, chosen):
    path = tmp_path / "together.json"
    assert choose(path, timing=timing) == chosen
    assert capsys.readouterr().out == f"\nflows=5: {told}\n"
    made = read(path)["flows=5"]
    assert (made["together"], made["seeds"], made["kind"], made["devices"]) == (chosen, 4, "cpu", [1, 1])
    assert [made["milliseconds_alone"], made["milliseconds_together"]] == pytest.approx([1e3 * x for x in timing])


def test_where_seeds_cannot_be_together_auto_says_so_and_yes_is_an_error(tmp_path, monkeypatch, capsys):
    path = tmp_path / "together.json"
    assert not choose(path, "auto", "with --prng=rbg seeds together draw other numbers")
    told = "one seed after the other: with --prng=rbg seeds together draw other numbers"
    assert capsys.readouterr().out == f"\nflows=5: {told}\n"
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert not choose(path)
    with pytest.raises(UsageError, match="--together=yes is not possible: a run in several processes"):
        choose(path, "yes")
    assert not path.exists()


def test_a_choice_stands_until_the_flag_or_the_device_is_another(tmp_path, capsys):
    path = tmp_path / "together.json"
    assert choose(path)
    assert not choose(path, "no")
    assert not choose(path)
    assert "one seed after the other, as before" in capsys.readouterr().out
    files.write_json(path, {"flows=5": {**read(path)["flows=5"], "devices": [8, 4]}})
    assert choose(path)
    path.write_text("{damaged")
    assert choose(path)
    assert read(path)["flows=5"]["together"] is True
