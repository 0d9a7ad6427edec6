"""Planar flows fitted to a density on the plane (Xu et al. 2023, section 4.1, figure 2).

    python -m experiments.density

fits 15 layers to the paper's mixture in 1500 steps, about half a minute on two CPU cores, and writes figures and
their numbers into ``runs/``. To reach: KL <= 0.001 nats for each of the seeds 0 to 7, and <= 0.0003 in the median (the
paper: 0.153). Narrower modes, where the usual form collapses onto one of them (KL = log 2 = 0.693):

    python -m experiments.density --scale=0.5                                                         # KL <= 0.02
    python -m experiments.density --scale=0.3 --steps=6000 --anneal_steps=6000 --learning_rate=0.03   # KL <= 0.1

Rezende & Mohamed's (2015) U1 to U4, a minute or two each; annealing makes U3 and U4 worse:

    python -m experiments.density --target=U1 --flows=32 --steps=6000

A run that was stopped goes on when the same command is run again; ``--workdir=DIR --eval_only`` draws the figures of a
run again.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.files import RunError
from experiments.fitting import Course, Fitted, fit, load
from experiments.flags import UsageError, flag
from experiments.resuming import ResumableRun, RunFlags, default_workdir, open_run, parse_run
from experiments.runs import run_main
from planar_vae_jax import training
from planar_vae_jax.distributions import normal_log_prob
from planar_vae_jax.flows import Planar, init_planar, inverse_planar_flow, planar_flow
from planar_vae_jax.nonlinearities import NONLINEARITIES
from planar_vae_jax.targets import TARGETS, Target, get_target

PARTS = 25  # a run logs between parts of its steps; about so many
SAMPLES = 2**20  # of the final KL: a KL of 1e-4 has a standard error of about 1.4e-5
CHUNK = 2**14  # samples on the device at a time


@dataclass(frozen=True)
class Config(RunFlags):
    """Flags of ``experiments.density``."""

    EVALUATION_FLAGS: ClassVar = ()  # none may be another with --eval_only

    target: str = flag("mixture", "the density to fit", choices=TARGETS)
    scale: float = flag(1.0, "standard deviation of the mixture's modes", at_least=0.01, at_most=10.0)
    flows: int = flag(15, "K, the number of planar layers", at_least=0, at_most=10_000)
    steps: int = flag(1500, "optimisation steps", at_least=1, at_most=10_000_000)
    seed: int = flag(0, "everything random follows from it", at_least=0, at_most=2**32 - 1)
    workdir: str | None = flag(
        None, "folder for what the run writes; default runs/density-..., named after the flags", identity=False
    )
    batch_size: int = flag(2048, "samples a step", at_least=1, at_most=10_000_000)
    learning_rate: float = flag(0.05, "of Adam, decayed to 0 by a cosine", above=0.0, at_most=1e30)
    clip_norm: float = flag(
        0.0, "a gradient whose norm is greater is scaled down to it; 0: none is", at_least=0.0, at_most=1e30
    )
    anneal_steps: int = flag(
        0,
        "steps over which the temperature of log p(z) grows from 0.01 to 1 (Rezende & Mohamed); 0: none",
        at_least=0,
    )
    learn_base: bool = flag(False, "learn mean and standard deviations of the base distribution too")
    h: str = flag("tanh", "the flow's nonlinearity", choices=tuple(NONLINEARITIES))
    checkpoint_every: int = flag(
        5, f"lines of metrics ({PARTS} a run) between checkpoints; there is one at the end", at_least=1, identity=False
    )


class Base(NamedTuple):
    """The base distribution: ``z0 = mean + exp(log_std) * epsilon`` with ``epsilon ~ N(0, I)``."""

    mean: jax.Array  # [2]
    log_std: jax.Array  # [2]


class Params(NamedTuple):
    """A density on the plane."""

    base: Base
    flow: Planar


class Estimate(NamedTuple):
    """A Monte Carlo mean."""

    value: float
    standard_error: float


def main(argv: list[str]) -> None:
    """Fits, evaluates, draws and writes; ``argv`` without the program's name."""
    config = prepare(parse_run(Config, argv, __doc__))
    with open_run(config, "density") as run:
        if not run.finished:
            run.begin()
            carry_out(config, run)


def prepare(config: Config) -> Config:
    """Checks the flags against each other and fills in the defaults."""
    if config.target != "mixture" and config.scale != 1.0:
        raise UsageError(f"--scale belongs to --target=mixture; got {config.scale!r} with {config.target}")
    if config.anneal_steps > config.steps:
        raise UsageError(
            f"--anneal_steps must be at most --steps={config.steps}, or the temperature never reaches 1; "
            f"got {config.anneal_steps}"
        )
    workdir = config.workdir or default_workdir(config, "density", "target", "flows", "seed")
    return dataclasses.replace(config, workdir=workdir)


def carry_out(config: Config, run: ResumableRun) -> None:
    """Fits, or with ``--eval_only`` loads; then evaluates, draws and writes."""
    target = get_target(config.target, scale=config.scale)
    train_key, test_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    fitted = train(config, target, train_key, run)
    params, losses = fitted.state.params, np.asarray(fitted.info.aux)
    config = dataclasses.replace(config, steps=fitted.lines[-1]["step"])
    loss = free_energy(params, target, test_key, h=config.h)
    if not math.isfinite(loss.value):
        raise RunError(f"the loss of the final samples is not finite; {run.workdir} holds the checkpoints of the fit")
    draw(config, target, params, losses[: config.steps], loss, sample_key, run)
    summary = summarize(config, target, loss)
    run.finish(summary | {"seconds": run.seconds()})
    print(
        f"KL(q || p) = {summary['kl']:.5f} +- {loss.standard_error:.5f} nats: loss {loss.value:.5f}, "
        f"log Z {target.log_z:.5f}",
        flush=True,
    )


def init_params(key: jax.Array, flow_length: int) -> Params:
    """A standard normal base, and layers near the identity."""
    return Params(Base(jnp.zeros(2), jnp.zeros(2)), init_planar(key, flow_length, 2))


def sample(params: Params, epsilon: jax.Array, h: str = "tanh") -> tuple[jax.Array, jax.Array]:
    """One draw ``z [2]`` from ``epsilon [2] ~ N(0, I)``, and ``log q(z) = log q_0(z_0) - log_det``."""
    mean, log_std = params.base
    z0 = mean + jnp.exp(log_std) * epsilon
    zK, log_det = planar_flow(params.flow, z0, h=h)
    return zK, normal_log_prob(z0, mean, log_std) - log_det


def log_density(params: Params, z: jax.Array, h: str = "tanh") -> jax.Array:
    """``log q(z)`` at any point ``z [2]``, by the inverse: ``log q_0(z_0) + log|det dz_0/dz|``."""
    z0, log_det = inverse_planar_flow(params.flow, z, h=h)
    return normal_log_prob(z0, *params.base) + log_det


def make_loss(target: Target, *, batch_size: int, learn_base: bool, h: str) -> training.Loss:
    """The free energy ``E_q[log q(z) - beta log p(z)]``, whose batch is its temperature beta.

    Beside it the loss returns the free energy at ``beta = 1``: KL(q || p) - log Z, in nats.
    """

    def loss(params: Params, beta: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not learn_base:
            params = params._replace(base=jax.lax.stop_gradient(params.base))
        epsilon = jax.random.normal(key, (batch_size, 2))
        z, log_q = jax.vmap(lambda one: sample(params, one, h))(epsilon)
        log_p = jax.vmap(target.log_density)(z)
        return jnp.mean(log_q - beta * log_p), jnp.mean(log_q - log_p)

    return loss


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with a cosine decay to 0, after clipping if asked for."""
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam) if config.clip_norm else adam


def temperatures(steps: int, anneal_steps: int) -> jax.Array:
    """``beta [steps]``, ``min(1, 0.01 + t / anneal_steps)`` (Rezende & Mohamed 2015, section 6.1: 10000 steps)."""
    if anneal_steps == 0:
        return jnp.ones(steps)
    return jnp.minimum(1.0, 0.01 + jnp.arange(steps) / anneal_steps)


def train(config: Config, target: Target, key: jax.Array, run: ResumableRun) -> Fitted:
    """All steps, or with ``--eval_only`` those of a checkpoint; ``info.aux`` is the loss at temperature 1 of each."""
    init_key, steps_key = jax.random.split(key)
    loss = make_loss(target, batch_size=config.batch_size, learn_base=config.learn_base, h=config.h)
    optimizer = make_optimizer(config)
    state = training.init_state(jax.jit(init_params, static_argnums=1)(init_key, config.flows), optimizer)
    betas = temperatures(config.steps, config.anneal_steps)
    info = training.empty_info(loss, optimizer, state, betas, steps_key)
    size = -(-config.steps // PARTS)

    # Key and temperatures are arguments: as constants they would be folded.
    @jax.jit
    def piece(data, state, info, start, stop):
        betas, key = data
        return training.run_piece(loss, optimizer, state, info, betas, key, start, stop)

    def span(part: int) -> tuple[int, int]:
        return part * size, min((part + 1) * size, config.steps)

    def metrics(part: int, _: training.TrainState, info: training.StepInfo) -> dict[str, Any]:
        start, stop = span(part)
        means = jax.tree.map(lambda leaf: float(np.mean(np.asarray(leaf)[start:stop], dtype=np.float64)), info)
        return {
            "step": stop,
            "loss": means.aux,
            "kl": means.aux + target.log_z,
            "tempered_loss": means.loss,
            "beta": float(betas[stop - 1]),
            "gradient_norm": means.gradient_norm,
        }

    course = Course(
        name="part",
        units=-(-config.steps // size),
        span=span,
        data=lambda _, key: (betas, key),
        piece=piece,
        batch=lambda data, step: {"beta": data[0][step], "steps_key": jax.random.key_data(data[1])},
        report=metrics,
        score="loss",
        shown={"step": "step", "loss": "loss", "kl": "kl"},
        units_per_checkpoint=config.checkpoint_every,
    )
    if config.eval_only:
        return load(course, state, info, steps_key, run, config.checkpoint)
    return fit(course, state, info, steps_key, run)


def free_energy(params: Params, target: Target, key: jax.Array, *, h: str = "tanh", samples: int = SAMPLES) -> Estimate:
    """``E_q[log q(z) - log p(z)]`` from ``samples`` fresh draws (a multiple of ``CHUNK``), chunk by chunk."""

    def chunk(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, log_q = jax.vmap(lambda one: sample(params, one, h))(jax.random.normal(key, (CHUNK, 2)))
        values = log_q - jax.vmap(target.log_density)(z)
        return jnp.mean(values), jnp.var(values)

    # Parameters are arguments, here and in `draw`: as constants, everything would be compiled anew for them.
    @jax.jit
    def run(params: Params, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda key: chunk(params, key), keys)

    chunks = run(params, jax.random.split(key, samples // CHUNK))
    means, variances = (np.asarray(moment, np.float64) for moment in chunks)
    variance = np.mean(variances) + np.var(means)  # within the chunks and between them
    return Estimate(float(np.mean(means)), float(np.sqrt(variance / samples)))


def summarize(config: Config, target: Target, loss: Estimate) -> dict[str, Any]:
    """The contents of ``summary.json``, in nats; the KL's standard error is the loss's."""
    return {
        "target": config.target,
        "scale": config.scale if config.target == "mixture" else None,
        "flows": config.flows,
        "steps": config.steps,
        "seed": config.seed,
        "final_loss": loss.value,
        "kl": loss.value + target.log_z,
        "kl_standard_error": loss.standard_error,
        "log_z": target.log_z,
        "samples": SAMPLES,
    }


def draw(
    config: Config,
    target: Target,
    params: Params,
    losses: np.ndarray,
    loss: Estimate,
    key: jax.Array,
    run: ResumableRun,
) -> None:
    """Figure 2: the target, the flow's samples and its density; the density layer by layer; the loss."""
    from planar_vae_jax import plotting

    name = f"mixture, standard deviation {config.scale:g}" if target.name == "mixture" else target.name
    setting = f"{name}; K = {config.flows}, {config.steps} steps"
    side = np.linspace(-target.extent, target.extent, 300, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1))  # [rows: z2, columns: z1, 2]

    @jax.jit
    def after(params: Params, k: int) -> tuple[jax.Array, jax.Array]:
        """The flow of the first k layers: samples ``[S, 2]`` and the density on the grid."""
        # A layer with u = 0 is the identity, so that one compiled program serves every k.
        first = (jnp.arange(config.flows) < k)[:, None]
        some = params._replace(flow=params.flow._replace(u=jnp.where(first, params.flow.u, 0.0)))
        z, _ = jax.vmap(lambda one: sample(some, one, config.h))(jax.random.normal(key, (5000, 2)))
        return z, jnp.exp(jax.vmap(jax.vmap(lambda one: log_density(some, one, config.h)))(grid))

    truth = jax.jit(jax.vmap(jax.vmap(lambda one: jnp.exp(target.log_density(one) - target.log_z))))(grid)
    shown = np.unique(np.linspace(0, config.flows, 6).round().astype(int)).tolist()
    layers = {k: jax.tree.map(np.asarray, after(params, k)) for k in shown}  # k -> (samples, density)
    (base, _), (samples, density) = layers[0], layers[config.flows]
    run.save_figure(
        "density.png",
        plotting.density_fit(
            np.asarray(truth),
            base,
            samples,
            density,
            extent=target.extent,
            title=f"{setting}; KL = {loss.value + target.log_z:.2g} nats",
        ),
    )
    run.save_figure(
        "layers.png",
        plotting.layer_densities(
            {k: density for k, (_, density) in layers.items()},
            extent=target.extent,
            title=f"The base's density after k layers\n({setting})",
        ),
    )
    run.save_figure(
        "loss.png",
        plotting.kl_curve(losses + target.log_z, title=f"KL(q || p) while learning ({setting})"),
    )


if __name__ == "__main__":
    run_main(main)
