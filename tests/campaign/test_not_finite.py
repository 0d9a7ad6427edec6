"""Values that are not finite, in a checkpoint, in the data or by divergence: one line, and they are never passed on."""

import numpy as np
import pytest

from campaign.harness import Run, metrics, refuse, steps, strict
from planar_vae_jax.runs.checkpoints import Checkpoints, read_checkpoint


def plant(workdir, spoil):
    """Spoils the state of the newest checkpoint, with checksums that fit; returns its step."""
    folder = workdir / "checkpoints"
    step = steps(workdir)[-1]
    stored = read_checkpoint(folder, step)
    leaves = {name: leaf.copy() if isinstance(leaf, np.ndarray) else leaf for name, leaf in stored.leaves.items()}
    spoil({name: leaf for name, leaf in leaves.items() if leaf.dtype == np.float32})
    (folder / str(step)).rename(workdir.parent / f"sound-{step}")
    with Checkpoints(folder, keep=99) as checkpoints:
        checkpoints.save(step, leaves, stored.meta, score=stored.score)
    return step


def set_first(name, value):
    """Sets the first entry of the first leaf of that name."""

    def spoil(leaves):
        leaf = next(leaf for key, leaf in leaves.items() if key.startswith(name))
        leaf.reshape(-1)[0] = value

    return spoil


SPOIL = {
    "parameter NaN": set_first("state.params", np.nan),
    "optimiser infinite": set_first("state.opt_state", -np.inf),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", SPOIL)
def test_a_checkpoint_that_is_not_finite_is_not_trained_on(tally, half_toy, where):
    plant(half_toy, SPOIL[where])
    refuse("toy", half_toy, status=1, words=r"a parameter is not finite after epoch .*--overwrite")
    assert (half_toy / "failed" / "failure.json").exists()
    assert not (half_toy / "summary.json").exists()
    tally(f"checkpoint with {where}, run again", "one line, status 1, state kept apart")


def assert_ended_there(run, good, has_data=True):
    """A run that failed, whose last good checkpoint is of step ``good``."""
    assert run.end() == 1
    line = run.error()
    folder = run.workdir / "failed"
    facts = strict((folder / "failure.json").read_text())
    told = "there is no checkpoint yet" if good is None else "the last good checkpoint: "
    for words in ("is not finite", f"step {facts['step']} of the run", told, str(folder), "--learning_rate"):
        assert words in line
    assert facts["last_good_checkpoint"] == good
    with np.load(folder / "state.npz") as arrays:
        assert arrays["state.step"] == facts["step"] - 1
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert any(key.startswith("state.params") for key in arrays)
        assert any(key.startswith("batch") for key in arrays) == has_data
    metrics(run.workdir)
    assert not (run.workdir / "summary.json").exists()


DIVERGING = {  # Adam: the schedule-free optimiser squares the rate, so its state would not be finite before the loss
    "mnist": ["--learning_rate=1e30", "--optimizer=adam"],
    "density": ["--learning_rate=1e30"],
    "toy": ["--rate=1e20"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGING)
def test_a_run_that_diverges_ends_there(data, tally, tmp_path, name):
    run = Run(name, tmp_path / "run", *data[name], *DIVERGING[name])
    assert_ended_there(run, good=None, has_data=name != "density")
    tally(f"a learning rate that diverges ({name})", "ends at that step, status 1, state kept apart")


@pytest.mark.slow
def test_a_run_that_diverges_later_names_the_last_good_checkpoint(tally, half_toy):
    def enlarge(leaves):
        for name, leaf in leaves.items():
            if name.startswith("state.params"):
                leaf *= 1e30

    step = plant(half_toy, enlarge)
    assert_ended_there(Run("toy", half_toy), good=step)
    tally("parameters of 1e30 in a checkpoint, run again", "ends at that step, status 1, state kept apart")


@pytest.mark.parametrize("value", [np.nan, 2.5])
def test_images_of_floats_out_of_range_are_refused(tally, tmp_path, value):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.full((90, 5, 4), value), x_test=np.zeros((30, 5, 4)))
    refuse("mnist", tmp_path / "run", f"--dataset={path}", status=2, words=r"x_train: wanted images")
    tally("images of floats out of range, NaN among them", "one line, status 2")
