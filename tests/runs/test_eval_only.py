"""Figures of a stored run, from any checkpoint; runs of other versions and other code."""

import json

import jax
import pytest
import toy
from running import contents, result, start, stop

from planar_vae_jax.runs import fit
from planar_vae_jax.runs.checkpoints import read_checkpoint
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


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
    summary = json.loads((stopped / "step-10-samples=2" / "summary.json").read_text())  # in the third epoch
    assert (summary["epochs"], summary["samples"]) == (2, 2)
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["distance"])["epoch"]
    start(stopped, "--eval_only", "--checkpoint=best")
    summary = json.loads((stopped / f"epoch-{best}" / "summary.json").read_text())
    assert summary["epochs"] == best
    leaf = read_checkpoint(stopped / "checkpoints", 4 * best).leaves["state.params.w"]
    assert summary["w"] == leaf.tolist()
    assert before.items() <= contents(stopped).items()


def test_a_finished_run_with_other_evaluation_flags_is_evaluated_beside(tmp_path):
    start(tmp_path)
    before = contents(tmp_path)
    start(tmp_path, "--eval_only", "--samples=2")
    assert json.loads((tmp_path / "epoch-3-samples=2" / "summary.json").read_text())["samples"] == 2
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
        fit.fit(run, toy.loss, None, None, jax.random.key(0), steps=12, steps_per_epoch=4)
    with pytest.raises(UsageError, match="needs a checkpoint with a score"):
        start(tmp_path, "--eval_only", "--checkpoint=best")


# --- Other versions, other code


def rewrite_config(workdir, change):
    """Changes the stored config of a run in place."""
    config = json.loads((workdir / "config.json").read_text())
    change(config)
    (workdir / "config.json").write_text(json.dumps(config))


def test_other_versions_are_a_warning(stopped, capsys):
    def change(config):
        assert config["layout"] == 3
        assert {"planar_vae_jax", "jax", "orbax-checkpoint"} <= set(config["versions"])
        config["versions"] |= {"jax": "0.0.1", "something": "1.0"}

    rewrite_config(stopped, change)
    start(stopped)
    err = capsys.readouterr().err
    assert "jax 0.0.1 there" in err
    assert max(len(line) for line in err.splitlines() if str(stopped) not in line) < 80  # a path is not broken


@pytest.mark.parametrize("layout", [1, 2, 4])
def test_a_folder_of_another_layout_is_refused_in_one_line(stopped, layout):
    rewrite_config(stopped, lambda config: config.update(layout=layout))
    before = contents(stopped)
    for flags in ((), ("--eval_only",)):
        with pytest.raises(UsageError) as error:
            start(stopped, *flags)
        words = (
            rf"config.json is of another version of planar_vae_jax (layout {layout}, this one reads 3); name another"
        )
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert contents(stopped) == before
    start(stopped, "--overwrite", "--epochs=1")


def test_a_config_without_a_layout_is_of_the_first_version(stopped):
    rewrite_config(stopped, lambda config: config.pop("layout"))
    with pytest.raises(UsageError, match=r"\(layout 1, this one reads 3\)"):
        start(stopped)


def test_a_flag_that_a_config_lacks_had_its_default(stopped):
    rewrite_config(stopped, lambda config: config["flags"].pop("rate"))
    with pytest.raises(UsageError, match=r"--rate: 0\.1 there, 0\.2 here"):
        start(stopped, "--rate=0.2")
    start(stopped)


CHANGED = {"toy.py": "toy.py changed since", "planar_vae_jax": "planar_vae_jax changed since"}


@pytest.mark.parametrize("name", CHANGED)
def test_code_that_has_changed_is_a_warning_that_resume_always_accepts(stopped, capsys, name, whole):
    rewrite_config(stopped, lambda config: config["code"].update({name: config["code"][name] ^ 1}))

    def warning(*flags):
        start(stopped, *flags)
        return " ".join(capsys.readouterr().err.split())

    found = warning()
    assert f"{CHANGED[name]} the run in {stopped} was begun" in found
    assert "--resume=always accepts the change" in found
    assert result(stopped) == whole()
    assert CHANGED[name] in warning()  # the run is finished, and its figures are of the other program
    assert CHANGED[name] not in warning("--resume=always", "--epochs=4")
    assert CHANGED[name] not in warning("--epochs=4")  # from now on, the code is the stored one


def test_code_of_a_file_that_a_config_lacks_is_no_change(stopped, capsys):
    rewrite_config(stopped, lambda config: config["code"].clear())
    start(stopped)
    assert "changed" not in capsys.readouterr().err
