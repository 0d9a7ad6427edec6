"""What is not finite ends a run at that step, is kept apart, and is never passed on."""

import json
import os

import jax
import numpy as np
import pytest
import toy
from running import OneStep, result, start, stop, stopped_after

from planar_vae_jax.runs import compiled, fit, reading, signals
from planar_vae_jax.runs.files import RunError


@pytest.fixture(autouse=True)
def one_step_at_a_time(monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    monkeypatch.setattr(signals, "advice", signals.advice)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    start(workdir)
    return result(workdir)


@pytest.mark.parametrize("bomb", [0, 3, 4, 9])
@pytest.mark.parametrize("flags", [(), ("--data=none",)], ids=str)
@pytest.mark.parametrize("pace", [OneStep, OneStep.__base__])
def test_a_run_ends_at_the_step_whose_loss_is_not_finite(tmp_path, monkeypatch, bomb, flags, pace):
    monkeypatch.setattr(fit, "Pace", pace)
    for _ in range(2):  # and again when it goes on from the last good checkpoint
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
        assert arrays["['state'].step"] == bomb
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert ("['batch']['x']" in arrays) == (not flags)
        failed = {name: arrays[name] for name in arrays}
    monkeypatch.setattr(fit, "Pace", OneStep)
    stop(tmp_path / "sound", bomb + epoch, *flags)  # stopped before that step
    found = reading.read_checkpoint(tmp_path / "sound" / "checkpoints")
    assert found.step == bomb
    for name in ("['state'].params['w']", "['state'].params['b']", "['state'].opt_state[0].trace['w']"):
        np.testing.assert_array_equal(failed[name], found.leaves[name])
    assert "NaN" not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path, monkeypatch):
    def loss(params, batch, key, step):
        value, figures = toy.loss(params, batch, key, step, bomb=-1)
        return value + jax.numpy.where(step == 5, jax.numpy.inf, 0.0) * (
            params["b"] - jax.lax.stop_gradient(params["b"])
        ), figures

    monkeypatch.setattr(toy, "make_loss", lambda bomb: loss)
    with pytest.raises(RunError, match="step 6 of the run, is not finite"):
        start(tmp_path)


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    # The update of the last step overflows: no loss will tell.
    monkeypatch.setattr(compiled, "all_finite", lambda state: bool(np.asarray(state.step) < 8))
    with pytest.raises(RunError, match=r"a parameter is not finite after epoch 2.*last good checkpoint: epoch 1 \(st"):
        start(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    assert json.loads((tmp_path / "failed" / "failure.json").read_text())["last_good_checkpoint"] == 4


def test_all_finite():
    state = {"a": np.zeros(3, np.float32), "n": np.arange(2)}
    assert compiled.all_finite(state)
    assert compiled.all_finite({"n": np.arange(2)})
    for bad in (np.nan, np.inf):
        assert not compiled.all_finite({**state, "b": np.array([0.0, bad], np.float32)})


def not_ten(leaves):
    """As if the state after ten steps held a NaN."""
    if any(np.all(leaf == 10) for leaf in leaves.values() if isinstance(leaf, np.ndarray)):
        raise ValueError("not every parameter is finite")


def test_a_checkpoint_with_nan_is_passed_over(tmp_path, whole, monkeypatch, capsys):
    stop(tmp_path, 12)
    with monkeypatch.context() as patch:
        # As if the state after ten steps held one.
        patch.setattr(
            compiled, "all_finite", lambda tree: not any(np.all(leaf == 10) for leaf in jax.tree.leaves(tree))
        )
        patch.setattr(reading, "check_finite", not_ten)
        start(tmp_path, "--eval_only")
        with stopped_after(0), pytest.raises(signals.Stopped):
            start(tmp_path)
    assert capsys.readouterr().err.count("(ValueError: not every") == 2
    assert json.loads((tmp_path / "epoch-2" / "summary.json").read_text())["epochs"] == 2
    start(tmp_path)
    assert result(tmp_path) == whole


def test_jax_debug_nans_raises_for_real_ones_alone(tmp_path):
    jax.config.update("jax_debug_nans", True)
    try:
        start(tmp_path / "run")
        with pytest.raises((RunError, FloatingPointError)):
            start(tmp_path / "bomb", "--bomb=6")
    finally:
        jax.config.update("jax_debug_nans", False)
