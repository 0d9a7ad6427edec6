"""Training runs as pure functions: of an initialiser, a loss, an optimiser, data and one PRNG key.

Nothing here knows a model or a data set. A step is scanned over data, so a run of any length is one
compiled call; ``jax.vmap`` over keys trains many seeds at once. The key of each step is derived from the run's key
and the step's number, so a run cut into pieces is the same run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any  # a pytree of arrays
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, Any]]  # (params, batch, key) -> (loss [], aux)


class TrainState(NamedTuple):
    """What the next step needs."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array  # [] int32, steps done


class StepInfo(NamedTuple):
    """What a human reads; stacked over steps by a scan."""

    loss: jax.Array  # []
    gradient_norm: jax.Array  # []
    aux: Any  # what the loss returned beside its value


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Any, key: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step; ``key`` is the run's, from which the step's own is derived."""
    step_key = jax.random.fold_in(key, state.step)
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, step_key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    info = StepInfo(value, _norm(gradient), aux)
    return TrainState(params, opt_state, state.step + 1), info


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def run_steps(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, data: Any, key: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step for each entry of ``data``, a pytree with a leading axis of steps."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        return train_step(loss, optimizer, state, batch, key)

    return jax.lax.scan(step, state, data)


def run_epoch(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Any,
    key: jax.Array,
    *,
    batch_size: int,
) -> tuple[TrainState, StepInfo]:
    """One pass over ``data``, a pytree with a leading axis of N examples, in a fresh random order.

    Each epoch leaves out the ``N mod batch_size`` examples that come last in its order.
    """
    size = jax.tree.leaves(data)[0].shape[0]
    steps = size // batch_size
    order_key, key = jax.random.split(key)
    order = jax.random.permutation(order_key, size)[: steps * batch_size].reshape(steps, batch_size)

    def batch_loss(params: Params, indices: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        return loss(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], data), key)

    return run_steps(batch_loss, optimizer, state, order, key)


def train(
    init: Callable[[jax.Array], Params],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    data: Any,
    key: jax.Array,
) -> tuple[TrainState, StepInfo]:
    """A whole run: initialise, then one step for each entry of ``data``.

    Args:
        init: key -> parameters.
        loss: (parameters, batch, key) -> (loss [], auxiliary pytree).
        optimizer: an optax optimiser.
        data: a pytree with a leading axis of steps, one entry a step.
        key: the run's PRNG key; ``jax.vmap`` over it for several seeds.

    Returns:
        The final state and the info of every step, each leaf ``[steps, ...]``.
    """
    init_key, steps_key = jax.random.split(key)
    return run_steps(loss, optimizer, init_state(init(init_key), optimizer), data, steps_key)
