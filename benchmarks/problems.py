"""The problem that every contestant solves: the same map in each package's parameters, and the check of results.

All packages use ``u_hat = u + (m - 1 - p) w / |w|^2`` with ``p = w.u``, and differ in ``m``:

    ours         m = softplus(p + log(e - 1)), also in our PyTorch layers
    normflows    m = log(1 + exp(p))
    Pyro         m = softplus(p)
    FlowJAX      m = log(1 + softplus(p)), a softplus of a softplus

Each ``m`` takes every value in (0, inf), so for our ``u`` there is one ``u`` of theirs with the same ``u_hat``, map and
log-determinant: :func:`peer_u`. Gradients with respect to their ``u`` are converted to gradients with
respect to ours by the derivative of that change of parameters.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.torch_models import Unavailable
from planar_vae_jax.flows._constraint import SHIFT

# Largest error of a result, relative to its largest value. Float32 with K = 128 layers gives 1e-5.
TOLERANCE = 1e-4


class Problem(NamedTuple):
    """K layers and a batch in float64; one flow for all events, or one for each event (amortised)."""

    u: np.ndarray  # [K, D], or [B, K, D]
    w: np.ndarray  # [K, D], or [B, K, D]
    b: np.ndarray  # [K], or [B, K]
    z0: np.ndarray  # [B, D]

    @property
    def amortized(self) -> bool:
        return self.u.ndim == 3

    @property
    def flow_length(self) -> int:
        return self.u.shape[-2]

    @property
    def dim(self) -> int:
        return self.u.shape[-1]


class Result(NamedTuple):
    """The results of a contestant: the flow, the objective and its gradient."""

    loss: Any  # [], the mean of |zK|^2 / 2 - log_det
    zK: Any  # [B, D]
    log_det: Any  # [B]
    u: Any  # the gradients, in the shapes of Problem
    w: Any
    b: Any
    z0: Any


def draw_problem(rng: np.random.Generator, *, batch_size: int, dim: int, flow_length: int, amortized: bool) -> Problem:
    """Draws a problem with ``|w|`` between 1/2 and 3/2; at ``w = 0`` other packages divide 0 by 0."""
    lead = (batch_size, flow_length) if amortized else (flow_length,)
    w = rng.standard_normal((*lead, dim))
    w *= rng.uniform(0.5, 1.5, (*lead, 1)) / np.linalg.norm(w, axis=-1, keepdims=True)
    u = rng.standard_normal((*lead, dim)) * (0.5 / dim**0.5)
    return Problem(u, w, rng.standard_normal(lead) * 0.5, rng.standard_normal((batch_size, dim)))


def x64() -> contextlib.AbstractContextManager[None]:
    """A context that enables 64-bit types, for checks."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # before JAX 0.8


def disagreement(result: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """Returns the largest error of each result, relative to its largest value; raises ValueError if shapes differ."""

    def relative(value: Any, true: Any) -> float:
        value, true = np.asarray(value, np.float64), np.asarray(true, np.float64)
        if value.shape != true.shape:
            raise ValueError(f"a result has shape {value.shape}; ours has {true.shape}")
        return float(np.max(np.abs(value - true)) / np.max(np.abs(true)))

    return {name: relative(result[name], truth[name]) for name in truth}


def require_agreement(result: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """Returns :func:`disagreement`.

    Raises:
        Unavailable: if an error is larger than ``TOLERANCE`` or is NaN.
    """
    errors = disagreement(result, truth)
    for name, error in errors.items():
        if not error <= TOLERANCE:  # true for NaN too
            raise Unavailable(f"its {name} differs from ours by {error:.1e} of the largest value")
    return errors


# --- The change of parameters.


def log_expm1(m: Any) -> Any:
    """``log(exp(m) - 1)``, the inverse of softplus, for ``m > 0``."""
    return m + jnp.log(-jnp.expm1(-m))


# m -> p, by the constraint of a package.
LINKS: dict[str, Callable[[Any], Any]] = {
    "ours": lambda m: log_expm1(m) - SHIFT,
    "softplus": log_expm1,  # m = softplus(p)
    "softplus of softplus": lambda m: log_expm1(jnp.expm1(m)),  # m = log(1 + softplus(p))
}


def peer_u(u: Any, w: Any, link: str) -> Any:
    """Returns the ``u [..., D]`` for which a package with this link has the same ``u_hat`` as ours.

    ``u + (m - 1 - p) w / |w|^2`` and ``m`` are equal in both packages; only ``p`` differs.
    """
    p = jnp.sum(u * w, -1, keepdims=True)
    m = jax.nn.softplus(p + SHIFT)
    return u + (LINKS[link](m) - p) * w / jnp.sum(jnp.square(w), -1, keepdims=True)


_peer_u = jax.jit(peer_u, static_argnums=2)


@functools.partial(jax.jit, static_argnums=4)
def _pull_back(u: Any, w: Any, u_bar: Any, w_bar: Any, link: str) -> Any:
    _, vjp = jax.vjp(lambda u, w: peer_u(u, w, link), u, w)
    from_u, from_w = vjp(u_bar)
    return from_u, from_w + w_bar


def undone(problem: Problem, link: str) -> np.ndarray:
    """Returns :func:`peer_u` of a problem, computed in float64."""
    with x64():
        return np.asarray(_peer_u(jnp.asarray(problem.u), jnp.asarray(problem.w), link))


def pulled_back(problem: Problem, result: Result, link: str) -> Result:
    """Returns ``result`` with gradients with respect to our ``u`` and ``w``, computed in float64."""
    with x64():
        arrays = (jnp.asarray(np.asarray(array, np.float64)) for array in (problem.u, problem.w, result.u, result.w))
        u, w = _pull_back(*arrays, link)
        return result._replace(u=np.asarray(u), w=np.asarray(w))
