"""The density experiment from its command line, and its estimates against quadrature."""

import json
import re
import runpy
import sys
from html import unescape

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import precision
from html_pages import Page, missing

from experiments import density
from planar_vae_jax import Planar, PlanarFlow
from planar_vae_jax.flows.targets import TARGETS, get_target
from planar_vae_jax.plotting.curves import kl_curve
from planar_vae_jax.runs import _signals as signals
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError
from planar_vae_jax.train import loop as training

FIGURES = {"density.png", "layers.png", "loss.png"}
FILES = {"config.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints", ".lock", *FIGURES}
NUMBERS = ("final_loss", "kl", "kl_se", "log_z", "seconds")


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def few_samples(monkeypatch):
    """A 64th of the samples for runs whose figures do not matter."""
    monkeypatch.setattr(density, "SAMPLES", 2**14)


def run(workdir, *flags):
    tiny = ["--flows=2", "--steps=30", "--batch_size=32"]
    density.main([*tiny, f"--workdir={workdir}", *flags])
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without flags."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(density, "SAMPLES", 2**14)
        run(workdir)
    return workdir


def random_flow(seed=0, flow_length=4, scale=1.0, h="tanh"):
    rng = np.random.default_rng(seed)
    u, w = scale * rng.normal(size=(2, flow_length, 2)).astype(np.float32)
    mean, log_std = 0.3 * rng.normal(size=(2, 2)).astype(np.float32)
    b = np.full(flow_length, 0.2 * scale, np.float32)
    return jax.tree.map(jnp.asarray, PlanarFlow(Planar(u, w, b), mean, log_std, h=h))


log_prob = jax.jit(lambda flow, z: flow.log_prob(z))  # the flow is an argument: compiled once for all of a shape


def on_a_grid(flow, extent=9.0, points=600):
    """``(z, log q(z), what each z stands for of q's mass)`` by the inverse's density, in float64."""
    side = ((np.arange(points) + 0.5) / points * 2 - 1) * extent
    z = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2).astype(np.float32)
    log_q = np.asarray(log_prob(flow, z), np.float64)
    return z, log_q, np.exp(log_q) * (2 * extent / points) ** 2


def quadrature(grid, target):
    """``(integral of q, KL(q || p))``."""
    z, log_q, q = grid
    log_p = np.asarray(jax.jit(target.log_density)(z), np.float64)
    return np.sum(q), np.sum(q * (log_q - log_p)) + target.log_z


def test_another_seed_compiles_nothing(few_samples, plain, tmp_path, caplog):
    # The first test: programs are kept for two losses alone.
    assert json.loads((plain / "summary.json").read_text())["seed"] == 0
    with jax.log_compiles():
        run(tmp_path, "--seed=1")
    assert not [line for line in caplog.messages if line.startswith("Compiling")]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--scale=0.5", "--learn_base", "--h=softsign", "--anneal_steps=10"),
        ("--target=U3", "--flows=0", "--steps=1", "--seed=4294967295"),
    ],
)
def test_a_run_writes_its_files_and_its_numbers_agree(few_samples, plain, tmp_path, flags):
    workdir = tmp_path if flags else plain
    summary = run(workdir, *flags) if flags else json.loads((plain / "summary.json").read_text())
    assert {path.name for path in workdir.iterdir()} == FILES
    assert all(np.isfinite(summary[name]) for name in NUMBERS)
    assert summary["kl"] == pytest.approx(summary["final_loss"] + summary["log_z"], abs=1e-12)
    assert set(summary) >= {"target", "flows", "steps", "seed", "samples"}
    config = json.loads((workdir / "config.json").read_text())["flags"]
    assert {name: summary[name] for name in ("target", "flows", "steps", "seed")} == {
        name: config[name] for name in ("target", "flows", "steps", "seed")
    }
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == config["steps"]
    assert all(line["kl"] == pytest.approx(line["loss"] + summary["log_z"], abs=1e-5) for line in lines)
    assert ("annealed_loss" in lines[0]) == ("--anneal_steps=10" in flags)
    assert lines[-1].get("temperature", 1.0) == 1.0


def test_the_page_has_every_figure_and_picture_and_the_code_that_loads_the_flow(plain):
    html = (plain / "report.html").read_text()
    page, summary = Page(html), json.loads((plain / "summary.json").read_text())
    assert missing(page, summary) == []
    assert {page.png(number) for number in range(3)} == {(plain / name).read_bytes() for name in FIGURES}
    (code,) = re.findall(r"<code>(from pathlib.*?)</code>", html, re.DOTALL)
    found = {}
    exec(unescape(code), found)
    estimate = density.free_energy(found["flow"], get_target("mixture"), samples=2**14)
    assert estimate.value == pytest.approx(summary["kl"], rel=1e-5)


@pytest.mark.parametrize("mode", ["no NaN", pytest.param("64-bit types", marks=pytest.mark.slow)])
def test_a_run_works_in_jaxs_modes(few_samples, tmp_path, mode):
    with precision(np.float64) if mode == "64-bit types" else jax.debug_nans(True):
        assert np.isfinite(run(tmp_path, "--learn_base")["kl"])


def fit(target, *, flow_length, steps, batch_size, **options):
    """Trained without a folder: the final flow and the info of every step."""
    loss = density.make_loss(target, batch_size=batch_size, **options)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    key = jax.random.key(5)
    flow = density.init_flow(key, flow_length, "tanh")

    @jax.jit
    def go(flow, key):
        state = training.init_state(flow, optimizer)
        info = training.empty_info(loss, state, None, key, steps)
        return training.train_steps(loss, optimizer, state, info, None, None, key, 0, steps)

    state, info = go(flow, key)
    return state.params, info


def test_training_lowers_the_kl_and_its_estimate_is_the_one_by_quadrature():
    target = get_target("mixture", scale=0.7)
    flow, info = fit(target, flow_length=8, steps=300, batch_size=256)
    assert info.figures["loss"][0] > 1.0
    assert not np.any(flow.mean)  # not learned unless asked
    assert not np.any(flow.log_std)
    estimate = density.free_energy(flow, target)
    integral, kl = quadrature(on_a_grid(flow), target)
    assert integral == pytest.approx(1.0, abs=1e-4)
    assert kl < 0.1  # a flow on one mode of the two has 0.69
    assert abs(estimate.value - kl) < 5 * estimate.standard_error + 1e-5
    assert estimate.standard_error < 1e-3


@pytest.fixture(scope="module")
def mild():
    """A flow, on a grid too. A mild one: the quadrature must see all of q, and U's log p falls like a square."""
    flow = random_flow(scale=0.7)
    return flow, on_a_grid(flow)


@pytest.mark.parametrize("name", TARGETS)
def test_the_estimate_for_a_random_flow_is_the_one_by_quadrature(mild, name):
    flow, grid = mild
    target = get_target(name)
    estimate = density.free_energy(flow, target, samples=2**18)
    integral, kl = quadrature(grid, target)
    assert integral == pytest.approx(1.0, abs=1e-3)
    assert abs(estimate.value + target.log_z - kl) < 5 * estimate.standard_error + 1e-3


@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_the_density_of_a_sample_is_the_same_forwards_and_by_the_inverse(h):
    @jax.jit
    def both(flow, key):
        z, log_q = flow.sample_and_log_prob(key, (200,))
        return log_q, flow.log_prob(z)

    np.testing.assert_allclose(*both(random_flow(seed=1, h=h), jax.random.key(0)), atol=1e-3)


def test_a_layer_that_died_out_does_not_spoil_the_estimate():
    # Adam can drive a layer's w and u to 1e-27; with the parameters as constants XLA folded it to NaN.
    flow = random_flow()
    dead = jax.tree.map(np.array, flow.params)
    dead.w[1] = [1.8e-28, -4.0e-27]
    dead.u[1] = 0.1 * dead.w[1]
    without = jax.tree.map(lambda leaf: np.delete(leaf, 1, axis=0), dead)
    estimates = [
        density.free_energy(PlanarFlow(one, flow.mean, flow.log_std), get_target("U2"), samples=2**14)
        for one in (dead, without)
    ]
    assert estimates[0].value == pytest.approx(estimates[1].value, rel=1e-4)


def test_the_base_is_learned_if_asked_and_temperatures_grow_from_a_hundredth_to_one():
    flow, info = fit(get_target("U2"), flow_length=2, steps=6, batch_size=8, learn_base=True, anneal_steps=4)
    assert np.all(flow.mean != 0)
    assert np.all(flow.log_std != 0)
    np.testing.assert_allclose(info.figures["temperature"], [0.01, 0.26, 0.51, 0.76, 1.0, 1.0], rtol=1e-6)


def test_a_tempered_loss_weighs_the_energy_alone():
    flow, key = random_flow(), jax.random.key(3)
    loss = jax.jit(density.make_loss(get_target("U2"), batch_size=64, anneal_steps=100))
    at = [float(loss(flow, None, key, np.int32(step))[0]) for step in (0, 49, 99)]
    assert at[1] == pytest.approx(at[0] + 0.49 / 0.99 * (at[2] - at[0]), rel=1e-5)  # temperatures 0.01, 0.5, 1.0
    plain = jax.jit(density.make_loss(get_target("U2"), batch_size=64))(flow, None, key, np.int32(0))[0]
    assert at[2] == pytest.approx(float(plain), rel=1e-6)


def test_the_curve_is_drawn_where_estimates_are_below_zero():
    figure = kl_curve(np.arange(1, 11), np.full(10, -0.1), title="")
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
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so(few_samples, tmp_path):
    with pytest.raises(RunError, match=r"the (loss|gradient) .*is not finite"):
        run(tmp_path, "--learning_rate=1e30", "--scale=0.01")
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "failed" / "state.npz").exists()


def test_a_mistake_is_one_line_and_a_status_without_traceback(tmp_path, monkeypatch, capsys):
    # As `python -m experiments.density`, without a process for it as in test_mnist.
    monkeypatch.setattr(sys, "argv", ["density", f"--workdir={tmp_path}", "--steps=0"])
    for name in ("install", "ignore"):
        monkeypatch.setattr(signals, name, lambda: None)
    monkeypatch.delitem(sys.modules, "experiments.density")  # or Python warns of a second one
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.density", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == ["error: --steps must be at least 1; got 0"]
