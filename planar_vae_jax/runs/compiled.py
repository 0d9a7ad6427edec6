"""What a run compiles, once for every run of the same shapes: all that runs differ in is an argument.

Also where compiled programs are kept, and the check for losses and states that are not finite.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.train import loop as training
from planar_vae_jax.train import mesh as meshes
from planar_vae_jax.train import optimizers

CACHE_BYTES = 2**29  # of compiled programs that are kept

init_state = jax.jit(training.init_state, static_argnums=1)
averaged_params = jax.jit(optimizers.averaged_params)
evaluation_params = jax.jit(optimizers.evaluation_params)


@functools.partial(jax.jit, static_argnums=(0, 1))  # nothing is donated: a call may be repeated
def train_steps(
    loss: training.Loss,
    optimizer: optax.GradientTransformation,
    state: Any,
    info: Any,
    data: Any,
    order: Any,
    *rest: Any,
) -> tuple[training.TrainState, training.StepInfo]:
    """:func:`training.train_steps`; under a mesh, batches are split over its devices and all else is whole on each."""
    order = jax.tree.map(lambda leaf: meshes.split(leaf, axis=1), order)
    return meshes.everywhere(training.train_steps(loss, optimizer, state, info, data, order, *rest))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_together(
    loss: training.Loss,
    optimizer: optax.GradientTransformation,
    state: Any,
    info: Any,
    data: Any,
    order: Any,
    key: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[training.TrainState, training.StepInfo]:
    """:func:`training.train_steps` of several seeds: ``state``, ``info``, ``order`` and ``key`` have a leading axis of
    them. Under a mesh each device takes its share of the seeds, and nothing is exchanged."""

    def seeds(of_each: Any, data: Any, start: jax.Array, stop: jax.Array) -> Any:
        def one(state: Any, info: Any, order: Any, key: jax.Array) -> Any:
            return training.train_steps(loss, optimizer, state, info, data, order, key, start, stop)

        return jax.vmap(one)(*of_each)

    first, last = (jnp.asarray(bound, jnp.int32) for bound in (start, stop))
    return meshes.in_shares(seeds)((state, info, order, key), data, first, last)


@jax.jit
def take_seed(stacked: Any, seed: jax.Array | int) -> Any:
    """The tree of one of several seeds, whole on every device."""
    return meshes.everywhere(jax.tree.map(lambda leaf: leaf[seed], stacked))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin_epoch(
    size: int | None, batch_size: int | None, steps: int, key: jax.Array, epoch: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """The order of an epoch's examples, and the key of its steps."""
    order_key, steps_key = training.epoch_keys(key, epoch)
    if size is None:
        return None, steps_key
    assert batch_size is not None
    return meshes.everywhere((training.epoch_order(order_key, size, batch_size)[:steps], steps_key))


@jax.jit
def take_batch(data: Any, order: Any, position: jax.Array | int) -> Any:
    """What a step of the epoch is given."""
    return None if data is None else jax.tree.map(lambda leaf: leaf[order[position]], data)


def first_not_finite(info: training.StepInfo, start: int, stop: int) -> int | None:
    """The first of these steps whose loss or gradient is not finite."""
    # Of NumPy's: JAX would compile each slice.
    sound = [np.isfinite(np.asarray(leaf)[start:stop]) for leaf in (info.loss, info.gradient_norm)]
    bad = np.flatnonzero(~(sound[0] & sound[1]))
    return start + int(bad[0]) if len(bad) else None


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is."""
    found = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(found)) if found else jnp.array(True)


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a second start compiles nothing.

    In the user's cache folder, where old programs make room for new ones, unless ``JAX_COMPILATION_CACHE_DIR`` names
    one (empty: no cache). Where there is no home folder, or it cannot be written, there is no cache.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planar_vae_jax" / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        for program in folder.glob("*-cache"):  # JAX writes a program, then its time: a process killed in between
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)
    except (RuntimeError, OSError):  # no HOME, and the user is not in the list of users; or it cannot be written
        return
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
