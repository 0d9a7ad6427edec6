"""A run that is interrupted anywhere ends with the bits of an uninterrupted one."""

import json
import os
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from running import Disk, Killed, contents, result, start, steps, stop, stopped_after
from training_cases import one_step

from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs import fit
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.checkpoints import read_checkpoint
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.train import loop as training

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


KINDS = [(), ("--data=none",), ("--checkpoint_every=2",)]
ANSWERS = 16  # times that a run of 3 epochs of 4 steps asks for signals: at each step, after each epoch, at its end


# --- What a run is


@pytest.mark.parametrize("flags", [(), ("--data=none",)])
def test_the_lines_are_those_of_a_plain_loop(tmp_path, flags):
    start(tmp_path, *flags)
    data, key = (None if flags else toy.examples()), jax.random.key(0)
    loss, optimizer = toy.make_loss(-1), toy.make_optimizer(0.1)
    state = training.init_state({"w": jnp.zeros(3), "b": jnp.zeros(())}, optimizer)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for epoch, line in enumerate(lines):
        order_key, steps_key = training.epoch_keys(key, epoch)
        figures, norms = [], []
        for position in range(2 if flags and epoch == 2 else toy.STEPS):
            batch = None
            if data is not None:
                rows = training.epoch_order(order_key, toy.EXAMPLES, toy.BATCH)[position]
                batch = {name: array[np.asarray(rows)] for name, array in data.items()}
            state, info = one_step(loss, optimizer, state, batch, steps_key)
            figures.append(jax.tree.map(float, info.figures))
            norms.append(float(info.gradient_norm))
        means = {name: np.mean([figure[name] for figure in figures]) for name in figures[0]}
        errors = {f"{name}_se": np.std([figure[name] for figure in figures], ddof=1) for name in figures[0]}
        errors |= {"gradient_norm_se": np.std(norms, ddof=1)}
        means |= {name: error / np.sqrt(len(norms)) for name, error in errors.items()}
        expected = means | {"gradient_norm": np.mean(norms), "distance": toy.report(state.params)["distance"]}
        if epoch == 0:
            expected |= {f"first_{name}": value for name, value in figures[0].items()} | {"first_distance": 3.0}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        number = {"step": min(10, 4 * (epoch + 1))} if flags else {"epoch": epoch + 1}
        extra = {"nothing", "seconds"} | ({"first_nothing"} if epoch == 0 else set())
        assert set(line) == {*expected, *number, *extra}
        assert number.items() <= line.items()
    summary = json.loads((tmp_path / "summary.json").read_text())
    np.testing.assert_allclose(summary["w"], state.params["w"], rtol=1e-4)


def test_a_run_that_is_resumed_where_it_ended_returns_the_same(tmp_path):
    fits = []
    config = toy.Config(workdir=str(tmp_path))
    for _ in range(2):
        with toy.open_run(config, "toy") as run:
            fits.append(toy.train(config, run))
    jax.tree.map(np.testing.assert_array_equal, fits[0].state, fits[1].state)
    assert fits[0].lines == fits[1].lines


@pytest.mark.parametrize(("steps_per_epoch", "batch_size"), [(5, 5), (0, 5), (1, 24), (1, None), (4, 0)])
def test_an_epoch_that_takes_more_examples_than_there_are_is_a_mistake(tmp_path, steps_per_epoch, batch_size):
    sizes = {"steps": 20, "steps_per_epoch": steps_per_epoch, "batch_size": batch_size, "data": toy.examples()}
    with toy.open_run(toy.Config(workdir=str(tmp_path)), "toy") as run, pytest.raises(ValueError, match="23 examples"):
        fit.fit(run, toy.make_loss(-1), toy.make_optimizer(0.1), {}, jax.random.key(0), **sizes)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda params, *_: jnp.sum(params["w"]), "loss must return (value, {name: figure}); got ShapeDtypeStruct"),
        (lambda params, *_: (jnp.sum(params["w"]), {"w": params["w"]}), "loss must return scalars; got w of Shape"),
    ],
)
def test_a_loss_that_returns_anything_else_is_a_mistake_before_anything_is_compiled(tmp_path, monkeypatch, loss, words):
    monkeypatch.setattr(toy, "make_loss", lambda bomb: loss)
    with pytest.raises(ValueError, match=re.escape(words)):
        start(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


# --- Cuts


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        pytest.param(flags, answers, marks=[pytest.mark.slow] * (flags == KINDS[2] and answers % 3))
        for flags in KINDS
        for answers in range(ANSWERS - 2 * (flags == ("--data=none",)))
    ],
    ids=str,
)
def test_cut_once(tmp_path, whole, flags, answers):
    message = stop(tmp_path, answers, *flags)
    assert "run the same command again to resume it from there" in message
    assert not (tmp_path / "summary.json").exists()
    start(tmp_path, *flags)
    assert result(tmp_path) == whole(*flags)


@pytest.mark.parametrize("seed", [*range(9), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(9, 24))])
def test_cut_many_times(tmp_path, whole, seed):
    rng = random.Random(seed)
    flags = KINDS[seed % 3]
    for _ in range(rng.randint(2, 6)):
        try:
            with stopped_after(rng.randint(0, 6)):
                start(tmp_path, *flags)
        except signals.Stopped:
            continue
        break
    start(tmp_path, *flags)
    assert result(tmp_path) == whole(*flags)


def calls_of_a_run(tmp_path, *flags):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        start(tmp_path, *flags)
    return disk.calls


def killed(workdir, at, after, *flags):
    """A run that is killed at one of its calls that change the disk, if there are so many."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, at, after)
        try:
            start(workdir, *flags)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("part", [*range(3), *(pytest.param(part, marks=pytest.mark.slow) for part in range(3, 8))])
def test_killed_at_any_change_of_the_disk(tmp_path, whole, part):
    flags = ("--keep=1", "--epochs=2")
    calls = calls_of_a_run(tmp_path / "calls", *flags)
    assert {"replace", "rename", "fsync", "mkdir"} <= set(calls)
    rng = random.Random(part)
    for at in range(part, len(calls), 8):
        workdir = tmp_path / str(at)
        killed(workdir, at, rng.random() < 0.5, *flags)
        if rng.random() < 0.3:
            killed(workdir, rng.randrange(len(calls)), True, *flags)
        start(workdir, *flags)
        assert result(workdir) == whole(*flags), (at, calls[at])
        assert steps(workdir)[-1] == 8


def test_epochs_between_checkpoints_are_repeated_and_stand_once_in_the_metrics(tmp_path, whole, monkeypatch):
    def append(path, line):
        write(path, line)
        if line["epoch"] == 2:
            raise Killed

    write = fit.append_json_line
    monkeypatch.setattr(fit, "append_json_line", append)
    with pytest.raises(Killed):
        start(tmp_path, "--checkpoint_every=3")
    monkeypatch.undo()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    start(tmp_path, "--checkpoint_every=3")
    assert result(tmp_path) == whole("--checkpoint_every=3")
    assert steps(tmp_path) == [12]


def test_a_line_is_on_the_disk_before_the_checkpoint_that_counts_on_it(tmp_path, monkeypatch):
    order = []
    save, sync = fit.Checkpoints.save, os.fsync

    def fsync(handle):
        order.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def begin(self, step, tree, meta, **kwargs):
        order.append(step)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == meta["epoch"]
        save(self, step, tree, meta, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fit.Checkpoints, "save", begin)
    start(tmp_path)
    saves = [order.index(step) for step in (4, 8, 12)]
    for before, after in zip([0, *saves], saves, strict=False):
        assert str(tmp_path / "metrics.jsonl") in order[before:after]


def test_nothing_in_a_checkpoint_grows_with_the_epochs(tmp_path):
    start(tmp_path, "--epochs=6", "--keep=6")
    first, last = (read_checkpoint(tmp_path / "checkpoints", step) for step in (4, 24))
    shapes = [{name: leaf.shape for name, leaf in stored.leaves.items()} for stored in (first, last)]
    assert shapes[0] == shapes[1]
    kinds = [{name: type(value) for name, value in stored.meta.items()} for stored in (first, last)]
    assert kinds[0] == kinds[1] == {"epoch": int, "position": int, "epoch_seconds": float, "seconds": float}


def test_more_epochs_give_the_longer_run_and_fewer_than_done_are_refused(tmp_path, whole):
    start(tmp_path, "--epochs=1")
    start(tmp_path)
    assert result(tmp_path) == whole()
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["epochs"] == 3
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        start(tmp_path, "--epochs=2")
    assert str(caught.value).startswith(f"--epochs=2 is less than the run in {tmp_path} has done, epoch 3 (step 12);")
    assert "--workdir" in str(caught.value)
    assert "--eval_only" in str(caught.value)
    assert contents(tmp_path) == before


# --- History


@pytest.mark.parametrize(
    "content", [None, b"", b'{"epoch": 1}\n', b'{"epoch": 1}\n{"epoch": 2', b"1\n2\n", b"\xff\n\n\n"]
)
def test_lost_lines_of_metrics_are_reported_and_the_advice_helps(tmp_path, content):
    stop(tmp_path, 10)  # in the third epoch
    path = tmp_path / "metrics.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for flags in ((), ("--eval_only",)):
        with pytest.raises(RunError, match=r"metrics\.jsonl: line \d of the 2 up to the checkpoint is missing or dam"):
            start(tmp_path, *flags)
    path.write_bytes(b"{}\n{}\n")
    start(tmp_path)
    assert [json.loads(line).get("epoch") for line in path.read_text().splitlines()] == [None, None, 3]


def test_lines_after_the_checkpoint_are_cut_off(tmp_path, whole):
    stop(tmp_path, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n{"epoch": 4, "lo')
    start(tmp_path)
    assert result(tmp_path) == whole()


# --- Time and programs


def test_calls_last_about_a_second(monkeypatch):
    monkeypatch.undo()
    pace, steps, position = fit.Pace(), [], 0
    while position < 10_000:
        end = pace.end(position, 10_000)
        steps.append(end - position)
        pace.took(end - position, (end - position) / 1000)  # a thousand steps a second
        position = end
    assert steps[0] == 8
    assert max(steps) <= 1500
    assert len(steps) < 15


def test_the_results_do_not_depend_on_the_pace(tmp_path, whole, monkeypatch):
    monkeypatch.undo()
    start(tmp_path)
    assert result(tmp_path) == whole()
