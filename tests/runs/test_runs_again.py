"""Figures of a run again, from any checkpoint; runs of other versions."""

import json
import shutil
from pathlib import Path

import pytest
import toy
from running import OneStep, contents, result, start, stop

from planar_vae_jax.runs import fit, signals
from planar_vae_jax.runs.checkpoints import CheckpointError, read_checkpoint
from planar_vae_jax.runs.config import UsageError

OLD_RUN = Path(__file__).parents[1] / "old_run"  # the smallest real one of version 0.1


@pytest.fixture(autouse=True)
def one_step_at_a_time(monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    monkeypatch.setattr(signals, "advice", signals.advice)


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "Pace", OneStep)
        stop(workdir, 12)  # in the third epoch
    return workdir


@pytest.fixture
def stopped(_stopped, tmp_path):
    """The folder of a run that was stopped; a copy of one's own."""
    return shutil.copytree(_stopped, tmp_path / "run")


# --- Figures again


def test_a_finished_run_is_left_alone_and_eval_only_makes_its_summary_again(tmp_path, capsys):
    start(tmp_path)
    before, expected = contents(tmp_path), result(tmp_path)
    capsys.readouterr()
    start(tmp_path, "--keep=7")
    assert "is finished" in capsys.readouterr().out
    assert contents(tmp_path) == before
    (tmp_path / "summary.json").unlink()
    start(tmp_path, "--eval_only")  # no other flag
    assert result(tmp_path) == expected
    assert set(contents(tmp_path)) == set(before)


def test_eval_only_of_another_checkpoint_writes_beside_the_run(stopped):
    before = contents(stopped)
    start(stopped, "--eval_only", "--samples=2")
    summary = json.loads((stopped / "step-10" / "summary.json").read_text())  # in the third epoch
    assert (summary["epochs"], summary["samples"]) == (2, 2)
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["distance"])["epoch"]
    start(stopped, "--eval_only", "--checkpoint=best")
    summary = json.loads((stopped / f"epoch-{best}" / "summary.json").read_text())
    assert summary["epochs"] == best
    leaf = read_checkpoint(stopped / "checkpoints", 4 * best).leaves["['state'].params['w']"]
    assert summary["w"] == leaf.tolist()
    assert before.items() <= contents(stopped).items()


def test_a_finished_run_with_other_evaluation_flags_is_evaluated_beside(tmp_path):
    start(tmp_path)
    before = contents(tmp_path)
    start(tmp_path, "--eval_only", "--samples=2")
    assert json.loads((tmp_path / "epoch-3" / "summary.json").read_text())["samples"] == 2
    assert before.items() <= contents(tmp_path).items()


def test_eval_only_needs_a_whole_epoch_and_best_a_score(tmp_path):
    stop(tmp_path, 2)
    with pytest.raises(UsageError, match=r"--eval_only needs a whole epoch; .* is at step 2 of its first"):
        start(tmp_path, "--eval_only")
    config = toy.Config(workdir=str(tmp_path), eval_only=True, checkpoint="best")
    with (
        toy.open_run(config, "toy") as run,
        pytest.raises(UsageError, match="--checkpoint=best needs a run with --vali"),
    ):
        fit.fit(run, toy.loss, None, None, None, steps=12, steps_per_epoch=4)
    with pytest.raises(UsageError, match="needs a checkpoint with a score"):
        start(tmp_path, "--eval_only", "--checkpoint=best")


# --- Other versions


def test_other_versions_go_on_with_a_warning(stopped, capsys):
    config = json.loads((stopped / "config.json").read_text())
    assert config["layout"] == 2
    assert {"planar_vae_jax", "jax", "orbax-checkpoint"} <= set(config["versions"])
    config["versions"]["jax"] = "0.0.1"
    config["versions"]["something"] = "1.0"
    (stopped / "config.json").write_text(json.dumps(config))
    start(stopped)
    err = capsys.readouterr().err
    assert "jax 0.0.1 there" in err
    assert max(len(line) for line in err.splitlines() if str(stopped) not in line) < 80  # a path is not broken


def test_a_newer_layout_is_refused(stopped):
    config = json.loads((stopped / "config.json").read_text()) | {"layout": 3}
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"config\.json is of a newer version of planar_vae_jax \(layout 3, not 2\)"):
        start(stopped)


def test_a_flag_that_a_config_lacks_had_its_default_then(stopped):
    config = json.loads((stopped / "config.json").read_text())
    del config["flags"]["rate"]
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"--rate: 0\.1 there, 0\.2 here"):
        start(stopped, "--rate=0.2")
    start(stopped)


@pytest.fixture
def old_run(tmp_path):
    """A real run of version 0.1, said to be of the toy."""
    workdir = shutil.copytree(OLD_RUN, tmp_path / "old")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"experiment": "toy"}))
    return workdir


def test_a_run_of_version_0_1_is_read(old_run):
    before = contents(old_run)
    found = read_checkpoint(old_run / "checkpoints")
    assert found.step == found.leaves["['state'].step"] == 200
    assert found.leaves["['state'].params.flow.u"].shape == (4, 2)
    assert found.leaves["['state'].opt_state[0].mu.flow.w"].dtype == "float32"
    assert str(found.leaves["['key']"].dtype) == "key<fry>"
    assert found.meta["unit"] == len(found.meta["lines"]) == 25
    assert read_checkpoint(old_run / "checkpoints", "best").step == 200
    assert contents(old_run) == before


def test_a_run_of_version_0_1_does_not_go_on_and_is_not_taken_for_damage(old_run):
    before = contents(old_run)
    with pytest.raises(UsageError, match=r"holds a run of version 0\.1.* cannot go on; .*--eval_only still reads it"):
        start(old_run)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/200 is of another model: wanted \['state'\]\.params\['b'\]"
    ):
        start(old_run, "--eval_only")
    assert contents(old_run) == before
