"""Planar flows fitted to a density on the plane (Xu et al. 2023, section 4.1, figure 2).

    python -m experiments.density

fits 15 layers to the paper's mixture in 1500 steps, which take about half a minute on two CPU cores, and writes figures
and their numbers into ``runs/``. The KL should be at most 0.001 nats for each of the seeds 0 to 7, and 0.0003 in the
median (the paper: 0.153). Narrower modes, where the usual form of the flow collapses onto one (KL = log 2 = 0.693):

    python -m experiments.density --scale=0.5                                                         # KL <= 0.02
    python -m experiments.density --scale=0.3 --steps=6000 --anneal_steps=6000 --learning_rate=0.03   # KL <= 0.1

U1 to U4 of Rezende & Mohamed (2015) take a minute or two each; annealing makes U3 and U4 worse:

    python -m experiments.density --target=U1 --flows=32 --steps=6000

The same command resumes a run that was stopped; ``--workdir=DIR --eval_only`` draws the figures of a run again.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax import PlanarFlow, init_planar, plotting
from planar_vae_jax.flows.distribution import first_layers, shown_layers
from planar_vae_jax.flows.nonlinearities import NONLINEARITIES
from planar_vae_jax.flows.targets import TARGETS, Target, get_target
from planar_vae_jax.plotting.curves import kl_curve
from planar_vae_jax.plotting.density import density_fit, layer_densities
from planar_vae_jax.runs import RunError, as_run_error
from planar_vae_jax.runs.config import RunFlags, UsageError, flag, parse_run
from planar_vae_jax.runs.console import run_main, say
from planar_vae_jax.runs.fit import fit
from planar_vae_jax.runs.folder import RunFolder, open_run
from planar_vae_jax.statistics import with_error
from planar_vae_jax.train import loop as training
from planar_vae_jax.train.optimizers import make_optimizer

LINES = 100  # lines of metrics per run, approximately
SAMPLES = 2**20  # draws for the final KL, where a KL of 1e-4 has a standard error of about 1.4e-5
CHUNK = 2**14  # samples on the device at a time


@dataclass(frozen=True)
class Config(RunFlags):
    """Flags of ``experiments.density``."""

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
    target: str = flag("mixture", "the density to fit", choices=TARGETS, named=True)
    scale: float = flag(1.0, "standard deviation of the mixture's modes", at_least=0.01, at_most=10.0)
    flows: int = flag(15, "K, the number of planar layers", at_least=0, at_most=10_000, named=True)
    steps: int = flag(1500, "optimisation steps", at_least=1, at_most=10_000_000)
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**32 - 1, named=True)
    batch_size: int = flag(2048, "samples per step", at_least=1, at_most=10_000_000)
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


class Estimate(NamedTuple):
    """A Monte Carlo mean."""

    value: float
    standard_error: float


def main(argv: list[str]) -> None:
    """Fits a flow and writes its figures; ``argv`` does not contain the program's name."""
    config = parse_run(Config, argv, __doc__, "density")
    check_flags(config)
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
        draw_density(run, target, flow, f"{setting}; KL = {with_error(kl, estimate.standard_error)} nats", setting)
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


def check_flags(config: Config) -> None:
    """Checks the flags against each other; raises UsageError."""
    if config.target != "mixture" and config.scale != 1.0:
        raise UsageError(f"--scale belongs to --target=mixture; got {config.scale!r} with {config.target}")
    if config.anneal_steps > config.steps:
        raise UsageError(
            f"--anneal_steps must be at most --steps={config.steps}, or the temperature never reaches 1; "
            f"got {config.anneal_steps}"
        )
    with as_run_error(ImportError):
        plotting.check_figures()


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


@jax.jit
def _after(flow: PlanarFlow, grid: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns samples ``[S, 2]`` of the flow of the first k layers, and its density on the grid."""
    part = first_layers(flow, k)  # one compiled program serves every k
    return part.sample(jax.random.key(1), (5000,)), jnp.exp(part.log_prob(grid))


@functools.partial(jax.jit, static_argnames="target")
def _truth(grid: jax.Array, target: Target) -> jax.Array:
    return jnp.exp(target.log_density(grid) - target.log_z)


def draw_density(run: RunFolder, target: Target, flow: PlanarFlow, title: str, setting: str) -> None:
    """Draws figure 2 (the target, samples of the flow, its density) and the density layer by layer."""
    side = np.linspace(-target.extent, target.extent, 300)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1), flow.mean.dtype)  # [rows: z2, columns: z1, 2]
    flow_length = flow.params.b.shape[0]

    truth = _truth(grid, target)
    shown = shown_layers(flow_length, 6)
    layers = {k: jax.tree.map(np.asarray, _after(flow, grid, jnp.int32(k))) for k in shown}
    (base, _), (samples, density) = layers[0], layers[flow_length]
    figure = density_fit(np.asarray(truth), base, samples, density, extent=target.extent, title=title)
    run.save_figure("density.png", figure)
    figure = layer_densities(
        {k: density for k, (_, density) in layers.items()},
        extent=target.extent,
        title=f"The base's density after k layers\n({setting})",
    )
    run.save_figure("layers.png", figure)


def draw_loss(run: RunFolder, lines: list[dict[str, float]], setting: str) -> None:
    """Draws the KL against the steps, from the lines of metrics."""
    steps, kl = (np.array([line.get(name) for line in lines], np.float64) for name in ("step", "kl"))
    run.save_figure("loss.png", kl_curve(steps, kl, title=f"KL(q || p) while learning ({setting})"))


# The same arguments give the same object, so that runs in one process share their programs.
shared_target = functools.lru_cache(2)(get_target)
shared_loss, shared_optimizer = functools.lru_cache(2)(make_loss), functools.lru_cache(2)(adam)


if __name__ == "__main__":
    run_main(main)
