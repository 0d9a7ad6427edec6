"""Strict JAX for every test, both precisions on demand, and random flows."""

import gc
import os
import shutil
import socket
import tempfile

import fast_compilation  # noqa: F401  before JAX is imported

# Before JAX is imported. Set JAX_PLATFORMS to run the suite on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Runs write through to the disk hundreds of times, so their folders are in memory where there is enough of it.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import hypothesis
import jax
import numpy as np
import pytest
from helpers import precision

# No silent promotion: a float64 constant in a float32 flow, or [D] broadcast against [K, D], is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Off: it looks at every intermediate, also in the branch that a `where` discards, and it runs op by op
# without jit. The tests look at results and gradients instead.
jax.config.update("jax_debug_nans", False)

# Tracing makes many objects that stay, and each collection looks at all and calls XLA's own: a twentieth of the time.
gc.set_threshold(50_000, 20, 100)

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


def pytest_configure(config):
    """Programs are compiled once: kept in pytest's cache from one run of the suite to the next (--cache-clear)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        kept = getattr(config, "cache", None)  # none with -p no:cacheprovider
        if kept and sum(file.stat().st_size for file in kept.mkdir("compiled").iterdir()) > 2**29:
            shutil.rmtree(kept.mkdir("compiled"))  # JAX's own limit looks at every file for each that it adds
        directory = str(kept.mkdir("compiled")) if kept else tempfile.mkdtemp(prefix="planar_vae_jax-tests-")
        # In the environment: for pytest's own workers and for experiments in processes of their own.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_sessionfinish():
    """What pytest collects at its end, five times over, is not all that JAX has kept."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def standard_promotion():
    """Optax's Adam raises a Python float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def any_promotion():
    """JAX's own defaults: what other people's code, and our users', is written for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
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


# --- Data without a network


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """No network but this machine's own, no proxy, and empty folders of downloads (returned) and of TFDS."""
    import pooch

    downloads, resolve = tmp_path_factory.mktemp("downloads"), socket.getaddrinfo
    monkeypatch.setattr(pooch, "os_cache", lambda project: downloads)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)

    def refuse(host, *args, **kwargs):
        if host != "127.0.0.1":
            raise OSError("network is unreachable")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return downloads
