"""Sweeps: every combination in a folder of its own; seeds together give what they give alone."""

import json
import shutil

import numpy as np
import pytest
import toy

from planar_vae_jax.runs import sweep
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.runs.devices import one_device
from planar_vae_jax.runs.folder import open_run
from planar_vae_jax.runs.sweep import Together


def train(config):
    """One run of the toy experiment; its summary."""
    with open_run(config, "toy", toy.identity(config)) as run:
        if not run.finished:
            fitted = toy.fit(run, **start(config))
            run.finish({"epochs": len(fitted.lines), "w": np.asarray(fitted.params["w"]).tolist()})
        return json.loads((run.workdir / "summary.json").read_text())


def start(config):
    return toy.arguments(config) | {"score": None, "patience": 0}


def together():
    return Together("toy", toy.identity(toy.Config()), one_device(), start)


OVER = {"rate": (0.1, 0.05), "seed": range(2)}


def swept(workdir, *, over=OVER, how=None, **flags):
    return sweep.sweep(toy.Config(workdir=str(workdir), **flags), over, train, together=how)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of a sweep whose runs train one after the other."""
    return swept(tmp_path_factory.mktemp("alone") / "sweep")


def assert_same(actual, desired):
    for (values, summary), (wanted, expected) in zip(actual, desired, strict=True):
        assert values == wanted
        assert summary["epochs"] == expected["epochs"]
        np.testing.assert_allclose(summary["w"], expected["w"], rtol=1e-5)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def test_each_combination_has_a_folder_and_the_last_flag_varies_fastest(tmp_path, alone):
    assert [values for values, _ in alone] == [{"rate": rate, "seed": seed} for rate in (0.1, 0.05) for seed in (0, 1)]
    assert_same(swept(tmp_path), alone)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["rate=0.05-seed=0", "rate=0.05-seed=1", "rate=0.1-seed=0", "rate=0.1-seed=1"]


def test_seeds_together_give_what_each_gives_alone_in_folders_of_their_own(tmp_path, alone):
    assert_same(swept(tmp_path / "together", how=together()), alone)
    swept(tmp_path / "alone")
    for values, _ in alone:
        name = f"rate={values['rate']}-seed={values['seed']}"
        for one, other in zip(lines(tmp_path / "together" / name), lines(tmp_path / "alone" / name), strict=True):
            assert one.keys() == other.keys()
            for figure, value in one.items():
                assert value == (other[figure] and pytest.approx(other[figure], rel=1e-4, abs=1e-6)), figure
    assert not list((tmp_path / "together").glob("*seeds=*"))


def test_more_seeds_and_more_epochs_add_to_what_is_there(tmp_path):
    over = {"seed": range(2)}
    first = swept(tmp_path, over=over, how=together())
    more = swept(tmp_path, over={"seed": range(4)}, how=together())
    assert more[:2] == first
    longer = swept(tmp_path, over={"seed": range(4)}, how=together(), epochs=5)
    assert_same(longer, swept(tmp_path / "alone", over={"seed": range(4)}, epochs=5))


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def test_a_group_killed_while_it_trains_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    over = {"seed": range(2)}
    whole = swept(tmp_path / "whole", over=over, how=together())
    write = sweep.fit.__globals__["append_json_line"]

    def append(path, line):
        write(path, line)
        if line["epoch"] == 2:
            raise Killed

    monkeypatch.setitem(sweep.fit.__globals__, "append_json_line", append)
    with pytest.raises(Killed):
        swept(tmp_path / "run", over=over, how=together())
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["seeds=0+1"]
    assert swept(tmp_path / "run", over={"seed": range(3)}, how=together())[:2] == whole  # a seed more was asked for


def test_a_group_killed_while_it_hands_out_loses_nothing(tmp_path, monkeypatch):
    over = {"seed": range(2)}
    whole = swept(tmp_path / "whole", over=over, how=together())

    def killed(path):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        swept(tmp_path / "run", over=over, how=together())
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run" / "seed=1")  # as if it had been killed before this one
    assert swept(tmp_path / "run", over=over, how=together()) == whole


def test_what_cannot_be_swept_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--seed must be at least 0; got -1"):
        swept(tmp_path, over={"seed": (0, -1)})
    scored = together()._replace(start=toy.arguments)
    with pytest.raises(UsageError, match="--together=yes needs images on the device and no validation images"):
        swept(tmp_path, how=scored)
    assert not list(tmp_path.iterdir())
