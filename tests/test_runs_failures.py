"""Damage, full disks, losses that are not finite, signals: told in a line, nothing lost, and the run goes on."""

import errno
import json
import os
import signal

import jax
import numpy as np
import pytest
import toy
from running import OneStep, contents, flip, result, start, steps, stop, stopped_after

from planar_vae_jax.runs import files, fit, reading, signals
from planar_vae_jax.runs.checkpoints import CheckpointError
from planar_vae_jax.runs.config import UsageError
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


# --- Damage


def test_a_damaged_checkpoint_is_told_and_an_older_one_is_used(tmp_path, whole, capsys):
    stop(tmp_path, 12)  # in the third epoch
    assert steps(tmp_path) == [4, 8, 10]
    flip(tmp_path / "checkpoints" / "10" / "arrays" / "checkpoint" / "0")
    start(tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert "checkpoints/10 (epoch 2 and 2 steps (step 10)) is damaged (ValueError: its arrays do not fit" in told
    assert "epoch 2 (step 8) is used instead" in told
    assert (tmp_path / "checkpoints" / "damaged" / "10").is_dir()
    assert result(tmp_path) == whole


def test_if_no_checkpoint_is_whole_that_is_an_error_each_time(tmp_path):
    stop(tmp_path, 12)
    for step in steps(tmp_path):
        flip(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    before = contents(tmp_path)
    for flags in ((), ("--eval_only",), ()):
        with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
            start(tmp_path, *flags)
    assert contents(tmp_path) == before
    start(tmp_path, "--overwrite")


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reading, "FORMAT", 9)
        stop(tmp_path, 12)
    with pytest.raises(CheckpointError, match="is of format 9, written by a newer version"):
        start(tmp_path)


def test_checkpoints_of_another_model_are_told_as_such_and_left_alone(tmp_path):
    stop(tmp_path, 12)
    before = contents(tmp_path)
    config = toy.Config(workdir=str(tmp_path))
    params = {"w": jax.numpy.zeros(4), "b": jax.numpy.zeros(())}
    run_toy = {"steps": 12, "steps_per_epoch": 4, "data": toy.examples(), "batch_size": toy.BATCH}
    with (
        toy.open_run(config, "toy") as run,
        pytest.raises(
            CheckpointError, match=r"another tree: \\?\['state'\]\.params\['w'\] is float32\[3\] there, float32\[4\]"
        ),
    ):
        fit.fit(run, lambda p, *_: (p["w"].sum(), {}), toy.make_optimizer(0.1), params, jax.random.key(0), **run_toy)
    assert contents(tmp_path) == before


def test_meta_data_may_hold_more_than_is_known(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit, "asdict", lambda done: {**vars(done), "from the future": [1]})
        stop(tmp_path, 12)
    start(tmp_path)
    assert result(tmp_path) == whole


def test_a_damaged_summary_is_computed_again(tmp_path, whole):
    start(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "summary.json").write_text(content)
        start(tmp_path)
        assert result(tmp_path) == whole


# --- What cannot be written


def failure(workdir):
    """The line by which a run fails, if it does."""
    try:
        start(workdir)
    except (RunError, UsageError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["replace", "fsync", "truncate", "mkdir", "rename"])
@pytest.mark.parametrize("nth", [0, 1, 3, 9, 20])
def test_a_full_disk_is_told_and_the_run_goes_on_later(tmp_path, whole, monkeypatch, name, nth):
    calls, call = 0, getattr(os, name)

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        message = failure(tmp_path / "run")
    assert (message is None) == (calls <= nth)
    assert message is None or "No space left on device" in message
    assert not list(tmp_path.rglob("*unfinished*"))
    start(tmp_path / "run")
    assert result(tmp_path / "run") == whole


def test_a_line_of_metrics_that_is_written_in_part_is_cut_off_later(tmp_path, whole, monkeypatch):
    def append(path, line):
        with path.open("a") as file:
            file.write('{"epoch": ')
        raise RunError(f"{path} could not be written")

    with monkeypatch.context() as patch:
        patch.setattr(fit, "append_json_line", append)
        with pytest.raises(RunError, match="could not be written"):
            start(tmp_path)
    start(tmp_path)
    assert result(tmp_path) == whole


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_the_last_one_stays(tmp_path, whole, monkeypatch):
    saves = 0

    async def save(self, item, path):
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(self, item, path)

    handler = reading.orbax().JsonCheckpointHandler
    write = handler._save_fn
    monkeypatch.setattr(handler, "_save_fn", save)
    with pytest.raises(CheckpointError, match=r"could not be written to .*: No space left on device"):
        start(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    start(tmp_path)
    assert result(tmp_path) == whole


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        start(tmp_path / "run", "--epochs=1")
        with pytest.raises(RunError, match="not finite"):
            start(tmp_path / "bomb", "--epochs=1", "--bomb=2")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


# --- What is not finite


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
    monkeypatch.setattr(fit, "_all_finite", lambda state: bool(np.asarray(state.step) < 8))
    with pytest.raises(RunError, match=r"a parameter is not finite after epoch 2.*last good checkpoint: epoch 1 \(st"):
        start(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    assert json.loads((tmp_path / "failed" / "failure.json").read_text())["last_good_checkpoint"] == 4


def test_all_finite():
    state = {"a": np.zeros(3, np.float32), "n": np.arange(2)}
    assert fit._all_finite(state)
    assert fit._all_finite({"n": np.arange(2)})
    for bad in (np.nan, np.inf):
        assert not fit._all_finite({**state, "b": np.array([0.0, bad], np.float32)})


def test_a_checkpoint_with_nan_is_passed_over(tmp_path, whole, monkeypatch, capsys):
    stop(tmp_path, 12)
    with monkeypatch.context() as patch:
        check = fit._all_finite
        patch.setattr(fit, "_all_finite", lambda state: check(state) and int(state.step) < 10)
        with stopped_after(0), pytest.raises(signals.Stopped):
            start(tmp_path)
    assert "(ValueError: not every parameter is finite)" in " ".join(capsys.readouterr().err.split())
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


# --- Signals


def test_a_run_that_began_by_overwrite_goes_on_without_it(tmp_path):
    stop(tmp_path / "run", 2)
    message = stop(tmp_path / "run", 2, "--overwrite")
    assert "run the same command without --overwrite to go on" in message


@pytest.fixture
def receive(monkeypatch):
    exits = []
    monkeypatch.setattr(signals, "_exit", lambda number, text: exits.append((number, text)))
    monkeypatch.setattr(signals, "_requested", None)
    return signals._receive, exits


def test_outside_training_a_signal_ends_the_process_at_once(receive):
    receive, exits = receive
    receive(signal.SIGTERM)
    assert exits == [(signal.SIGTERM, "stopped by SIGTERM; run the same command again to go on")]


def test_while_training_the_first_signal_asks_and_a_second_ctrl_c_ends(receive, capsys):
    receive, exits = receive
    with signals.finishing():
        assert signals.requested() is None
        receive(signal.SIGTERM)
        receive(signal.SIGTERM)  # schedulers repeat it
        assert (signals.requested(), exits) == (signal.SIGTERM, [])
        assert "SIGTERM: finishing the step and saving; a second Ctrl-C ends at once" in capsys.readouterr().err
        receive(signal.SIGINT)
        assert [number for number, _ in exits] == [signal.SIGINT]
    assert signals.requested() == signal.SIGTERM  # whoever was finishing asks once more
    with signals.finishing():
        assert signals.requested() is None


def test_where_nothing_is_left_to_save_a_signal_ends_the_process(tmp_path, receive, monkeypatch):
    receive, exits = receive
    start(tmp_path)
    (tmp_path / "summary.json").unlink()

    def restore(self, like):
        receive(signal.SIGTERM)
        return whole_restore(self, like)

    whole_restore = fit.Checkpoints.restore
    monkeypatch.setattr(fit.Checkpoints, "restore", restore)
    start(tmp_path)
    assert [number for number, _ in exits] == [signal.SIGTERM]
    assert files.read_json(tmp_path / "summary.json")
