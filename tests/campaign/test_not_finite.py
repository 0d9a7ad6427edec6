"""What is not finite, in a checkpoint, in the data or by itself: told, kept apart, and never passed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from campaign.harness import Run, finish, metrics, refuse, result, steps, strict
from planar_vae_jax.runs import leaves as packing
from planar_vae_jax.runs import reading
from planar_vae_jax.runs.checkpoints import Checkpoints


def plant(workdir, spoil, count=1):
    """Spoils the states of the newest checkpoints, with checksums that fit; returns their steps."""
    folder = workdir / "checkpoints"
    planted = steps(workdir)[-count:]
    found = [(reading.read(folder / str(step)), reading.read_content(folder / str(step))["leaves"]) for step in planted]
    for step in planted:
        (folder / str(step)).rename(workdir.parent / f"sound-{step}")
    with pytest.MonkeyPatch.context() as patch, Checkpoints(folder, keep=99) as checkpoints:
        patch.setattr(packing, "pack", lambda packed: packed)
        for stored, entries in found:
            arrays = {name: plain(leaf) for name, leaf in stored.leaves.items()}
            spoil({name: array for name, array in arrays.items() if array.dtype == np.float32})
            vector = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays.values()])
            checkpoints.save(stored.step, (vector, entries), stored.meta, score=1.0)
    return planted


def plain(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(leaf) if is_key else leaf)


def set_first(name, value):
    """Sets the first entry of the first leaf of that name."""

    def spoil(leaves):
        leaf = next(leaf for key, leaf in leaves.items() if name in key)
        leaf.reshape(-1)[0] = value

    return spoil


SPOIL = {
    "parameter NaN": set_first("['state'].params", np.nan),
    "optimiser infinite": set_first("['state'].opt_state", -np.inf),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", SPOIL)
def test_a_checkpoint_with_nan_is_passed_over(data, whole, tally, half, where):
    (step,) = plant(half, SPOIL[where])
    run = finish("mnist", half, *data["mnist"])
    assert f"checkpoints/{step} " in " ".join(run.err)
    assert "is damaged (ValueError: not every parameter is finite)" in " ".join(run.err)
    assert result(half) == whole("mnist")
    tally(f"checkpoint with {where}, run again", "told, older used, same end bit for bit", 1)


@pytest.mark.slow
def test_if_every_checkpoint_holds_nan_none_is_whole(data, tally, half):
    plant(half, SPOIL["parameter NaN"], count=len(steps(half)))
    refuse(
        "mnist", half, *data["mnist"], status=1, words=r"none of the \d checkpoints .* not every parameter is finite"
    )
    refuse("mnist", half, *data["mnist"], "--eval_only", status=1, words=r"none of the \d checkpoints")
    tally("every checkpoint with NaN, run again", "one line, status 1")


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
        assert arrays["['state'].step"] == facts["step"] - 1
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert any(key.startswith("['state'].params") for key in arrays)
        assert any(key.startswith("['batch']") for key in arrays) == has_data
    metrics(run.workdir)
    assert not (run.workdir / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "density"])
def test_a_run_that_diverges_by_itself_ends_there(data, tally, tmp_path, name):
    # Adam: the schedule-free optimiser squares the rate, so its own state would not be finite before.
    flags = ["--learning_rate=1e30", *(["--optimizer=adam"] if name == "mnist" else [])]
    run = Run(name, tmp_path / "run", *data[name], *flags)
    assert_ended_there(run, good=None, has_data=name == "mnist")
    tally(f"learning rate of 1e30 ({name})", "ends at that step, status 1, state kept apart")


@pytest.mark.slow
def test_a_run_that_diverges_later_names_the_last_good_checkpoint(data, tally, half):
    def enlarge(leaves):
        for name, leaf in leaves.items():
            if "['state'].params" in name:
                leaf *= 1e30

    (step,) = plant(half, enlarge)
    assert_ended_there(Run("mnist", half, *data["mnist"]), good=step)
    tally("parameters of 1e30 in a checkpoint, run again", "ends at that step, status 1, state kept apart")


@pytest.mark.parametrize("value", [np.nan, 2.5])
def test_images_of_floats_out_of_range_are_refused(tally, tmp_path, value):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.full((90, 5, 4), value), x_test=np.zeros((30, 5, 4)))
    refuse("mnist", tmp_path / "run", f"--dataset={path}", status=2, words=r"x_train: wanted images")
    tally("images of floats out of range, NaN among them", "one line, status 2")
