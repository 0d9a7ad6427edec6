"""Seeds trained together: their folders are those of runs alone, to rounding, and a stop changes no bit."""

import contextlib
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from running import Disk, Killed, OneStep, contents, result, start, steps, stop, stopped_after

from planar_vae_jax.runs import fit, folder, reading, signals, together
from planar_vae_jax.runs.config import UsageError, parse_run
from planar_vae_jax.runs.files import RunError

SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def one_step_at_a_time(monkeypatch):
    monkeypatch.setattr(fit, "Pace", OneStep)
    monkeypatch.setattr(together, "Pace", OneStep)
    monkeypatch.setattr(signals, "advice", signals.advice)


def seed_folder(path, seed):
    return path / f"seed={seed}"


def train(path, *flags, seeds=SEEDS, **changed):
    """Toys of these seeds, trained together; nothing else is done for them."""
    with contextlib.ExitStack() as stack:
        members, arguments = [], {}
        for seed in seeds:
            argv = [f"--workdir={seed_folder(path, seed)}", f"--seed={seed}", *flags]
            config = parse_run(toy.Config, argv, toy.__doc__)
            arguments = toy.arguments(config) | changed
            run = stack.enter_context(folder.open_run(config, "toy", toy.identity(config)))
            members.append(together.Seed(run, arguments.pop("params"), arguments.pop("key")))
        together.fit_together(members, **arguments)


def finish(path, *flags, seeds=SEEDS):
    """Each run by itself, to its end; all that they leave."""
    for seed in seeds:
        start(seed_folder(path, seed), f"--seed={seed}", *flags)
    return [result(seed_folder(path, seed)) for seed in seeds]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trained together in one go: the folder, and all that is in it."""
    path = tmp_path_factory.mktemp("together")
    train(path)
    return path, finish(path)


def leaves_of(path):
    return reading.read_checkpoint(path / "checkpoints").leaves


def assert_equal_to_rounding(path, other, seeds=SEEDS):
    for seed in seeds:
        ours, theirs = (seed_folder(one, seed) for one in (path, other))
        assert steps(ours)[-1] == steps(theirs)[-1]
        actual, expected = leaves_of(ours), leaves_of(theirs)
        assert list(actual) == list(expected)
        for name, leaf in expected.items():
            if isinstance(leaf, np.ndarray):
                assert leaf.dtype == actual[name].dtype
                np.testing.assert_allclose(actual[name], leaf, rtol=2e-5, atol=1e-6, err_msg=name)
            else:  # the key
                np.testing.assert_array_equal(jax.random.key_data(actual[name]), jax.random.key_data(leaf))
        for line, expected in zip(*(result(one)["metrics"] for one in (ours, theirs)), strict=True):
            assert list(line) == list(expected)
            known = [name for name, value in line.items() if value is not None]
            assert all(expected[name] is None for name in line.keys() - set(known))
            assert [line[name] for name in known] == pytest.approx([expected[n] for n in known], rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("flags", [("--checkpoint_every=2",), ("--data=none", "--epochs=2")], ids=str)
def test_each_folder_is_that_of_a_run_alone(tmp_path, flags):
    train(tmp_path / "together", *flags)
    before = {seed: contents(seed_folder(tmp_path / "together", seed) / "checkpoints") for seed in SEEDS}
    finish(tmp_path / "together", *flags)
    finish(tmp_path / "alone", *flags)
    assert_equal_to_rounding(tmp_path / "together", tmp_path / "alone")
    for seed in SEEDS:  # finishing it trained nothing
        ours, theirs = (seed_folder(tmp_path / way, seed) for way in ("together", "alone"))
        assert contents(ours / "checkpoints") == before[seed]
        assert steps(ours) == steps(theirs)
        configs = [json.loads((one / "config.json").read_text()) for one in (ours, theirs)]
        for config in configs:
            del config["flags"]["workdir"]
        assert configs[0] == configs[1]
        assert {one.name for one in ours.iterdir()} == {one.name for one in theirs.iterdir()}
    assert len({json.dumps(one["metrics"]) for one in finish(tmp_path / "alone", *flags)}) == len(SEEDS)


def test_stopped_anywhere_and_gone_on_with_it_ends_at_the_same_bits(tmp_path, whole, capsys):
    for answers in (2, 0, 5, 1):
        with stopped_after(answers), pytest.raises(signals.Stopped) as stopped:
            train(tmp_path)
        assert stopped.value.number == signal.SIGTERM
    assert "after epoch 1 and 3 steps (step 7)" in str(stopped.value)
    assert {steps(seed_folder(tmp_path, seed))[-1] for seed in SEEDS} == {7}
    train(tmp_path)
    assert finish(tmp_path) == whole[1]
    shown = capsys.readouterr().out
    assert shown.count("going on in") == 3 * 3 + 3 * 2  # after the first stop each time, and to finish


@pytest.mark.parametrize("kill_at", [15, 33, 47, 70])
def test_killed_in_the_middle_of_their_saves_the_hindmost_catch_up(tmp_path, whole, monkeypatch, kill_at):
    with monkeypatch.context() as patch:
        Disk(patch, kill_at=kill_at)
        with pytest.raises(Killed):
            train(tmp_path)
    train(tmp_path)
    assert finish(tmp_path) == whole[1]


def test_runs_that_are_at_other_steps_go_on_together_or_alone(tmp_path, whole):
    stop(seed_folder(tmp_path, 0), 6, "--seed=0")
    stop(seed_folder(tmp_path, 1), 7, "--seed=1")
    assert [steps(seed_folder(tmp_path, seed))[-1] for seed in (0, 1)] == [5, 6]
    with stopped_after(10), pytest.raises(signals.Stopped):
        train(tmp_path)
    assert [steps(seed_folder(tmp_path, seed))[-1] for seed in SEEDS] == [7, 7, 7]
    start(seed_folder(tmp_path, 1), "--seed=1")
    train(tmp_path)
    finish(tmp_path)
    assert_equal_to_rounding(tmp_path, whole[0])


def test_each_stops_early_by_itself(tmp_path):
    flags = ("--epochs=40", "--patience=2", "--keep=1")
    train(tmp_path / "together", *flags)
    finish(tmp_path / "together", *flags)
    finish(tmp_path / "alone", *flags)
    assert_equal_to_rounding(tmp_path / "together", tmp_path / "alone")
    found = [json.loads((seed_folder(tmp_path / "together", seed) / "summary.json").read_text()) for seed in SEEDS]
    assert len({summary["epochs"] for summary in found}) > 1
    assert all(summary["stopped_early"] for summary in found)


def fragile(params, batch, key, step):
    """A loss that is NaN from the step on that a parameter names."""
    value, figures = toy.loss({"w": params["w"], "b": params["b"]}, batch, key, step, bomb=-1)
    return jnp.where(step.astype(jnp.float32) >= params["bomb"], jnp.nan, value), figures


def test_a_loss_that_is_not_finite_ends_that_run_and_saves_the_others(tmp_path, monkeypatch):
    bombs = iter((99.0, 6.0, 6.0) * 2)
    begin = toy.begin
    monkeypatch.setattr(
        toy, "begin", lambda config: begin(config) | {"params": begin(config)["params"] | {"bomb": next(bombs)}}
    )
    for pace in (OneStep.__base__, OneStep):
        monkeypatch.setattr(together, "Pace", pace)
        with pytest.raises(RunError) as error:
            train(tmp_path, loss=fragile)
        message = str(error.value)
        assert message.startswith("seed=1: the loss of step 3 of epoch 2, step 7 of the run, is not finite; ")
        assert "the last good checkpoint: epoch 1 (step 4); " in message
        assert f"{seed_folder(tmp_path, 1) / 'failed'} holds the state before that step" in message
        facts = json.loads((seed_folder(tmp_path, 1) / "failed" / "failure.json").read_text())
        assert (facts["step"], facts["loss"], facts["last_good_checkpoint"]) == (7, "nan", 4)
        with np.load(seed_folder(tmp_path, 1) / "failed" / "state.npz") as arrays:
            assert arrays["['state'].step"] == 6
            assert all(np.all(np.isfinite(array)) for array in arrays.values())
            assert arrays["['batch']['x']"].shape == (toy.BATCH, 3)
        assert [steps(seed_folder(tmp_path, seed))[-1] for seed in SEEDS] == [6, 4, 6]
        assert not (seed_folder(tmp_path, 0) / "failed").exists()


def test_one_that_cannot_be_saved_is_named_and_the_others_are_saved(tmp_path, monkeypatch):
    save = fit.Loop.save

    def refuse(loop, *score):
        if loop.run.workdir.name == "seed=1" and loop.step == 8:
            raise RunError("no space")
        save(loop, *score)

    monkeypatch.setattr(fit.Loop, "save", refuse)
    with pytest.raises(RunError, match=r"^seed=1: no space$"):
        train(tmp_path, "--checkpoint_every=2")
    assert [steps(seed_folder(tmp_path, seed)) for seed in SEEDS] == [[8], [], [8]]
    monkeypatch.setattr(fit.Loop, "save", save)
    train(tmp_path, "--checkpoint_every=2")
    assert [steps(seed_folder(tmp_path, seed)) for seed in SEEDS] == [[8, 12]] * 3


def test_fewer_epochs_than_there_are_and_sizes_that_do_not_fit_are_refused(tmp_path, whole):
    with pytest.raises(UsageError, match=r"--epochs=2 is less than the run in .*seed=0 has done, epoch 3"):
        train(whole[0], "--epochs=2")
    with pytest.raises(
        ValueError, match="each of the 23 examples of data at most once; got steps_per_epoch=4 of batch"
    ):
        train(tmp_path, batch_size=6)
