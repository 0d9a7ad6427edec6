"""Several seeds in one ``fit``: each is what it is alone, to rounding, and an interruption changes no bit."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from running import Disk, Killed, OneStep, steps, stopped_after
from seeds import SEEDS, assert_seed_is_as_alone, start, timeless, train, train_alone

from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit
from planar_vae_jax.runs._files import RunError

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("seeds") / "run")


def assert_same_bits(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, (actual.params, actual.state), (desired.params, desired.state))
    assert timeless(actual.lines) == timeless(desired.lines)


@pytest.mark.parametrize("flags", [("--checkpoint_every=2",), ("--data=none", "--epochs=2")], ids=str)
def test_each_seed_is_that_seed_alone(tmp_path, flags):
    together = train(tmp_path / "together", *flags)
    for number, seed in enumerate(SEEDS):
        assert_seed_is_as_alone(together, number, train_alone(tmp_path / str(seed), *flags, seed=seed))
    assert len({tuple(weights) for weights in np.asarray(together.params["w"]).tolist()}) == len(SEEDS)


def test_lines_hold_a_list_of_each_figure(uninterrupted, tmp_path):
    for epoch, line in enumerate(uninterrupted.lines, 1):
        assert line["epoch"] == epoch
        lists = {name: value for name, value in line.items() if name not in ("epoch", "seconds")}
        assert all(len(value) == len(SEEDS) for value in lists.values())
        assert line["nothing"] == [None] * len(SEEDS)
    assert uninterrupted.lines[0]["first_distance"] == [3.0] * len(SEEDS)


def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(tmp_path, uninterrupted):
    for answers in (2, 0, 5, 1):
        with stopped_after(answers), pytest.raises(signals.Stopped) as stopped:
            train(tmp_path)
        assert stopped.value.number == signal.SIGTERM
    assert "after epoch 1 and 3 steps (step 7)" in str(stopped.value)
    assert_same_bits(train(tmp_path), uninterrupted)


@pytest.mark.parametrize("kill_at", [12, 33, 47, 70])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, uninterrupted, monkeypatch, kill_at):
    with monkeypatch.context() as patch:
        Disk(patch, kill_at=kill_at)
        with pytest.raises(Killed):
            train(tmp_path)
    assert_same_bits(train(tmp_path), uninterrupted)


def test_more_epochs_give_the_longer_run(tmp_path, uninterrupted):
    train(tmp_path, "--epochs=1")
    assert_same_bits(train(tmp_path), uninterrupted)


def fragile(params, batch, key, step):
    """A loss that is NaN from the step on that a parameter names."""
    value, figures = toy.loss({"w": params["w"], "b": params["b"]}, batch, key, step, bomb=-1)
    return jnp.where(step.astype(jnp.float32) >= params["bomb"], jnp.nan, value), figures


@pytest.mark.parametrize("pace", [OneStep, fit.Pace])
def test_a_seed_whose_loss_is_not_finite_ends_the_run_and_is_named(tmp_path, monkeypatch, pace):
    monkeypatch.setattr(fit, "Pace", pace)
    params = start(toy.Config(), SEEDS)["params"] | {"bomb": jnp.array([99.0, 6.0, 7.0])}
    with pytest.raises(RunError) as error:
        train(tmp_path, loss=fragile, params=params)
    message = str(error.value)
    assert message.startswith("the loss of step 3 of epoch 2, step 7 of the run of seed number 1 of 3, is not finite; ")
    assert "the last good checkpoint: epoch 1 (step 4); " in message
    facts = json.loads((tmp_path / "failed" / "failure.json").read_text())
    assert (facts["step"], facts["last_good_checkpoint"]) == (7, 4)
    with np.load(tmp_path / "failed" / "state.npz") as arrays:
        np.testing.assert_array_equal(arrays["state.step"], [6, 6, 6])
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert arrays["batch.x"].shape == (len(SEEDS), toy.BATCH, 3)
    assert steps(tmp_path) == [4]


def test_seeds_have_no_best_checkpoint_and_no_streamed_examples(tmp_path):
    with pytest.raises(ValueError, match="score must be None; got 'distance'"):
        train(tmp_path, score="distance")
    with pytest.raises(ValueError, match="whole on the devices; got streamed ones"):
        train(tmp_path, "--chunk=80")
    with pytest.raises(
        ValueError, match="each of the 23 examples of data at most once; got steps_per_epoch=4 of batch"
    ):
        train(tmp_path, batch_size=6)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(0), np.arange(3), jax.random.split(jax.random.key(0), (2, 2))])
def test_anything_but_a_key_or_keys_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=r"key must be made by jax\.random\.key, or be a vector of such keys; got "):
        train(tmp_path, key=key)
