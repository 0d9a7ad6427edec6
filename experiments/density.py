"""Planar flows fitted to densities on the plane: section 4.1 and figure 2 of Xu et al. (2023).

    python -m experiments.density --target=mixture --flows=15 --steps=1500 --seed=0 --workdir=DIR

Half a minute on two CPU cores.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.flags import UsageError, flag, parse
from experiments.runs import Progress, Run, run_main
from planar_vae_jax import plotting
from planar_vae_jax.distributions import normal_log_prob
from planar_vae_jax.flows import NONLINEARITIES, Planar, init_planar, inverse_planar_flow, planar_flow
from planar_vae_jax.targets import TARGETS, Target, get_target
from planar_vae_jax.training import Loss, StepInfo, TrainState, init_state, run_steps

PIECES = 25  # a run is logged about so many times


@dataclasses.dataclass(frozen=True)
class Config:
    target: str = flag("mixture", "the density to fit", choices=TARGETS)
    scale: float = flag(1.0, "standard deviation of the mixture's modes", at_least=0.01, at_most=10.0)
    flows: int = flag(15, "K, the number of planar layers", at_least=0)
    steps: int = flag(1500, "optimisation steps", at_least=1)
    seed: int = flag(0, "seed of everything random", at_least=0, at_most=2**32 - 1)
    batch_size: int = flag(512, "samples a step", at_least=1)
    learning_rate: float = flag(0.03, "Adam's, decayed to 0 by a cosine", above=0.0)
    anneal_steps: int = flag(0, "steps over which beta, the energy's factor, rises to 1 (0: at once)", at_least=0)
    learn_base: bool = flag(False, "learn mean and standard deviations of the base distribution")
    h: str = flag("tanh", "the layers' nonlinearity", choices=tuple(NONLINEARITIES))
    workdir: str | None = flag(None, "folder of the run's files; default runs/density-TARGET-KFLOWS-SEED")


class Base(NamedTuple):
    """A normal distribution with independent components: ``z0 = mean + exp(log_std) * epsilon``."""

    mean: jax.Array  # [2]
    log_std: jax.Array  # [2]


class Params(NamedTuple):
    base: Base
    flow: Planar


def init_params(key: jax.Array, flow_length: int, w_scale=2**0.5, u_scale=0.1) -> Params:
    """A standard normal base, and layers near the identity."""
    flow = init_planar(key, flow_length, 2, w_scale=w_scale, u_scale=u_scale)
    return Params(Base(jnp.zeros(2), jnp.zeros(2)), flow)


def push_forward(params: Params, epsilon: jax.Array, h: str) -> tuple[jax.Array, jax.Array]:
    """``epsilon [2] ~ N(0, I)`` -> ``(z_K [2], log q(z_K) [])``, with ``log q(z_K) = log q_0(z_0) - log_det``."""
    mean, log_std = params.base
    z0 = mean + jnp.exp(log_std) * epsilon
    zK, log_det = planar_flow(params.flow, z0, h=h)
    return zK, normal_log_prob(z0, mean, log_std) - log_det


def log_density(params: Params, z: jax.Array, h: str) -> jax.Array:
    """``log q(z) = log q_0(z_0) + log|det dz_0/dz|`` at any point ``z [2]``, by the inverse."""
    z0, log_det = inverse_planar_flow(params.flow, z, h=h)
    return normal_log_prob(z0, *params.base) + log_det


def make_loss(target: Target, batch_size: int, *, learn_base: bool, h: str) -> Loss:
    def loss(params: Params, beta: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not learn_base:
            params = params._replace(base=jax.lax.stop_gradient(params.base))
        epsilon = jax.random.normal(key, (batch_size, 2))
        z, log_q = jax.vmap(lambda one: push_forward(params, one, h))(epsilon)
        energy = -jax.vmap(target.log_density)(z)
        return jnp.mean(log_q + beta * energy), jnp.mean(log_q + energy)

    return loss


def temperatures(steps: int, anneal_steps: int) -> jax.Array:
    t = jnp.arange(steps)
    return jnp.minimum(1.0, 0.01 + t / anneal_steps) if anneal_steps else jnp.ones(steps)


def free_energy_terms(params, target, key, samples, h, chunk=2**14):
    def one(key):
        z, log_q = jax.vmap(lambda e: push_forward(params, e, h))(jax.random.normal(key, (chunk, 2)))
        v = log_q - jax.vmap(target.log_density)(z)
        return jnp.mean(v), jnp.var(v), jnp.mean(z[:,0]+z[:,1]>0)
    return jax.lax.map(one, jax.random.split(key, samples // chunk))
