"""Strict JAX for every test, both precisions on demand, and the flow's equations in exact arithmetic."""

import contextlib
import decimal
import os
import socket
import tempfile
from decimal import Decimal

# Before JAX is imported. Set JAX_PLATFORMS to run the suite on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

from planar_vae_jax import Planar

# Every test that runs an experiment compiles the same few programs: once a session is enough. In the
# environment too, for experiments that run in a process of their own and for pytest's own workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="planar_vae_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# No silent promotion: a float64 constant in a float32 flow, or [D] broadcast against [K, D], is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Off: it looks at every intermediate, also in the branch that a `where` discards, and it runs op by op
# without jit. The tests look at results and gradients instead.
jax.config.update("jax_debug_nans", False)

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example compiles
    max_examples=50,
    # The fixtures used beside @given are settings, the same for every example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@contextlib.contextmanager
def precision(dtype):
    """JAX as a user of this dtype has it: 64-bit types are on for float64 and off for float32."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64
    else:  # before JAX 0.8
        from jax.experimental import enable_x64 as context
    with context(np.dtype(dtype) == np.float64):
        yield


@pytest.fixture
def x64():
    """Switches 64-bit types on for one test."""
    with precision(np.float64):
        yield


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    """Runs a test in both precisions."""
    with precision(request.param):
        yield request.param


# --- The truth that the numerics are tested against: the papers' formulas as they stand, in 250 decimal
# --- digits. Decimal and not numpy's longdouble, which is a plain double on some machines.

DIGITS = 250


def exactly(function):
    """Runs ``function`` with DIGITS digits and exponents that neither under- nor overflow."""

    def run(*args, **kwargs):
        with decimal.localcontext(decimal.Context(prec=DIGITS, Emin=-(10**9), Emax=10**9)):
            return function(*args, **kwargs)

    return run


def to_exact(values):
    """Any array of floats as an object array of the same numbers."""
    values = np.asarray(values)
    exact = np.empty(values.shape, object)
    exact.reshape(-1)[:] = [Decimal(float(value)) for value in values.reshape(-1)]
    return exact


def from_exact(values):
    """Rounded to float64."""
    return np.asarray(values, object).astype(np.float64)


def exact_tanh(a):
    e = (-2 * abs(a)).exp()
    return ((1 - e) / (1 + e)).copy_sign(a)


def exact_softsign(a):
    return a / (1 + abs(a))


# name -> (h, h')
EXACT_NONLINEARITIES = {
    "tanh": (exact_tanh, lambda a: 1 - exact_tanh(a) ** 2),
    "softsign": (exact_softsign, lambda a: 1 / (1 + abs(a)) ** 2),
}


def exact_m(p):
    """``softplus(p + log(e - 1))``."""
    return (1 + p.exp() * (Decimal(1).exp() - 1)).ln()


def exact_flow(u, w, b, z, h):
    """K layers (Rezende & Mohamed 2015, eq. 10 and A.1, with the shift), arrays of Decimal in and out."""
    value, slope = EXACT_NONLINEARITIES[h]
    log_det = Decimal(0)
    for u_k, w_k, b_k in zip(u, w, b, strict=True):
        p, norm2 = np.dot(w_k, u_k), np.dot(w_k, w_k)
        u_hat = u_k + (exact_m(p) - 1 - p) * w_k / norm2 if norm2 else u_k
        a = np.dot(w_k, z) + b_k
        z = z + u_hat * value(a)
        log_det += abs(1 + slope(a) * np.dot(w_k, u_hat)).ln()
    return z, log_det


# --- Random flows


def draw(dim, flow_length, *, scale=1.0, seed=0, dtype=np.float64):
    """Parameters with ``w.u`` of order ``scale^2``, of both signs, and an event."""
    rng = np.random.default_rng([seed, dim, flow_length])
    size, shape = scale / dim**0.25, (flow_length, dim)
    u, w = (size * rng.normal(size=shape) for _ in "uw")
    params = Planar(u.astype(dtype), w.astype(dtype), rng.normal(size=flow_length).astype(dtype))
    return params, rng.normal(size=dim).astype(dtype)


def stack(trees):
    """Trees of the same shapes as one with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def assert_trees_close(actual, desired, *, tolerance):
    """Each leaf to ``tolerance`` of its own largest entry (or of 1, if that is smaller)."""
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, d, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(d), initial=0.0)))


# --- Data without a network


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """No network, no proxy and an empty TFDS directory (returned), so that no test sees the machine's own."""
    tfds_dir = tmp_path_factory.mktemp("tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)

    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tfds_dir
