"""A value that is not finite ends a run at that step; the state goes to ``failed/`` and into no checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from running import OneStep, start, steps, stop

from planar_vae_jax.runs import fit
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.checkpoints import Checkpoints, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


@pytest.mark.parametrize("bomb", [0, 3, 4, 9])
@pytest.mark.parametrize("flags", [(), ("--data=none",)], ids=str)
@pytest.mark.parametrize("pace", [OneStep, fit.Pace])
def test_a_run_ends_at_the_step_whose_loss_is_not_finite(tmp_path, monkeypatch, bomb, flags, pace):
    monkeypatch.setattr(fit, "Pace", pace)
    for _ in range(2):  # and again when it is resumed from the last good checkpoint
        with pytest.raises(RunError) as error:
            start(tmp_path, f"--bomb={bomb}", *flags)
        message = str(error.value)
        assert "\n" not in message
        epoch, position = divmod(bomb, 4)
        where = f"step {bomb + 1} of the run, is not finite"
        if not flags:
            where = f"step {position + 1} of epoch {epoch + 1}, {where}"
        assert message.startswith(f"the loss of {where}; ")
        named = f"step {4 * epoch}" if flags else f"epoch {epoch} (step {4 * epoch})"
        assert (f"the last good checkpoint: {named};" if epoch else "there is no checkpoint yet;") in message
        assert str(tmp_path / "failed") in message
    assert not (tmp_path / "summary.json").exists()
    facts = json.loads((tmp_path / "failed" / "failure.json").read_text())
    assert facts["step"] == bomb + 1
    assert facts["last_good_checkpoint"] == (4 * epoch or None)
    assert facts["loss"] == "nan"
    with np.load(tmp_path / "failed" / "state.npz") as arrays:
        assert arrays["state.step"] == bomb
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert ("batch.x" in arrays) == (not flags)
        failed = {name: arrays[name] for name in arrays}
    monkeypatch.setattr(fit, "Pace", OneStep)
    stop(tmp_path / "sound", bomb + epoch, *flags)  # stopped before that step
    found = read_checkpoint(tmp_path / "sound" / "checkpoints")
    assert found.step == bomb
    for name in ("state.params.w", "state.params.b", "state.opt_state.0.trace.w"):
        np.testing.assert_array_equal(failed[name], found.leaves[name])
    assert "NaN" not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path, monkeypatch):
    def loss(params, batch, key, step):
        value, figures = toy.loss(params, batch, key, step, bomb=-1)
        zero = params["b"] - jax.lax.stop_gradient(params["b"])  # whose gradient is 1
        return value + jnp.where(step == 5, jnp.inf, 0.0) * zero, figures

    monkeypatch.setattr(toy, "make_loss", lambda bomb: loss)
    with pytest.raises(RunError, match="step 6 of the run, is not finite"):
        start(tmp_path)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """The update of the last step of epoch 2 overflows, which no loss and no gradient shows."""
    overflow = optax.scale_by_schedule(lambda count: jnp.where(count == 7, jnp.inf, 1.0))
    optimizer = optax.chain(optax.sgd(0.1), overflow)
    monkeypatch.setattr(toy, "make_optimizer", lambda rate: optimizer)
    with pytest.raises(RunError, match=r"a parameter is not finite after epoch 2.*last good checkpoint: epoch 1 \(st"):
        start(tmp_path)
    assert steps(tmp_path) == [4]
    assert json.loads((tmp_path / "failed" / "failure.json").read_text())["last_good_checkpoint"] == 4


def test_a_start_that_is_not_finite_ends_the_run_before_its_first_step(tmp_path, monkeypatch):
    begin = toy.begin
    monkeypatch.setattr(toy, "begin", lambda config: begin(config) | {"params": {"w": jnp.full(3, jnp.nan), "b": 0.0}})
    with pytest.raises(
        RunError, match=r"a parameter is not finite after epoch 0 \(step 0\); there is no checkpoint yet"
    ):
        start(tmp_path)
    assert json.loads((tmp_path / "failed" / "failure.json").read_text())["step"] == 1
    with np.load(tmp_path / "failed" / "state.npz") as arrays:
        assert np.all(np.isnan(arrays["state.params.w"]))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_with_nan_is_not_trained_on(tmp_path):
    stop(tmp_path, 12)
    folder = tmp_path / "checkpoints"
    sound = read_checkpoint(folder)
    spoilt = sound.leaves | {"state.params.w": np.array([np.nan, 0.0, 0.0], np.float32)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(sound.step + 1, spoilt, sound.meta)
    with pytest.raises(RunError, match="a parameter is not finite after epoch 2 and 2 steps") as error:
        start(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "summary.json").exists()


def test_jax_debug_nans_raises_only_for_real_ones(tmp_path):
    jax.config.update("jax_debug_nans", True)
    try:
        start(tmp_path / "run")
        with pytest.raises((RunError, FloatingPointError)):
            start(tmp_path / "bomb", "--bomb=6")
    finally:
        jax.config.update("jax_debug_nans", False)
