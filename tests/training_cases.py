"""Small problems, and trainings of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from planar_vae_jax.train.loop import empty_info, epoch_keys, epoch_order, init_state, train, train_steps


def half_square(params, batch, key, step):
    """``0.5 |params - batch|^2``: gradient descent moves by ``rate (batch - params)``."""
    del key, step
    return 0.5 * jnp.sum(jnp.square(params - batch)), {"first": batch[0]}


def noisy(params, batch, key, step):
    """A loss that depends on all it is given; reports the key's first random number, the step and the batch."""
    noise = jax.random.normal(key, params.shape)
    loss = jnp.mean(jnp.square((params + noise)[None] - batch)) + 0.1 * jnp.sum(jnp.cos(params))
    return loss, {"uniform": jax.random.uniform(key), "step": step, "batch": jnp.sum(batch)}


def adam(learning_rate):
    """Optax's Adam, which raises a Python float to an int32 count: the one thing strict promotion is off for."""
    optimizer = optax.adam(learning_rate)

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


SIZE, BATCH, STEPS = 23, 5, 4  # steps of an epoch
DATA = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
ADAM = adam(0.05)
PARAMS = np.array([0.5, -1.0, 2.0], np.float32)
SHAPE = jax.ShapeDtypeStruct((BATCH, 3), jnp.float32)


@functools.cache
def compiled(loss=noisy, optimizer=ADAM):
    return jax.jit(functools.partial(train_steps, loss, optimizer))


@functools.cache
def noisy_train():
    return jax.jit(functools.partial(train, noisy, ADAM, batch_size=BATCH, epochs=3))


def assert_same_bits(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def an_epoch(key, *cuts, number=0, state=None):
    """Its steps, in pieces."""
    state = init_state(jnp.asarray(PARAMS), ADAM) if state is None else state
    info = empty_info(noisy, state, SHAPE, key, STEPS)
    order_key, steps_key = epoch_keys(key, number)
    order = epoch_order(order_key, SIZE, BATCH)
    for start, stop in zip((0, *cuts), (*cuts, STEPS), strict=True):
        state, info = compiled()(state, info, DATA, order, steps_key, start, stop)
    return state, info


def one_step(loss, optimizer, state, batch, key):
    """The step of a batch; ``key`` is the epoch's."""
    order = None if batch is None else np.arange(len(jax.tree.leaves(batch)[0]), dtype=np.int32)[None]
    info = empty_info(loss, state, batch, key, 1)
    state, info = train_steps(loss, optimizer, state, info, batch, order, key, 0, 1)
    return state, jax.tree.map(lambda leaf: leaf[0], info)
