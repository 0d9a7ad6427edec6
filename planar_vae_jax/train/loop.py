"""Training as a pure fold: of a loss, an optimiser, data and one PRNG key; it knows no model and no data set.

    loss(params, batch, key, step) -> (value to minimise [], {name: figure []})

Every key follows from (the run's key, epoch, step), and the loop over steps has bounds that are arguments: one compiled
:func:`train_steps` serves any piece of any epoch, a run cut into pieces is the same run bit for bit, and
``jax.vmap`` over keys trains many seeds at once. Nothing in the loop depends on what is computed in it (a loop that
ended at a loss that is not finite would become a select of every parameter under ``jax.vmap``): the host looks at
the losses between calls (:mod:`planar_vae_jax.runs.fit`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

Params = Any  # a pytree of arrays
Loss = Callable[[Params, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """What the next step needs."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array  # [] int32, steps done


class StepInfo(NamedTuple):
    """What a human reads; of many steps, each leaf has a leading axis of steps."""

    loss: jax.Array  # [], what was minimised
    gradient_norm: jax.Array  # []
    figures: dict[str, jax.Array]  # what the loss returned beside its value, [] each


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Any, key: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step; ``key`` is the epoch's, from which the step's own is derived."""
    step_key = jax.random.fold_in(key, state.step)
    (value, figures), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, step_key, state.step)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), StepInfo(value, _norm(gradient), figures)


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def epoch_keys(key: jax.Array, epoch: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of an epoch's order and of its steps; ``key`` is the run's."""
    order_key, steps_key = jax.random.split(jax.random.fold_in(key, epoch))
    return order_key, steps_key


def epoch_order(key: jax.Array, size: int, batch_size: int) -> jax.Array:
    """A fresh random order of ``size`` examples, ``[steps, batch_size]`` int32.

    Each epoch leaves out the ``size mod batch_size`` examples that come last in its order.
    """
    steps = size // batch_size
    return jax.random.permutation(key, size)[: steps * batch_size].reshape(steps, batch_size)


def empty_info(loss: Loss, state: TrainState, batch: Any, key: jax.Array, steps: int) -> StepInfo:
    """Info of ``steps`` steps before any is taken: zeros. ``batch``: of one step, arrays or their shapes."""
    value, figures = jax.eval_shape(loss, state.params, batch, key, state.step)
    one = StepInfo(value, jax.eval_shape(_norm, state.params), figures)  # a gradient has the shapes of the parameters
    return jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), one)


def train_steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    info: StepInfo,
    data: Any,
    order: Any,
    key: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[TrainState, StepInfo]:
    """The steps ``start`` to ``stop`` (without the last) of an epoch; the bounds may be traced.

    Args:
        info: of all steps of the epoch (:func:`empty_info`); those of these steps are written into it.
        data: a pytree of arrays ``[N, ...]``, or None: the loss draws what it needs from its key.
        order: ``[steps, batch_size]``, see :func:`epoch_order`; a step's batch is ``data[order[step]]``.
        key: of the epoch's steps (:func:`epoch_keys`).
    """

    def step(position: jax.Array, carry: tuple[TrainState, StepInfo]) -> tuple[TrainState, StepInfo]:
        state, info = carry
        batch = None
        if data is not None:
            indices = lax.dynamic_index_in_dim(order, position, keepdims=False)
            batch = jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), data)
        state, one = train_step(loss, optimizer, state, batch, key)
        return state, jax.tree.map(
            lambda leaf, entry: lax.dynamic_update_index_in_dim(leaf, entry, position, 0), info, one
        )

    first, last = (jnp.asarray(bound, jnp.int32) for bound in (start, stop))
    return lax.fori_loop(first, last, step, (state, info))


def train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: Any,
    key: jax.Array,
    *,
    batch_size: int,
    epochs: int,
) -> tuple[TrainState, StepInfo]:
    """A whole run on arrays in memory; under ``jax.jit`` one compiled program, under ``jax.vmap`` many seeds.

    Args:
        loss: see the module's text.
        optimizer: an optax optimiser.
        params: before the first step.
        data: a pytree of arrays ``[N, ...]``, shuffled anew in each epoch.
        key: everything random follows from it.
        batch_size: examples a step, at most N.
        epochs: passes over the data.

    Returns:
        The final state, and the info of every step, each leaf ``[epochs, steps]``.

    Raises:
        ValueError: for a batch size that is not between 1 and N.
    """
    data = jax.tree.map(jnp.asarray, data)
    size = len(jax.tree.leaves(data)[0])
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must be between 1 and the {size} examples of data; got {batch_size}")
    steps, state = size // batch_size, init_state(params, optimizer)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
    info = empty_info(loss, state, one, key, steps)

    def epoch(state: TrainState, number: jax.Array) -> tuple[TrainState, StepInfo]:
        order_key, steps_key = epoch_keys(key, number)
        order = epoch_order(order_key, size, batch_size)
        return train_steps(loss, optimizer, state, info, data, order, steps_key, 0, steps)

    return lax.scan(epoch, state, jnp.arange(epochs))
