"""``--init_from``: a training that starts from the parameters of another run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from running import contents, result, start, stop
from seeds import train

from planar_vae_jax.runs.checkpoints import fill_params, read_checkpoint
from planar_vae_jax.runs.config import UsageError


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of another run."""
    workdir = tmp_path_factory.mktemp("other") / "run"
    start(workdir, "--seed=7")
    return workdir


def weights(workdir):
    return json.loads((workdir / "summary.json").read_text())["w"]


def first_distance(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["first_distance"]


def distance(weights):
    return sum((weight - 1.0) ** 2 for weight in weights)


def test_training_starts_from_the_newest_parameters_of_the_other_run(tmp_path, other):
    before = contents(other)
    start(tmp_path / "run", f"--init_from={other}")
    assert first_distance(tmp_path / "run") == pytest.approx(distance(weights(other)), rel=1e-5)
    assert first_distance(tmp_path / "run") != pytest.approx(3.0)  # of the parameters that are passed to fit
    assert contents(other) == before


@pytest.mark.usefixtures("one_step_at_a_time")
@pytest.mark.parametrize("answers", [2, 7])  # in the first epoch, in the second
def test_a_resumed_run_is_the_uninterrupted_one_and_after_an_epoch_needs_the_other_run_no_more(
    tmp_path, other, answers
):
    shutil.copytree(other, tmp_path / "other")
    flag = f"--init_from={tmp_path / 'other'}"
    start(tmp_path / "whole", flag)
    stop(tmp_path / "run", answers, flag)
    if answers > 4:
        shutil.rmtree(tmp_path / "other")
    start(tmp_path / "run", flag)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_another_place_to_start_from_is_another_run(tmp_path, other):
    start(tmp_path / "run", f"--init_from={other}")
    with pytest.raises(UsageError, match=rf"--init_from: {other} there, None here"):
        start(tmp_path / "run")


def test_each_seed_starts_from_them(tmp_path, other):
    together = train(tmp_path / "run", f"--init_from={other}")
    expected = distance(weights(other))
    assert together.lines[0]["first_distance"] == pytest.approx([expected] * 3, rel=1e-5)


def test_of_a_schedule_free_run_the_average_is_taken(tmp_path, monkeypatch):
    optimizer = optax.contrib.schedule_free_sgd(0.1)
    monkeypatch.setattr(toy, "make_optimizer", lambda rate: optimizer)
    start(tmp_path / "other")
    leaves = read_checkpoint(tmp_path / "other" / "checkpoints").leaves
    average = fill_params(leaves, {"w": jnp.zeros(3), "b": jnp.zeros(())})["w"]
    assert not np.allclose(average, leaves["state.params.w"])
    start(tmp_path / "run", f"--init_from={tmp_path / 'other'}")
    assert first_distance(tmp_path / "run") == pytest.approx(distance(np.asarray(average).tolist()), rel=1e-5)


@pytest.mark.parametrize("place", ["nowhere", "", "gs://bucket/run", "\0"])
def test_a_place_without_a_run_is_refused_and_nothing_is_left(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--init_from must be ") as error:
        start(tmp_path / "run", f"--init_from={place}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_model_is_refused_with_the_leaf_that_differs(tmp_path, other, monkeypatch):
    params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
    monkeypatch.setattr(toy, "begin", lambda config: {"params": params, "key": jax.random.key(0)})
    monkeypatch.setattr(toy, "make_loss", lambda bomb: lambda params, batch, key, step: (jnp.sum(params["w"]), {}))
    words = r"state\.params\.w is float32\[3\] there, float32\[4\] here"
    with pytest.raises(UsageError, match=f"--init_from={other} holds another model: {words}"):
        start(tmp_path / "run", f"--init_from={other}")


def test_a_run_without_a_checkpoint_is_refused(tmp_path, other):
    shutil.copytree(other, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    with pytest.raises(UsageError, match=rf"--init_from={tmp_path / 'other'}: .* holds no checkpoint"):
        start(tmp_path / "run", f"--init_from={tmp_path / 'other'}")
