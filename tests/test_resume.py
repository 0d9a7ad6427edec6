"""A run that is stopped anywhere ends as the run in one go, bit for bit; what is not that run is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import density, files, fitting, mnist, resuming, signals
from experiments.files import RunError
from experiments.flags import UsageError
from planar_vae_jax import checkpoints as checkpoints_module
from planar_vae_jax import training
from planar_vae_jax.checkpoints import CheckpointError

MNIST = ("--epochs=3", "--hidden=8", "--latent=2", "--batch_size=16", "--nll_samples=4", "--flows=2")  # 5 steps each
DENSITY = ("--flows=2", "--steps=60", "--batch_size=32", "--checkpoint_every=2")  # 20 parts of 3 steps


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a Python float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def as_a_new_process(monkeypatch):
    monkeypatch.setattr(signals, "advice", signals.advice)
    monkeypatch.setattr(density, "SAMPLES", 2**14)  # a 64th


@pytest.fixture(autouse=True)
def one_step_at_a_time(monkeypatch):
    """So that a run can be stopped after each of its few steps."""

    class Slow(training.Pace):
        def end(self, start, stop):
            return min(start + 1, stop)

    monkeypatch.setattr(training, "Pace", Slow)


def write_images(path, seed=0):
    generator = np.random.default_rng(seed)
    sizes = {"train": 90, "test": 30}
    arrays = {f"x_{split}": generator.integers(0, 256, (size, 5, 4), np.uint8) for split, size in sizes.items()}
    arrays |= {f"y_{split}": (np.arange(size) % 3).astype(np.uint8) for split, size in sizes.items()}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture
def start(images):
    """Runs an experiment in this process."""

    def run(name, workdir, *flags):
        if name == "mnist":
            mnist.main([*MNIST, f"--dataset={images}", f"--workdir={workdir}", *flags])
        else:
            density.main([*DENSITY, f"--workdir={workdir}", *flags])

    return run


def result(workdir):
    """All that a run leaves, but for its seconds and where it stands."""

    def timeless(content):
        return {key: value for key, value in content.items() if not key.startswith("seconds")}

    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    meta = json.loads((workdir / "checkpoints" / str(steps[-1]) / "meta" / "metadata").read_text())["content"]
    return {
        "summary": timeless(json.loads((workdir / "summary.json").read_text())),
        "metrics": [timeless(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()],
        "figures": {path.name: path.read_bytes() for path in workdir.glob("*.png")},
        "step": steps[-1],
        "arrays": (meta["crc32"], meta["leaves"]),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """The results of the runs in one go, by experiment and flags."""
    results = {}

    def get(start, name, *flags):
        if (name, flags) not in results:
            workdir = tmp_path_factory.mktemp("whole")
            start(name, workdir, *flags)
            results[name, flags] = result(workdir)
        return results[name, flags]

    return get


def stop_after(monkeypatch, answers):
    """SIGTERM comes after so many times that a run has asked for it."""
    asked = 0

    def requested():
        nonlocal asked
        asked += 1
        return signal.SIGTERM if asked > answers else None

    monkeypatch.setattr(signals, "requested", requested)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Exactness


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("mnist", (0, 0)),  # before the first step, twice
        ("mnist", (3,)),  # in the first epoch
        ("mnist", (5,)),  # at its end
        ("mnist", (9, 2, 1)),
        ("mnist", (17,)),  # after the last step, before the evaluation
        ("density", (4, 0, 7, 31)),
    ],
)
def test_a_run_stopped_by_signals_ends_as_the_run_in_one_go(start, whole, tmp_path, monkeypatch, name, stops):
    for answers in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, answers)
            with pytest.raises(signals.Stopped, match=r"SIGTERM after .*; run the same command again") as stopped:
                start(name, tmp_path)
            assert stopped.value.number == signal.SIGTERM
        assert not (tmp_path / "summary.json").exists()
    start(name, tmp_path)
    assert result(tmp_path) == whole(start, name)


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.mark.parametrize(
    ("write", "before"), [(0, True), (0, False), (2, True), (3, False), (4, True), (6, False), (8, True), (8, False)]
)
def test_a_run_killed_at_any_file_ends_as_the_run_in_one_go(start, whole, tmp_path, monkeypatch, write, before):
    written = 0

    def replace(source, target):
        nonlocal written
        written += 1
        if not (before and written == write + 1):
            rename(source, target)
        if written == write + 1:
            raise Killed(target)

    rename = os.replace
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(Killed):
        start("mnist", tmp_path)
    monkeypatch.undo()
    start("mnist", tmp_path)
    assert result(tmp_path) == whole(start, "mnist")
    assert not list(tmp_path.rglob("*unfinished*"))


def test_epochs_between_checkpoints_are_repeated_and_stand_once_in_the_metrics(start, whole, tmp_path, monkeypatch):
    def killed(_self, lines):
        write(_self, lines)
        if len(lines) == 2:
            raise Killed

    write = resuming.ResumableRun.write_metrics
    monkeypatch.setattr(resuming.ResumableRun, "write_metrics", killed)
    with pytest.raises(Killed):
        start("mnist", tmp_path, "--checkpoint_every=3")
    monkeypatch.undo()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    start("mnist", tmp_path, "--checkpoint_every=3")
    assert result(tmp_path) == whole(start, "mnist")
    assert os.listdir(tmp_path / "checkpoints") == ["15"]


def test_more_epochs_go_on_as_the_longer_run_and_fewer_than_done_are_refused(start, whole, tmp_path):
    start("mnist", tmp_path, "--epochs=1", "--kl_warmup=3")
    start("mnist", tmp_path, "--kl_warmup=3")
    assert result(tmp_path) == whole(start, "mnist", "--kl_warmup=3")
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["epochs"] == 3
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"--epochs=2 is less than what .* has done \(after epoch 3\)"):
        start("mnist", tmp_path, "--epochs=2", "--kl_warmup=3")
    assert contents(tmp_path) == before


def test_clipping_bounds_the_update_and_not_the_norm_that_is_reported(start, tmp_path):
    start("mnist", tmp_path / "clipped", "--clip_norm=1e-6", "--epochs=1")
    start("mnist", tmp_path / "plain", "--epochs=1")
    clipped, plain = (result(tmp_path / name)["metrics"][0] for name in ("clipped", "plain"))
    assert clipped["gradient_norm"] > 1.0
    assert clipped["first_train_loss"] == plain["first_train_loss"]
    assert clipped["train_loss"] != plain["train_loss"]


# --- Damage


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def stopped_run(start, monkeypatch, workdir, name="mnist", answers=14):
    with monkeypatch.context() as patch:
        stop_after(patch, answers)
        with pytest.raises(signals.Stopped):
            start(name, workdir)
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_damaged_checkpoint_is_told_and_an_older_one_is_used(start, whole, tmp_path, monkeypatch, capsys):
    steps = stopped_run(start, monkeypatch, tmp_path)
    assert len(steps) == 3
    flip(tmp_path / "checkpoints" / str(steps[-1]) / "arrays" / "checkpoint" / "0")
    start("mnist", tmp_path)
    assert f"damaged/{steps[-1]} is damaged" in capsys.readouterr().err
    assert result(tmp_path) == whole(start, "mnist")


def test_if_no_checkpoint_is_whole_that_is_an_error_each_time(start, tmp_path, monkeypatch):
    for step in stopped_run(start, monkeypatch, tmp_path):
        flip(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
            start("mnist", tmp_path)
    assert contents(tmp_path) == before
    start("mnist", tmp_path, "--overwrite")


def test_a_checkpoint_of_a_newer_format_is_refused(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "FORMAT", 9)
        stopped_run(start, patch, tmp_path)
    with pytest.raises(CheckpointError, match="is of format 9, written by a newer version"):
        start("mnist", tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flags": 3}', b"\xff"])
def test_a_config_that_cannot_be_read_is_a_mistake_told_in_a_line(start, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        start("mnist", tmp_path)


def test_a_damaged_summary_is_computed_again(start, whole, tmp_path):
    start("mnist", tmp_path)
    (tmp_path / "summary.json").write_text("{")
    start("mnist", tmp_path)
    assert result(tmp_path) == whole(start, "mnist")


# --- What cannot be written


@pytest.mark.parametrize("write", [0, 1, 3, 5, 8])
def test_a_full_disk_is_told_with_the_file_and_the_run_goes_on_later(start, whole, tmp_path, monkeypatch, write):
    written = 0

    def replace(source, target):
        nonlocal written
        written += 1
        if written > write:
            raise OSError(28, "No space left on device")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(RunError, match="could not be written: No space left on device"):
        start("mnist", tmp_path)
    assert not list(tmp_path.rglob("*unfinished*"))
    monkeypatch.undo()
    start("mnist", tmp_path)
    assert result(tmp_path) == whole(start, "mnist")


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_the_last_one_stays(start, whole, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    saves = 0

    async def save(self, item, path):
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(28, "No space left on device")
        await write(self, item, path)

    write = ocp.JsonCheckpointHandler._save_fn
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)
    with pytest.raises(CheckpointError, match="No space left on device"):
        start("mnist", tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["5"]
    start("mnist", tmp_path)
    assert result(tmp_path) == whole(start, "mnist")


# --- Whose folder it is


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed=1"], ["--seed: 0 there, 1 here"]),
        (["--hidden=9", "--latent=3"], ["--hidden: 8 there, 9 here", "--latent: 2 there, 3 here"]),
        (["--classes=0,1"], ["--classes: None there, 0,1 here"]),
        (["--clip_norm=1"], ["--clip_norm: 0.0 there, 1.0 here"]),
        (["--nll_samples=5"], ["--nll_samples: 4 there, 5 here"]),
        (["--resume=never"], ["holds a run already", "--resume=auto"]),
        (["--eval_only", "--flows=3"], ["--flows: 2 there, 3 here"]),
        (["--checkpoint=best"], ["--checkpoint=best needs --eval_only"]),
        (["--overwrite", "--eval_only"], ["--overwrite", "--eval_only"]),
        (["--overwrite", "--resume=always"], ["--overwrite", "--resume=always"]),
    ],
    ids=str,
)
def test_another_run_is_refused_with_the_flags_that_differ(start, tmp_path, monkeypatch, flags, words):
    stopped_run(start, monkeypatch, tmp_path, answers=2)
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        start("mnist", tmp_path, *flags)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message or "needs" in message or "contradicts" in message
    assert all(word in message for word in words)
    assert contents(tmp_path) == before


def test_another_experiments_folder_is_refused(start, tmp_path, monkeypatch):
    stopped_run(start, monkeypatch, tmp_path, answers=2)
    with pytest.raises(UsageError, match=r"another run \(experiments.mnist, not density\)"):
        start("density", tmp_path)


def test_other_data_under_the_same_name_are_refused(start, tmp_path, monkeypatch):
    path = write_images(tmp_path / "some.npz")
    start("mnist", tmp_path / "run", f"--dataset={path}", "--epochs=1")
    write_images(path, seed=1)
    with pytest.raises(UsageError, match=r"a run on other data \(some from .*CRC-32 .*; here some from"):
        start("mnist", tmp_path / "run", f"--dataset={path}")


def test_a_folder_with_parts_of_a_run_alone_is_refused(start, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match=r"holds metrics\.jsonl of a run but no config\.json"):
        start("mnist", tmp_path)


@pytest.mark.parametrize("flag", ["--resume=always", "--eval_only"])
def test_there_must_be_a_run_to_go_on_with(start, tmp_path, flag):
    with pytest.raises(UsageError, match=rf"{flag} needs a run.*holds none"):
        start("mnist", tmp_path / "run", flag)


def test_a_folder_is_one_processs_alone(start, tmp_path):
    config = density.prepare(density.Config(workdir=str(tmp_path)))
    with resuming.open_run(config, "density"), pytest.raises(UsageError, match=r"--workdir=.* is in use by another"):
        start("density", tmp_path)
    start("density", tmp_path, "--steps=2")


def test_overwrite_moves_the_old_run_aside(start, whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    for number in (1, 2):
        stopped_run(start, monkeypatch, workdir)
        before = contents(workdir)
        flags = ["--epochs=1", "--overwrite"]
        with pytest.raises(UsageError):  # nothing is moved for a command that is wrong
            start("mnist", workdir, *flags, "--batch_size=1000")
        assert contents(workdir) == before
        start("mnist", workdir, *flags)
        assert contents(tmp_path / f"run.old-{number}") == before
        assert result(workdir)["step"] == 5
        workdir.rename(tmp_path / f"done-{number}")


def test_other_versions_go_on_with_a_warning(start, tmp_path, monkeypatch, capsys):
    stopped_run(start, monkeypatch, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["versions"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(config))
    start("mnist", tmp_path)
    assert "jax 0.0.1 there" in capsys.readouterr().err


# --- Evaluation alone


@pytest.mark.parametrize("name", ["mnist", "density"])
def test_a_finished_run_is_left_alone_and_eval_only_draws_it_again(start, tmp_path, capsys, name):
    start(name, tmp_path)
    before, expected = contents(tmp_path), result(tmp_path)
    capsys.readouterr()
    start(name, tmp_path)
    assert "is finished" in capsys.readouterr().out
    assert contents(tmp_path) == before
    for path in tmp_path.glob("*.png"):
        path.unlink()
    (mnist if name == "mnist" else density).main([f"--workdir={tmp_path}", "--eval_only"])  # no other flag
    assert result(tmp_path) == expected
    assert set(contents(tmp_path)) == set(before)


def test_eval_only_of_another_checkpoint_writes_beside_the_run(start, tmp_path, monkeypatch):
    stopped_run(start, monkeypatch, tmp_path, answers=15)  # in the third epoch
    before = contents(tmp_path)
    mnist.main([f"--workdir={tmp_path}", "--eval_only", "--nll_samples=2"])
    (new,) = {path.split("/")[0] for path in set(contents(tmp_path)) - set(before)}
    assert new.startswith("step-1")
    summary = json.loads((tmp_path / new / "summary.json").read_text())
    assert (summary["epochs"], summary["nll_samples"]) == (2, 2)
    assert len(list((tmp_path / new).glob("*.png"))) == 4
    mnist.main([f"--workdir={tmp_path}", "--eval_only", "--checkpoint=best"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["test_loss"])
    summary = json.loads((tmp_path / f"step-{5 * best['epoch']}" / "summary.json").read_text())
    assert summary["epochs"] == best["epoch"]


def test_eval_only_needs_a_whole_epoch(start, tmp_path, monkeypatch):
    stopped_run(start, monkeypatch, tmp_path, answers=2)
    with pytest.raises(UsageError, match="--eval_only needs a whole epoch"):
        start("mnist", tmp_path, "--eval_only")


# --- What is not finite


@pytest.mark.parametrize("name", ["mnist", "density"])
def test_a_run_ends_at_a_loss_that_is_not_finite_and_keeps_the_state_before_it(start, tmp_path, monkeypatch, name):
    module = mnist if name == "mnist" else density
    original = module.make_model if name == "mnist" else module.make_loss

    def spoil(loss):
        def spoiled(params, batch, key):
            value, aux = loss(params, batch, key)
            return jax.numpy.where(value < threshold, jax.numpy.nan, value), aux

        return spoiled

    flags = ("--epochs=8", "--learning_rate=0.02") if name == "mnist" else ()
    start(name, tmp_path / "whole", *flags)
    losses = [line.get("train_loss", line.get("tempered_loss")) for line in result(tmp_path / "whole")["metrics"]]
    threshold = np.mean(losses[-2:])  # reached after some epochs

    def make(*args, **kwargs):
        made = original(*args, **kwargs)
        return made._replace(loss=spoil(made.loss)) if name == "mnist" else spoil(made)

    monkeypatch.setattr(module, "make_model" if name == "mnist" else "make_loss", make)
    for _ in range(2):  # and again when it goes on from the last good checkpoint
        with pytest.raises(
            RunError, match=r"the loss of step \d+ of (epoch|part) \d+ is not finite .*last good"
        ) as error:
            start(name, tmp_path / "run", *flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "summary.json").exists()
    facts = json.loads((tmp_path / "run" / "failed" / "failure.json").read_text())
    assert facts["last_good_checkpoint"] < facts["step"]
    assert str(facts["last_good_checkpoint"]) in os.listdir(tmp_path / "run" / "checkpoints")
    with np.load(tmp_path / "run" / "failed" / "state.npz") as arrays:
        assert arrays["step"] == facts["step"] - 1
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert any(name.startswith("batch.") for name in arrays)
        assert sum(name.startswith("params") for name in arrays) > 2
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in metrics


def test_parameters_that_are_not_finite_are_never_saved(start, tmp_path, monkeypatch):
    # The update of the last step overflows: no loss will tell.
    monkeypatch.setattr(fitting, "_all_finite", lambda state: bool(np.asarray(state.step) < 10))
    with pytest.raises(RunError, match=r"a parameter is not finite after epoch 2.*last good checkpoint is of step 5"):
        start("mnist", tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["5"]


def test_all_finite():
    state = {"a": np.zeros(3, np.float32), "n": np.arange(2)}
    assert fitting._all_finite(state)
    for bad in (np.nan, np.inf):
        assert not fitting._all_finite({**state, "b": np.array([0.0, bad], np.float32)})


# --- Signals


def test_a_run_that_began_by_overwrite_goes_on_without_it(start, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(signals.Stopped, match="run the same command without --overwrite to go on"):
        start("mnist", tmp_path, "--overwrite")


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
        assert "finishing the step" in capsys.readouterr().err
        receive(signal.SIGINT)
        assert [number for number, _ in exits] == [signal.SIGINT]
    with signals.finishing():
        assert signals.requested() is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_stopped_by_a_signal_goes_on(start, images, tmp_path, number):
    flags = [*MNIST, "--epochs=3000", f"--dataset={images}", f"--workdir={tmp_path}"]
    command = [sys.executable, "-m", "experiments.mnist", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(number)
        started = time.perf_counter()
        _, errors = process.communicate(timeout=60)
        assert time.perf_counter() - started < 20
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    epochs = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] + 1
    start("mnist", tmp_path, f"--epochs={epochs}")
    start("mnist", tmp_path / "whole", f"--epochs={epochs}")
    assert result(tmp_path) == result(tmp_path / "whole")
