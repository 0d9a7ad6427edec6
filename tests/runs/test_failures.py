"""Damage, full disks, signals: one line, nothing lost, and the run can be resumed."""

import errno
import os
import signal

import jax
import orbax.checkpoint as ocp
import pytest
import toy
from running import contents, flip, result, start, steps, stop

from planar_vae_jax.runs import _files as files
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import checkpoints, fit
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.checkpoints import CheckpointError
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


# --- Damage


def test_a_damaged_checkpoint_is_told_and_an_older_one_is_used(tmp_path, whole, capsys):
    stop(tmp_path, 12)  # in the third epoch
    assert steps(tmp_path) == [4, 8, 10]
    flip(tmp_path / "checkpoints" / "10" / "meta" / "metadata")
    start(tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert "checkpoints/10 (epoch 2 and 2 steps (step 10)) is damaged (" in told
    assert "epoch 2 (step 8) is used instead" in told
    assert (tmp_path / "checkpoints" / "damaged" / "10").is_dir()
    assert result(tmp_path) == whole()


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
        patch.setattr(checkpoints, "_FORMAT", 9)
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
        pytest.raises(CheckpointError, match=r"another tree: state\.params\.w is float32\[3\] there, float32\[4\]"),
    ):
        fit.fit(run, lambda p, *_: (p["w"].sum(), {}), toy.make_optimizer(0.1), params, jax.random.key(0), **run_toy)
    assert contents(tmp_path) == before


def test_meta_data_may_hold_more_than_is_known(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit, "asdict", lambda done: {**vars(done), "from the future": [1]})
        stop(tmp_path, 12)
    start(tmp_path)
    assert result(tmp_path) == whole()


def test_a_damaged_summary_is_computed_again(tmp_path, whole):
    start(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "summary.json").write_text(content)
        start(tmp_path)
        assert result(tmp_path) == whole()


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
    assert result(tmp_path / "run") == whole()


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
    assert result(tmp_path) == whole()


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_the_last_one_stays(tmp_path, whole, monkeypatch):
    saves = 0

    async def save(self, item, path):
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(self, item, path)

    handler = ocp.JsonCheckpointHandler
    write = handler._save_fn
    monkeypatch.setattr(handler, "_save_fn", save)
    with pytest.raises(CheckpointError, match=r"could not be written to .*: No space left on device"):
        start(tmp_path)
    assert steps(tmp_path) == [4]
    start(tmp_path)
    assert result(tmp_path) == whole()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        start(tmp_path / "run", "--epochs=1")
        with pytest.raises(RunError, match="not finite"):
            start(tmp_path / "bomb", "--epochs=1", "--bomb=2")
    finally:
        os.umask(before)
    for path in {*tmp_path.rglob("*")} - {*tmp_path.rglob(".lock")}:  # whose mode is filelock's
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


# --- Signals


def test_a_run_that_began_by_overwrite_goes_on_without_it(tmp_path):
    stop(tmp_path / "run", 2)
    message = stop(tmp_path / "run", 2, "--overwrite")
    assert "run the same command without --overwrite to resume it" in message


@pytest.fixture
def receive(monkeypatch):
    exits = []
    monkeypatch.setattr(signals, "_exit", lambda number, text: exits.append((number, text)))
    monkeypatch.setattr(signals, "_requested", None)
    return signals._receive, exits


def test_outside_training_a_signal_ends_the_process_at_once(receive):
    receive, exits = receive
    receive(signal.SIGTERM)
    assert exits == [(signal.SIGTERM, "stopped by SIGTERM; run the same command again to resume")]


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
