"""Early stopping, on the toy run: when a run ends, what it leaves, and that being killed changes nothing."""

import json

import pytest
import toy
from running import Killed, contents, result, start, steps, stop

from planar_vae_jax.runs import fit
from planar_vae_jax.runs.checkpoints import read_checkpoint

PATIENT = ("--epochs=20", "--patience=3")  # the toy's distance is lowest after epoch 6 of these 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    start(workdir, *PATIENT)
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.parametrize(
    ("scores", "best", "over"),
    [
        ([], 0, False),
        ([3.0], 1, False),
        ([3.0, 2.0, 2.0], 2, False),
        ([3.0, 2.0, 2.0, 2.5], 2, True),  # an equal one is not better
        ([3.0, 2.0, None, 1.0], 4, False),  # neither is one that is not finite
        ([None, None], 0, True),
    ],
)
def test_a_run_is_over_after_so_many_epochs_without_a_better_score(scores, best, over):
    found = [{"loss": score} for score in scores]
    stopping = fit._Stopping("loss", 2)
    assert (stopping.best(found), stopping.is_over(found)) == (best, over)
    assert not fit._Stopping("loss", 0).is_over(found)
    assert not fit._Stopping(None, 0).wants_checkpoint(found)


def test_a_run_ends_early_with_the_figures_of_its_best_checkpoint(whole):
    distances = [line["distance"] for line in lines(whole)]
    best = 1 + distances.index(min(distances))
    assert best == len(distances) - 3 < 17
    found = summary(whole)
    assert (found["stopped_early"], found["epochs"], found["best_epoch"]) == (True, len(distances), best)
    assert sum((weight - 1.0) ** 2 for weight in found["w"]) == pytest.approx(min(distances), rel=1e-5)


def test_the_best_and_the_last_state_are_saved_whatever_checkpoint_every_says(whole, tmp_path):
    start(tmp_path, *PATIENT, "--checkpoint_every=5", "--keep=1")
    assert result(tmp_path)["summary"] == result(whole)["summary"]
    assert steps(tmp_path) == [toy.STEPS * summary(whole)["best_epoch"], toy.STEPS * summary(whole)["epochs"]]


def test_a_run_that_does_not_end_early_has_the_figures_of_its_best_checkpoint_too(whole, tmp_path):
    start(tmp_path, "--epochs=7", "--patience=3")
    found = summary(tmp_path)
    assert (found["stopped_early"], found["epochs"], found["best_epoch"]) == (False, 7, 6)
    assert found["w"] == summary(whole)["w"]
    start(tmp_path, *PATIENT)  # and is resumed
    assert result(tmp_path) == result(whole)


def test_more_epochs_alone_do_not_resume_it_but_a_greater_patience_does(whole, tmp_path, capsys):
    start(tmp_path, *PATIENT)
    before = contents(tmp_path)
    start(tmp_path, "--epochs=30", "--patience=3")
    assert "is finished" in capsys.readouterr().out
    assert contents(tmp_path) == before
    for patience in (5, 2):  # and a smaller one takes nothing back
        start(tmp_path, "--epochs=30", f"--patience={patience}")
        greater = summary(tmp_path)
        assert greater["epochs"] > summary(whole)["epochs"]
        assert greater["patience"] == patience
    in_one_go = tmp_path / "in-one-go"
    start(in_one_go, "--epochs=30", "--patience=5")
    assert lines_without_seconds(in_one_go) == lines_without_seconds(tmp_path)
    assert summary(in_one_go)["w"] == greater["w"]


def lines_without_seconds(workdir):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(workdir)]


@pytest.mark.parametrize("answers", [1, 13, 30, 41, 44])
def test_stopped_by_a_signal_anywhere_it_ends_at_the_same_epoch(whole, tmp_path, one_step_at_a_time, answers):
    stop(tmp_path, answers, *PATIENT)
    start(tmp_path, *PATIENT)
    assert result(tmp_path) == result(whole)


@pytest.mark.parametrize("epoch", [1, 6, 7, 9])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_as_it_saves_it_ends_at_the_same_epoch(whole, tmp_path, monkeypatch, epoch, when):
    """After the line of metrics, before the checkpoint that counts on it; or right after that."""
    save = fit._Training.save

    def killed(training, score=None):
        if training.done.epoch != epoch:
            return save(training, score)
        if when == "after":
            save(training, score)
            training.checkpoints.wait()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit._Training, "save", killed)
        with pytest.raises(Killed):
            start(tmp_path, *PATIENT)
    start(tmp_path, *PATIENT)
    assert result(tmp_path) == result(whole)


def test_eval_only_draws_the_best_again_and_the_latest_beside(whole, tmp_path):
    start(tmp_path, *PATIENT)
    before = result(tmp_path)
    (tmp_path / "summary.json").unlink()
    start(tmp_path, "--eval_only")
    assert result(tmp_path) == before
    start(tmp_path, "--eval_only", "--checkpoint=latest")
    beside = summary(tmp_path / f"epoch-{before['summary']['epochs']}")
    newest = read_checkpoint(tmp_path / "checkpoints").leaves["state.params.w"]
    assert beside["w"] == newest.tolist() != before["summary"]["w"]
    assert beside["best_epoch"] == before["summary"]["epochs"]


def test_eval_only_of_a_run_under_way_writes_beside_it(tmp_path, one_step_at_a_time):
    stop(tmp_path, 14, *PATIENT)  # in its third or fourth epoch
    start(tmp_path, "--eval_only")
    assert not (tmp_path / "summary.json").exists()
    (folder,) = tmp_path.glob("epoch-*")
    assert not summary(folder)["stopped_early"]


def test_patience_needs_a_score(tmp_path):
    with pytest.raises(ValueError, match="patience needs a score"):
        fit.fit(None, None, None, {}, None, steps=1, steps_per_epoch=1, patience=3)
