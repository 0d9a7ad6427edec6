"""Planar flows fitted to a density: to one that is known up to a constant, or to points.

A density on the plane that is known up to a constant is fitted by minimising the KL divergence from the flow to it (Xu
et al. 2023, section 4.1, figure 2).

    python -m experiments.density

fits 15 layers to the paper's mixture in 1500 steps, which take about half a minute on two CPU cores, and writes figures
and their numbers into ``runs/``. The KL should be at most 0.001 nats for each of the seeds 0 to 7, and 0.0003 in the
median (the paper: 0.153). Narrower modes, where the usual form of the flow collapses onto one (KL = log 2 = 0.693):

    python -m experiments.density --scale=0.5                                                         # KL <= 0.02
    python -m experiments.density --scale=0.3 --steps=6000 --anneal_steps=6000 --learning_rate=0.03   # KL <= 0.1

U1 to U4 of Rezende & Mohamed (2015) take a minute or two each; annealing makes U3 and U4 worse:

    python -m experiments.density --target=U1 --flows=32 --steps=6000

Points are fitted by maximum likelihood: those of a file with floats [N, D], D at most 100, or draws from a target.

    python -m experiments.density --target=points.npy
    python -m experiments.density --target=two_moons

takes about a minute. The log-likelihood of held-out points should be -1.02 nats on two moons and -2.14 on eight
Gaussians (standardised: -1.84 and -1.415), about 0.01 below that of the density from which they are drawn.

The same command resumes a run that was stopped; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax import PlanarDensity, PlanarFlow, init_planar, plotting
from planar_vae_jax.data import DataError, Points, assemble_points, read_points
from planar_vae_jax.flows.distribution import first_layers, shown_layers
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES
from planar_vae_jax.flows.targets import POINT_TARGETS, TARGETS, Target, draw_points, get_target
from planar_vae_jax.plotting.curves import kl_curve, loss_curves
from planar_vae_jax.plotting.density import density_fit, layer_densities
from planar_vae_jax.plotting.pairs import point_pairs
from planar_vae_jax.runs import RunError, as_run_error, replacing
from planar_vae_jax.runs.config import RunFlags, UsageError, flag, parse_run
from planar_vae_jax.runs.console import run_main, say
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import RunFolder, open_run
from planar_vae_jax.statistics import means_and_errors, with_error
from planar_vae_jax.train import loop as training
from planar_vae_jax.train.optimizers import make_optimizer

LINES = 100  # lines of metrics per run, approximately
SAMPLES = 2**20  # draws for the final KL, where a KL of 1e-4 has a standard error of about 1.4e-5
CHUNK = 2**14  # samples on the device at a time
DRAWN = 10_000  # points drawn from a target, in each split
BATCH_SIZE = 512  # points per step, if there are many
LONGEST = 1000  # steps between two lines of metrics, when fitting points
PAIRED = 6  # dimensions in the picture of pairs


@dataclass(frozen=True)
class Config(RunFlags):
    """Flags of ``experiments.density``, with the defaults of densities that are known up to a constant."""

    usage = """\
from pathlib import Path

import jax
from experiments.density import init_flow
from planar_vae_jax.runs.checkpoints import fill_params, read_checkpoint
from planar_vae_jax.runs.config import read_config

flags = read_config("WORKDIR")["flags"]
like = jax.eval_shape(lambda: init_flow(jax.random.key(0), flags["flows"], flags["h"]))
flow = fill_params(read_checkpoint(Path("WORKDIR") / "checkpoints").leaves, like)
z, log_q = flow.sample_and_log_prob(jax.random.key(0), (1000,))"""
    target: str = flag(
        "mixture",
        f"the density to fit: {', '.join(TARGETS)}; or points: {', '.join(POINT_TARGETS)}, or FILE.npy with floats "
        "[N, D]",
        named=True,
    )
    direction: str = flag(
        None,
        "of points; density: the layers carry data to noise, which learns faster; sampling: noise to data; default: "
        "density",
        choices=("density", "sampling"),
    )
    scale: float = flag(1.0, "standard deviation of the mixture's modes", at_least=0.01, at_most=10.0)
    flows: int = flag(
        15, "K, the number of planar layers; default for points: 32", at_least=0, at_most=10_000, named=True
    )
    steps: int = flag(1500, "optimisation steps; default for points: 4000", at_least=1, at_most=10_000_000)
    seed: int = flag(
        0, "seed of everything random, but for points and their splits", at_least=0, at_most=2**32 - 1, named=True
    )
    batch_size: int = flag(
        2048,
        f"samples per step; default for points: {BATCH_SIZE}, or a quarter of the training points if that is less",
        at_least=1,
        at_most=10_000_000,
    )
    learning_rate: float = flag(0.05, "learning rate of Adam, which decays to 0 by a cosine", above=0.0, at_most=1e30)
    clip_norm: float = flag(
        0.0, "scales gradients of a greater norm down to this norm; 0: no clipping", at_least=0.0, at_most=1e30
    )
    anneal_steps: int = flag(
        0, "steps over which the temperature of log p(z) grows from 0.01 to 1 (Rezende & Mohamed); 0: none", at_least=0
    )
    checkpoint_every: int = flag(
        20, f"lines of metrics ({LINES} a run) between checkpoints; there is one at the end", at_least=1, resumable=True
    )
    learn_base: bool = flag(False, "also learn mean and standard deviations of the base distribution")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))


def with_default(name: str, default: Any) -> Any:
    """Returns a field of :class:`Config` with another default."""
    (field,) = (field for field in dataclasses.fields(Config) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclass(frozen=True)
class PointsConfig(Config):
    """The same flags, with the defaults of points."""

    usage = """\
from pathlib import Path

import numpy as np
from planar_vae_jax import Planar, PlanarDensity

fitted = np.load(Path("WORKDIR") / "density.npz")
layers, affine = Planar(fitted["u"], fitted["w"], fitted["b"]), (fitted["loc"], fitted["log_scale"])
density = PlanarDensity(layers, *affine, h=str(fitted["h"]), inverted=bool(fitted["inverted"]))
# density.log_prob(x), density.sample(key, n): in the units of the points"""
    direction: str = with_default("direction", "density")
    flows: int = with_default("flows", 32)
    steps: int = with_default("steps", 4000)
    batch_size: int = with_default("batch_size", None)


class Estimate(NamedTuple):
    """A Monte Carlo mean."""

    value: float
    standard_error: float


def main(argv: list[str]) -> None:
    """Fits a density and writes its figures; ``argv`` does not contain the program's name."""
    config = parse_run(Config, argv, __doc__, "density")
    if config.target in TARGETS:
        check_flags(config)
        fit_known(config)
    else:
        points_config = parse_run(PointsConfig, argv, __doc__, "density")
        check_flags(points_config)
        fit_points(points_config, load_points(points_config.target))


def check_flags(config: Config) -> None:
    """Checks the flags against each other; raises UsageError."""
    known, of_points = config.target in TARGETS, config.target in POINT_TARGETS or config.target.endswith(".npy")
    if not known and not of_points:
        names = ", ".join((*TARGETS, *POINT_TARGETS))
        raise UsageError(f"--target must be one of {names}, or FILE.npy; got {config.target!r}")
    if config.target != "mixture" and config.scale != 1.0:
        raise UsageError(f"--scale belongs to --target=mixture; got {config.scale!r} with {config.target}")
    for name in ("anneal_steps", "learn_base") if of_points else ("direction",):
        if getattr(config, name) != getattr(Config, name):
            targets = (
                f"{TARGETS[0]}, {', '.join(TARGETS[1:])}" if of_points else f"{', '.join(POINT_TARGETS)}, FILE.npy"
            )
            raise UsageError(f"--{name} belongs to the targets {targets}; got it with {config.target}")
    if config.anneal_steps > config.steps:
        raise UsageError(
            f"--anneal_steps must be at most --steps={config.steps}, or the temperature never reaches 1; "
            f"got {config.anneal_steps}"
        )
    with as_run_error(ImportError):
        plotting.check_figures()


# --- Densities that are known up to a constant


def fit_known(config: Config) -> None:
    """Fits a flow to a target in ``TARGETS`` by minimising KL(q || p)."""
    with open_run(config, "density") as run:
        if run.finished:
            return

        target = shared_target(config.target, scale=config.scale)
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        flow = jax.jit(init_flow, static_argnums=(1, 2))(init_key, config.flows, config.h)
        loss = shared_loss(
            target,
            batch_size=config.batch_size,
            anneal_steps=config.anneal_steps,
            learn_base=config.learn_base,
        )
        optimizer = shared_optimizer(config.learning_rate, config.steps, config.clip_norm)

        fitted = fit(
            run,
            loss,
            optimizer,
            flow,
            train_key,
            steps=config.steps,
            steps_per_epoch=-(-config.steps // LINES),
            show=("loss", "kl"),
            unit="step",
        )

        flow, steps = fitted.params, fitted.lines[-1]["step"]
        estimate = free_energy(flow, target)
        if not math.isfinite(estimate.value):
            raise RunError(
                f"the loss of the final samples is not finite; {run.workdir} holds the checkpoints of the fit"
            )
        kl = estimate.value + target.log_z
        name = f"mixture, standard deviation {config.scale:g}" if target.name == "mixture" else target.name
        kind = f"{f' {config.h}' * (config.h != 'tanh')}{', learned base' * config.learn_base}"
        setting = f"{name}; K = {config.flows}{kind}, {steps} steps"
        extent = target.extent
        with_kl = f"{setting}; KL = {with_error(kl, estimate.standard_error)} nats"
        draw_density(run, flow, truth(target, plane(extent)), extent, with_kl, setting)
        draw_loss(run, fitted.lines, setting)
        summary = {
            "target": config.target,
            "scale": config.scale if config.target == "mixture" else None,
            "flows": config.flows,
            "steps": steps,
            "seed": config.seed,
            "final_loss": estimate.value,
            "final_loss_se": estimate.standard_error,
            "kl": kl,
            "kl_se": estimate.standard_error,
            "log_z": target.log_z,
            "samples": SAMPLES,
            "seconds": run.seconds(),
        }
        run.finish(summary)
        say(f"KL(q || p) = {with_error(kl, estimate.standard_error)} nats; log Z {target.log_z:.5f}")


def init_flow(key: jax.Array, flow_length: int, h: str) -> PlanarFlow:
    """Returns a flow with a standard normal base on the plane and layers near the identity."""
    return PlanarFlow(init_planar(key, flow_length, 2), jnp.zeros(2), jnp.zeros(2), h=h)


def adam(learning_rate: float, steps: int, clip_norm: float) -> optax.GradientTransformation:
    """Returns Adam with a learning rate that decays to 0 by a cosine."""
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    return make_optimizer("adam", learning_rate=rate, clip_norm=clip_norm)


def make_loss(target: Target, *, batch_size: int, anneal_steps: int = 0, learn_base: bool = False) -> training.Loss:
    """Returns the loss ``E_q[log q(z) - beta log p(z)]`` in nats; it takes no batch, but draws ``z`` by its key.

    ``beta = min(1, 0.01 + t / anneal_steps)`` at step t (Rezende & Mohamed 2015, section 6.1). The figure ``loss`` is
    the value at ``beta = 1``, the free energy KL(q || p) - log Z.
    """

    def loss(flow: PlanarFlow, _: None, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if not learn_base:
            fixed = jax.lax.stop_gradient((flow.mean, flow.log_std))
            flow = dataclasses.replace(flow, mean=fixed[0], log_std=fixed[1])
        z, log_q = flow.sample_and_log_prob(key, (batch_size,))
        log_p = target.log_density(z)
        plain = jnp.mean(log_q - log_p)
        figures = {"loss": plain, "kl": plain + target.log_z}
        if not anneal_steps:
            return plain, figures
        beta = jnp.minimum(1.0, 0.01 + step.astype(z.dtype) / anneal_steps)
        annealed = jnp.mean(log_q - beta * log_p)
        return annealed, {**figures, "annealed_loss": annealed, "temperature": beta}

    return loss


def free_energy(flow: PlanarFlow, target: Target, *, seed: int = 0, samples: int | None = None) -> Estimate:
    """Estimates ``E_q[log q(z) - log p(z)]`` in nats, chunk by chunk.

    ``samples`` (default: ``SAMPLES``) must be a multiple of ``CHUNK``.
    """
    samples = samples or SAMPLES
    keys = jax.random.split(jax.random.key(seed), samples // CHUNK)
    means, variances = (np.asarray(moment, np.float64) for moment in _moments(flow, keys, target, CHUNK))
    variance = np.mean(variances) + np.var(means)  # within the chunks and between them
    return Estimate(float(np.mean(means)), float(np.sqrt(variance / samples)))


# The flow is an argument of the compiled functions, so that they are not compiled again for each flow.
@functools.partial(jax.jit, static_argnames=("target", "size"))
def _moments(flow: PlanarFlow, keys: jax.Array, target: Target, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of ``log q(z) - log p(z)`` over ``size`` draws for each key."""

    def chunk(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, log_q = flow.sample_and_log_prob(key, (size,))
        values = log_q - target.log_density(z)
        return jnp.mean(values), jnp.var(values)

    return jax.lax.map(chunk, keys)


def draw_loss(run: RunFolder, lines: list[dict[str, float]], setting: str) -> None:
    """Draws the KL against the steps, from the lines of metrics."""
    steps, kl = (np.array([line.get(name) for line in lines], np.float64) for name in ("step", "kl"))
    run.save_figure("loss.png", kl_curve(steps, kl, title=f"KL(q || p) while learning ({setting})"))


# --- Points


def load_points(target: str) -> Points:
    """Returns the points of a target in ``POINT_TARGETS`` or of a npy file; raises UsageError.

    The points of a target and the split of a file are always the same, so that the figures of seeds compare.
    """
    if target in POINT_TARGETS:
        return drawn_points(target, seed=0)
    try:
        return read_points(target)
    except DataError as error:
        raise UsageError(f"--target: {error}") from None


def drawn_points(target: str, seed: int) -> Points:
    """Draws ``DRAWN`` points of a target for each split."""
    splits = np.split(draw_points(target, 3 * DRAWN, seed), 3)
    return assemble_points(target, f"draws with the seed {seed}", *splits)


def fit_points(config: PointsConfig, points: Points) -> None:
    """Fits a ``PlanarDensity`` to points by maximum likelihood; the validation points choose the checkpoint."""
    size = len(points.train)
    batch_size = min(BATCH_SIZE, max(1, size // 4))
    config = dataclasses.replace(config, batch_size=config.batch_size or batch_size)
    if config.batch_size > size:
        name = f"{size} training points of {points.name}"
        raise UsageError(f"--batch_size must be at most the {name}; got {config.batch_size}")
    with open_run(config, "density", points.identity(), defaults={"batch_size": batch_size}) as run:
        if run.finished:
            return

        dtype = jnp.zeros(()).dtype
        train, valid, test = (points.standardised(split, dtype) for split in (points.train, points.valid, points.test))
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        begin = jax.jit(PlanarDensity.init, static_argnums=(1, 2), static_argnames=("h", "inverted"))
        density = begin(init_key, config.flows, points.dim, h=config.h, inverted=config.direction == "density")
        on_device = jnp.asarray(valid)

        # A line of metrics is about the same number of steps whatever the number of points: each of its batches is
        # drawn from as many copies of the points as it takes.
        steps_per_line = min(-(-config.steps // LINES), LONGEST)
        copies = -(-steps_per_line * config.batch_size // size)
        fitted = fit(
            run,
            negative_log_likelihood,
            shared_optimizer(config.learning_rate, config.steps, config.clip_norm),
            density,
            train_key,
            data=jnp.asarray(np.tile(train, (copies, 1))),
            batch_size=config.batch_size,
            steps=config.steps,
            steps_per_epoch=steps_per_line,
            report=lambda density: {"validation_loss": -float(jnp.mean(log_probs(density, on_device)))},
            score="validation_loss",
            patience=-(-config.steps // steps_per_line) + 1,  # never reached: it only chooses the best checkpoint
            show=("loss", "validation_loss"),
            unit="step",
        )

        density, best_step = fitted.params, fitted.lines[fitted.epoch - 1]["step"]
        figures = test_figures(config.target, points, np.asarray(log_probs(density, jnp.asarray(test)), np.float64))
        if not all(map(math.isfinite, figures.values())):
            raise RunError(f"the log-likelihood of a test point is not finite; {run.workdir} holds the checkpoints")
        held_out = with_error(figures["log_likelihood"], figures["log_likelihood_se"])
        kind = f"{f' {config.h}' * (config.h != 'tanh')}, {config.direction} direction"
        setting = f"{points.name}; K = {config.flows}{kind}, {config.steps} steps"
        title = f"{setting}; log-likelihood of test points {held_out} nats"
        if points.dim == 2:
            heading, extent, histogram = point_histogram(config.target, points, train)
            units = "axes: standard deviations of the points"
            draw_density(run, density, histogram, extent, f"{title}\n({units})", f"{setting}; {units}", heading)
        else:
            draw_pairs(run, points, density, title)
        draw_likelihood(run, fitted.lines, points, title)
        save_density(run, density, points)
        summary = {
            "target": config.target,
            "direction": config.direction,
            "dim": points.dim,
            "flows": config.flows,
            "steps": config.steps,
            "best_step": best_step,
            "seed": config.seed,
            "points": {"train": size, "validation": len(valid), "test": len(test)},
            "test": figures,
            "seconds": run.seconds(),
        }
        run.finish(summary)
        say(f"log-likelihood of {len(test)} test points: {held_out} nats each, at step {best_step}")
        if "kl" in figures:
            say(f"KL(p || q) = {with_error(figures['kl'], figures['kl_se'])} nats")


def negative_log_likelihood(
    density: PlanarDensity, batch: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a fit to points, in nats per standardised point."""
    loss = -jnp.mean(density.log_prob(batch))
    return loss, {"loss": loss}


@jax.jit
def log_probs(density: PlanarDensity, points: jax.Array) -> jax.Array:
    """Returns ``log p(x)`` ``[N]`` of points ``[N, D]``, chunk by chunk."""
    return jax.lax.map(density.log_prob, points, batch_size=min(CHUNK, len(points)))


def test_figures(target: str, points: Points, log_prob: np.ndarray) -> dict[str, float]:
    """Returns means over the test points with their standard errors, in nats per point.

    Args:
        target: of the run.
        points: those of the run.
        log_prob: ``[N]``, the log-densities of the standardised test points.

    Returns:
        ``log_likelihood``, in the units of the points; ``standardised_log_likelihood``, in units of standard deviations
        of the training points; and if the density p behind the points is known ``truth_log_likelihood``, which is that
        of p at the same points, and the difference ``kl``, an estimate of KL(p || q).
    """
    figures = {"log_likelihood": log_prob - points.log_volume, "standardised_log_likelihood": log_prob}
    if target in POINT_TARGETS:
        p = np.asarray(jax.jit(shared_target(target).log_density)(jnp.asarray(points.test)), np.float64)
        figures |= {"truth_log_likelihood": p, "kl": p - figures["log_likelihood"]}
    return {name: value for name, value in means_and_errors(figures).items() if value is not None}


def save_density(run: RunFolder, density: PlanarDensity, points: Points) -> None:
    """Writes ``density.npz``: the fields of the density in the units of the points."""
    loc = points.mean + points.std * np.asarray(density.loc, np.float64)
    log_scale = np.log(points.std) + np.asarray(density.log_scale, np.float64)
    dtype = density.loc.dtype
    affine = {"loc": loc.astype(dtype), "log_scale": log_scale.astype(dtype)}
    with replacing(run.workdir / "density.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **density.params._asdict(), **affine, h=density.h, inverted=density.inverted)


def point_histogram(target: str, points: Points, train: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Returns a heading, half the side of a square that holds nearly all points, and what is shown on the square.

    This is the density behind the points, if it is known, or else a histogram of the training points.

    Args:
        target: of the run.
        points: those of the run, on the plane.
        train: ``[N, 2]``, the standardised training points.
    """
    extent = 1.15 * float(np.quantile(np.max(np.abs(train), axis=1), 0.999))
    if target in POINT_TARGETS:
        behind = truth(shared_target(target), points.mean + points.std * plane(extent))
        return "density behind the points", extent, behind * math.exp(points.log_volume)
    bins = np.linspace(-extent, extent, 1 + min(80, round(2 * len(train) ** 0.4)))
    counts = np.histogram2d(train[:, 1], train[:, 0], bins)[0]  # rows are x2
    return "histogram of the points", extent, counts / (len(train) * (bins[1] - bins[0]) ** 2)


def draw_pairs(run: RunFolder, points: Points, density: PlanarDensity, title: str) -> None:
    """Draws pairs of at most ``PAIRED`` dimensions: the test points, and as many samples, at most 2000 of each."""
    tests = points.test[:2000]
    samples = points.mean + points.std * np.asarray(_samples(density, len(tests)), np.float64)
    dimensions = np.unique(np.linspace(0, points.dim - 1, PAIRED).round().astype(int)).tolist()
    title = f"{title}\n(black, below the diagonal: test points; blue, above it: samples)"
    run.save_figure("pairs.png", point_pairs(tests, samples, dimensions=dimensions, title=title))


@functools.partial(jax.jit, static_argnums=1)
def _samples(density: PlanarDensity, count: int) -> jax.Array:
    return density.sample(jax.random.key(1), count)


def draw_likelihood(run: RunFolder, lines: list[dict[str, float]], points: Points, title: str) -> None:
    """Draws the log-likelihoods of training batches and of the validation points, in the units of the points."""
    names = {"training batches": "loss", "validation points": "validation_loss"}
    steps = np.array([line["step"] for line in lines], np.float64)
    curves = {
        label: -np.array([line.get(name) for line in lines], np.float64) - points.log_volume
        for label, name in names.items()
    }
    figure = loss_curves(steps, curves, title=title, ylabel="log-likelihood (nats per point)", xlabel="step")
    run.save_figure("loss.png", figure)


# --- Pictures on the plane


def plane(extent: float) -> np.ndarray:
    """Returns a grid of points ``[rows: z2, columns: z1, 2]`` on ``[-extent, extent]^2``."""
    side = np.linspace(-extent, extent, 300)
    return np.stack(np.meshgrid(side, side), axis=-1)


def truth(target: Target, grid: np.ndarray) -> np.ndarray:
    """Returns the normalised density of a target at points ``[..., 2]``."""
    return np.asarray(_truth(jnp.asarray(grid), target))


@functools.partial(jax.jit, static_argnames="target")
def _truth(grid: jax.Array, target: Target) -> jax.Array:
    return jnp.exp(target.log_density(grid) - target.log_z)


@jax.jit
def _after(flow: PlanarFlow | PlanarDensity, grid: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns samples ``[S, 2]`` that have passed k layers, and their density on the grid."""
    part = first_layers(flow, k)  # one compiled program serves every k
    return part.sample(jax.random.key(1), (5000,)), jnp.exp(part.log_prob(grid))


def draw_density(
    run: RunFolder,
    flow: PlanarFlow | PlanarDensity,
    wanted: np.ndarray,
    extent: float,
    title: str,
    setting: str,
    heading: str = "target density",
) -> None:
    """Draws figure 2 (the target, samples of the flow, its density) and the density layer by layer.

    Args:
        run: the folder.
        flow: the density that was fitted.
        wanted: ``[N, N]``, what the first panel shows on ``[-extent, extent]^2``, under this heading.
        extent: half the side of the square that is shown.
        title: of figure 2.
        setting: of the run, for the other title.
        heading: of the first panel.
    """
    flow_length = flow.params.b.shape[0]
    grid = jnp.asarray(plane(extent), flow.params.u.dtype)
    shown = shown_layers(flow_length, 6)
    layers = {k: jax.tree.map(np.asarray, _after(flow, grid, jnp.int32(k))) for k in shown}
    (base, _), (samples, density) = layers[0], layers[flow_length]
    figure = density_fit(wanted, base, samples, density, extent=extent, title=title, heading=heading)
    run.save_figure("density.png", figure)
    figure = layer_densities(
        {k: density for k, (_, density) in layers.items()},
        extent=extent,
        title=f"The base's density after k layers\n({setting})",
    )
    run.save_figure("layers.png", figure)


# The same arguments give the same object, so that runs in one process share their programs.
shared_target = functools.lru_cache(2)(get_target)
shared_loss, shared_optimizer = functools.lru_cache(2)(make_loss), functools.lru_cache(2)(adam)


if __name__ == "__main__":
    run_main(main)
