"""The density experiment from its command line, and its estimates against quadrature."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import density
from experiments.density import Config
from experiments.files import RunError
from experiments.flags import UsageError
from experiments.resuming import open_run
from planar_vae_jax import plotting, training
from planar_vae_jax.flows import Planar
from planar_vae_jax.targets import TARGETS, get_target

FIGURES = {"density.png", "layers.png", "loss.png"}
FILES = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", ".lock", *FIGURES}
NUMBERS = ("final_loss", "kl", "kl_standard_error", "log_z", "seconds")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a Python float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def few_samples(monkeypatch):
    """A 64th of the samples for runs whose figures do not matter."""
    monkeypatch.setattr(density, "SAMPLES", 2**14)


def run(workdir, *flags):
    tiny = ["--flows=2", "--steps=30", "--batch_size=32"]
    density.main([*tiny, f"--workdir={workdir}", *flags])
    return json.loads((workdir / "summary.json").read_text())


def fit(config, workdir, key):
    """Parameters, and the loss at temperature 1 of each step."""
    config = density.prepare(dataclasses.replace(config, workdir=str(workdir)))
    with open_run(config, "density") as run:
        run.begin()
        fitted = density.train(config, get_target(config.target, scale=config.scale), key, run)
    return fitted.state.params, np.asarray(fitted.info.aux)


def random_params(seed=0, flow_length=4):
    keys = jax.random.split(jax.random.key(seed), 5)
    flow = Planar(*(jax.random.normal(key, (flow_length, 2)) for key in keys[:2]), jnp.ones(flow_length) * 0.2)
    base = density.Base(0.3 * jax.random.normal(keys[3], (2,)), 0.3 * jax.random.normal(keys[4], (2,)))
    return density.Params(base, flow)


def quadrature(params, target, extent=9.0, points=600):
    """``(integral of q, KL(q || p))`` from the inverse's density on a grid, in float64 sums."""
    side = ((np.arange(points) + 0.5) / points * 2 - 1) * extent
    z = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), jnp.float32)
    log_q, log_p = (
        np.asarray(jax.jit(jax.vmap(function))(z), np.float64)
        for function in (lambda one: density.log_density(params, one), target.log_density)
    )
    q = np.exp(log_q) * (2 * extent / points) ** 2
    return np.sum(q), np.sum(q * (log_q - log_p)) + target.log_z


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--scale=0.5", "--learn_base", "--h=softsign", "--anneal_steps=10"),
        ("--target=U3", "--flows=0", "--steps=1", "--seed=4294967295"),
    ],
)
def test_a_run_writes_its_files_and_its_numbers_agree(few_samples, tmp_path, flags):
    summary = run(tmp_path, *flags)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert all(np.isfinite(summary[name]) for name in NUMBERS)
    assert summary["kl"] == pytest.approx(summary["final_loss"] + summary["log_z"], abs=1e-12)
    assert set(summary) >= {"target", "flows", "steps", "seed", "samples"}
    config = json.loads((tmp_path / "config.json").read_text())["flags"]
    assert {name: summary[name] for name in ("target", "flows", "steps", "seed")} == {
        name: config[name] for name in ("target", "flows", "steps", "seed")
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == config["steps"]
    assert lines[-1]["beta"] == 1.0
    assert all(line["kl"] == pytest.approx(line["loss"] + summary["log_z"]) for line in lines)


def test_parts_are_one_run_bit_for_bit(tmp_path):
    config = Config(flows=2, steps=29, batch_size=16, anneal_steps=20, learn_base=True)  # 14 parts of 2, one of 1
    target, key = get_target("mixture"), jax.random.key(5)
    params, losses = fit(config, tmp_path, key)
    init_key, steps_key = jax.random.split(key)
    loss = density.make_loss(target, batch_size=16, learn_base=True, h="tanh")
    optimizer = density.make_optimizer(config)
    state = training.init_state(jax.jit(density.init_params, static_argnums=1)(init_key, 2), optimizer)
    one_call = jax.jit(functools.partial(training.run_steps, loss, optimizer))
    state, info = one_call(state, density.temperatures(29, 20), steps_key)
    np.testing.assert_array_equal(losses, info.aux)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert all(np.all(leaf != 0) for leaf in params.base)


def test_training_lowers_the_kl_and_its_estimate_is_the_one_by_quadrature(tmp_path):
    config = Config(flows=8, steps=300, batch_size=256, scale=0.7)
    target = get_target("mixture", scale=0.7)
    params, losses = fit(config, tmp_path, jax.random.key(0))
    assert losses[0] > 1.0
    assert not any(np.any(leaf) for leaf in params.base)  # not learned unless asked
    estimate = density.free_energy(params, target, jax.random.key(1))
    integral, kl = quadrature(params, target)
    assert integral == pytest.approx(1.0, abs=1e-4)
    assert kl < 0.1  # a flow on one mode of the two has 0.69
    assert abs(estimate.value - kl) < 5 * estimate.standard_error + 1e-5
    assert estimate.standard_error < 1e-3


@pytest.mark.parametrize("name", TARGETS)
def test_the_estimate_for_a_random_flow_is_the_one_by_quadrature(name):
    # A mild flow: the quadrature must see all of q, and U's log p falls like a square.
    params = random_params()
    params = params._replace(flow=jax.tree.map(lambda leaf: 0.7 * leaf, params.flow))
    target = get_target(name)
    estimate = density.free_energy(params, target, jax.random.key(1), samples=2**18)
    integral, kl = quadrature(params, target)
    assert integral == pytest.approx(1.0, abs=1e-3)
    assert abs(estimate.value + target.log_z - kl) < 5 * estimate.standard_error + 1e-3


@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_the_density_of_a_sample_is_the_same_forwards_and_by_the_inverse(h):
    params = random_params(seed=1)
    epsilon = jax.random.normal(jax.random.key(0), (200, 2))
    z, log_q = jax.jit(jax.vmap(lambda one: density.sample(params, one, h)))(epsilon)
    inverse = jax.jit(jax.vmap(lambda one: density.log_density(params, one, h)))(z)
    np.testing.assert_allclose(log_q, inverse, atol=1e-3)


def test_a_layer_that_died_out_does_not_spoil_the_estimate():
    # Adam can drive a layer's w and u to 1e-27; with the parameters as constants XLA folded it to NaN.
    params = random_params()
    dead = jnp.array([1.8e-28, -4.0e-27])
    flow = params.flow._replace(u=params.flow.u.at[1].set(0.1 * dead), w=params.flow.w.at[1].set(dead))
    without = jax.tree.map(lambda leaf: jnp.delete(leaf, 1, axis=0), params.flow)
    target, key = get_target("U2"), jax.random.key(2)
    estimates = [density.free_energy(params._replace(flow=one), target, key, samples=2**14) for one in (flow, without)]
    assert estimates[0].value == pytest.approx(estimates[1].value, rel=1e-4)


def test_temperatures():
    np.testing.assert_allclose(density.temperatures(5, 4), [0.01, 0.26, 0.51, 0.76, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(density.temperatures(3, 0), [1.0, 1.0, 1.0])


def test_a_tempered_loss_weighs_the_energy_alone():
    target, params = get_target("U2"), random_params()
    loss = jax.jit(density.make_loss(target, batch_size=64, learn_base=True, h="tanh"))
    key = jax.random.key(3)
    cold, whole = loss(params, jnp.float32(0.0), key)  # E[log q]
    half, _ = loss(params, jnp.float32(0.5), key)
    assert float(half) == pytest.approx(float(cold + whole) / 2, rel=1e-5)


def test_the_curve_is_drawn_where_estimates_are_below_zero():
    figure = plotting.kl_curve(np.full(10, -0.1), title="")
    assert figure.axes[1].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target=U5", ["--target", "mixture, U1", "'U5'"]),
        ("--scale=0", ["--scale", "at least 0.01", "0.0"]),
        ("--scale=11", ["--scale", "at most 10", "11.0"]),
        ("--scale=nan", ["--scale", "finite", "nan"]),
        ("--scale=0.5 --target=U1", ["--scale", "mixture", "0.5", "U1"]),
        ("--flows=-1", ["--flows", "at least 0", "-1"]),
        ("--flows=1.5", ["flows", "1.5"]),
        ("--steps=0", ["--steps", "at least 1", "0"]),
        ("--seed=-1", ["--seed", "at least 0", "-1"]),
        ("--seed=4294967296", ["--seed", "at most", "4294967296"]),
        ("--batch_size=0", ["--batch_size", "at least 1", "0"]),
        ("--learning_rate=0", ["--learning_rate", "greater than 0", "0.0"]),
        ("--learning_rate=inf", ["--learning_rate", "finite", "inf"]),
        ("--anneal_steps=-1", ["--anneal_steps", "at least 0", "-1"]),
        ("--anneal_steps=31", ["--anneal_steps", "at most --steps=30", "31"]),
        ("--h=relu", ["--h", "tanh", "'relu'"]),
        ("--learn_base=maybe", ["learn_base", "maybe"]),
        ("--flos=3", ["flos", "flows"]),
        ("stray", ["stray"]),
        ("--workdir=/dev/null/run", ["--workdir", "/dev/null/run"]),
    ],
)
def test_bad_flags_are_refused_in_one_line_that_names_them(tmp_path, flags, words):
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "run", *flags.split())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_diverges_says_so(few_samples, tmp_path):
    with pytest.raises(RunError, match=r"the (loss|gradient) of step \d of part \d is not finite"):
        run(tmp_path, "--learning_rate=1e30", "--scale=0.01")
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "failed" / "state.npz").exists()


def test_from_the_shell_a_mistake_is_one_line_and_a_status_without_traceback(tmp_path):
    command = [sys.executable, "-m", "experiments.density", f"--workdir={tmp_path}", "--steps=0"]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines() == ["error: --steps must be at least 1; got 0"]


def test_the_default_folder_names_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = density.prepare(dataclasses.replace(Config(), target="U1", flows=3, seed=7))
    assert config.workdir == "runs/density-target=U1-flows=3-seed=7"
