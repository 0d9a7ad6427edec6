"""What is not finite, in a checkpoint, in the data or by itself: told, kept apart, and never passed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.resuming import parse_run
from planar_vae_jax.checkpoints import Checkpoints

from experiments import mnist
from faults.harness import FLAGS, Run, finish, metrics, refuse, result, steps, strict
from planar_vae_jax import training


def plant(workdir, flags, spoil, count=1):
    """Spoils the states of the newest checkpoints, with checksums that fit; returns their steps."""
    config = mnist.prepare(parse_run(mnist.Config, [*FLAGS["mnist"], *flags, f"--workdir={workdir}"], ""))
    images = mnist.load_data(config)
    model, optimizer = mnist.make_model(config, pixels=20), mnist.make_optimizer(config)
    epoch = mnist.compile_epoch(config, model, optimizer, mnist.device_pixels(images.x_train, config))
    state = training.init_state(model.init(jax.random.key(0)), optimizer)
    like = {"state": state, "info": epoch.info(state), "key": jax.random.key(0)}

    folder = workdir / "checkpoints"
    planted = steps(workdir)[-count:]
    checkpoints = Checkpoints(folder, keep=99)
    found = [checkpoints.restore_step(step, like) for step in planted]
    checkpoints.close()
    for step in planted:
        (folder / str(step)).rename(workdir.parent / f"sound-{step}")
    checkpoints = Checkpoints(folder, keep=99)
    for step, tree, meta in found:
        checkpoints.save(step, {**tree, "state": spoil(tree["state"])}, meta, score=1.0)
    checkpoints.close()
    return planted


def first_entry(tree, value):
    """The same with ``value`` as the first entry of its first floating-point leaf."""
    leaves, structure = jax.tree.flatten(tree)
    index = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    leaves[index] = jnp.ravel(leaves[index]).at[0].set(value).reshape(leaves[index].shape)
    return jax.tree.unflatten(structure, leaves)


SPOIL = {
    "parameter NaN": lambda state: state._replace(params=first_entry(state.params, jnp.nan)),
    "optimiser infinite": lambda state: state._replace(opt_state=first_entry(state.opt_state, -jnp.inf)),
}


@pytest.fixture
def standard_promotion():
    """Optax's Adam raises a Python float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("where", SPOIL)
def test_a_checkpoint_with_nan_is_passed_over(data, whole, tally, half, where):
    (step,) = plant(half, data["mnist"], SPOIL[where])
    run = finish("mnist", half, *data["mnist"])
    assert run.said(f"damaged/{step} is damaged (ValueError: not every parameter is finite)")
    assert result(half) == whole("mnist")
    tally(f"checkpoint with {where}, run again", "told, older used, same end bit for bit", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_if_every_checkpoint_holds_nan_none_is_whole(data, tally, half):
    plant(half, data["mnist"], SPOIL["parameter NaN"], count=len(steps(half)))
    refuse(
        "mnist", half, *data["mnist"], status=1, words=r"none of the \d checkpoints .* not every parameter is finite"
    )
    refuse("mnist", half, *data["mnist"], "--eval_only", status=1, words=r"none of the \d checkpoints")
    tally("every checkpoint with NaN, run again", "one line, status 1")


def assert_ended_there(run, good):
    """A run that failed, whose last good checkpoint is of step ``good``."""
    assert run.end() == 1
    line = run.error()
    folder = run.workdir / "failed"
    facts = strict((folder / "failure.json").read_text())
    told = "there is no checkpoint yet" if good is None else f"the last good checkpoint is of step {good}"
    for words in ("is not finite", f"(step {facts['step']} of the run)", told, str(folder), "--learning_rate"):
        assert words in line
    assert facts["last_good_checkpoint"] == good
    with np.load(folder / "state.npz") as arrays:
        assert arrays["step"] == facts["step"] - 1
        assert all(np.all(np.isfinite(array)) for array in arrays.values())
        assert any(key.startswith("params") for key in arrays)
        assert any(key.startswith("batch") for key in arrays)
    metrics(run.workdir)
    assert not (run.workdir / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "density"])
def test_a_run_that_diverges_by_itself_ends_there(data, tally, tmp_path, name):
    run = Run(name, tmp_path / "run", *data[name], "--learning_rate=1e30")
    assert_ended_there(run, good=None)
    tally(f"learning rate of 1e30 ({name})", "ends at that step, status 1, state kept apart")


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_that_diverges_later_names_the_last_good_checkpoint(data, tally, half):
    def enlarge(state):
        return state._replace(params=jax.tree.map(lambda leaf: 1e30 * leaf, state.params))

    (step,) = plant(half, data["mnist"], enlarge)
    assert_ended_there(Run("mnist", half, *data["mnist"]), good=step)
    tally("parameters of 1e30 in a checkpoint, run again", "ends at that step, status 1, state kept apart")


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_images_of_floats_are_refused(tally, tmp_path, value):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.full((90, 5, 4), value), x_test=np.zeros((30, 5, 4)))
    refuse("mnist", tmp_path / "run", f"--dataset={path}", status=2, words=r"wanted images \[N, H, W\] uint8")
    tally("images of floats, NaN among them", "one line, status 2")
