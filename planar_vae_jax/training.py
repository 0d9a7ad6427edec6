"""Training runs as pure functions: of an initialiser, a loss, an optimiser, data and one PRNG key.

Nothing here knows a model or a data set. Steps are a loop on the device over data, so a run of any length is one
compiled call; ``jax.vmap`` over keys trains many seeds at once. The key of each step is derived from the run's key
and the step's number, so a run cut into pieces is the same run, and one compiled :func:`run_piece` serves them all.

The loop ends at the first step whose loss or gradient is not finite. That is all the loop does about it: to choose
between old and new parameters inside every step takes 8 % longer, as no update can begin before the whole gradient's
norm is known. :func:`run_pieces` keeps the state of the last call instead, and repeats that call up to the failure.
"""

import time
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
    """What a human reads; of many steps, each leaf has a leading axis of steps."""

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


def empty_info(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, data: Any, key: jax.Array
) -> StepInfo:
    """Info of the steps over ``data`` (arrays or their shapes) before any is taken: NaN, and 0 for whole numbers."""
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    _, one = jax.eval_shape(lambda *args: train_step(loss, optimizer, *args), state, batch, key)
    steps = jax.tree.leaves(data)[0].shape[0]

    def empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fill = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.full((steps, *leaf.shape), fill, leaf.dtype)

    return jax.tree.map(empty, one)


def run_piece(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    info: StepInfo,
    data: Any,
    key: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[TrainState, StepInfo, jax.Array]:
    """The steps ``start`` to ``stop`` (without the last) over ``data``, a pytree with a leading axis of steps.

    ``start`` and ``stop`` may be traced, so one compiled program takes any piece of a run.

    Args:
        info: of all steps over ``data``; those of this piece are written into it (:func:`empty_info`).

    Returns:
        ``(state, info, reached [] int32)``. Where ``reached`` is below ``stop``, the step of that number had a loss or
        a gradient that is not finite: ``info`` holds it, and ``state`` is of no use.
    """

    def goes_on(carry: Any) -> jax.Array:
        _, _, position, finite = carry
        return finite & (position < stop)

    def step(carry: Any) -> Any:
        state, info, position, _ = carry
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, position, keepdims=False), data)
        state, one = train_step(loss, optimizer, state, batch, key)
        info = jax.tree.map(
            lambda leaf, entry: jax.lax.dynamic_update_index_in_dim(leaf, entry, position, 0), info, one
        )
        finite = jnp.isfinite(one.loss) & jnp.isfinite(one.gradient_norm)
        return state, info, position + finite.astype(jnp.int32), finite

    carry = (state, info, jnp.asarray(start, jnp.int32), jnp.asarray(True))
    state, info, reached, _ = jax.lax.while_loop(goes_on, step, carry)
    return state, info, reached


def run_steps(
    loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, data: Any, key: jax.Array
) -> tuple[TrainState, StepInfo]:
    """One step for each entry of ``data``, a pytree with a leading axis of steps.

    Ends after the first step that is not finite: the info of those that would follow stays NaN.
    """
    data, state = jax.tree.map(jnp.asarray, (data, state))
    info = empty_info(loss, optimizer, state, data, key)
    if not info.loss.size:  # nothing to index
        return state, info
    state, info, _ = run_piece(loss, optimizer, state, info, data, key, 0, info.loss.size)
    return state, info


def epoch_order(key: jax.Array, size: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """A fresh random order of ``size`` examples, and the key for the steps of this epoch.

    Each epoch leaves out the ``size mod batch_size`` examples that come last in its order.

    Returns:
        ``(indices [steps, batch_size] int32, key)``.
    """
    steps = size // batch_size
    order_key, key = jax.random.split(key)
    return jax.random.permutation(order_key, size)[: steps * batch_size].reshape(steps, batch_size), key


def indexed(loss: Loss, data: Any) -> Loss:
    """The same loss, given the indices ``[B]`` of a batch into ``data``, a pytree with a leading axis of examples."""

    def batch_loss(params: Params, indices: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        return loss(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], data), key)

    return batch_loss


def run_epoch(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Any,
    key: jax.Array,
    *,
    batch_size: int,
) -> tuple[TrainState, StepInfo]:
    """One pass over ``data``, a pytree with a leading axis of N examples, in the order of :func:`epoch_order`."""
    order, key = epoch_order(key, jax.tree.leaves(data)[0].shape[0], batch_size)
    return run_steps(indexed(loss, data), optimizer, state, order, key)


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


class Pace:
    """How many steps a call takes, so that it lasts about ``seconds``; nothing that is computed depends on it."""

    def __init__(self, seconds: float = 1.0):
        self._seconds = seconds
        self._steps = 8

    def end(self, start: int, stop: int) -> int:
        """Where a call that starts at ``start`` is to end; a small rest is taken along."""
        end = start + self._steps
        return stop if stop - end < self._steps // 2 else end

    def took(self, steps: int, seconds: float) -> None:
        """Learns from a call. Slowly upwards: the first calls are short, or spent on compilation."""
        self._steps = max(1, min(8 * self._steps, int(steps * self._seconds / max(seconds, 1e-9))))


def run_pieces(
    piece: Callable[[TrainState, StepInfo, int, int], tuple[TrainState, StepInfo, jax.Array]],
    state: TrainState,
    info: StepInfo,
    start: int,
    stop: int,
    *,
    pace: Pace,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, StepInfo, int, bool]:
    """The steps ``start`` to ``stop`` as calls of ``piece``, one after the other.

    Args:
        piece: :func:`run_piece` of a run, compiled; it must leave what it is given intact (nothing donated).
        pace: how long a call takes.
        stopping: asked between calls whether to end here.

    Returns:
        ``(state, info, reached, failed)``: the steps before ``reached`` are done. ``failed`` tells that the step of
        that number is not finite; ``state`` is the one before it then, and ``info`` holds it.
    """
    while start < stop and not stopping():
        end = pace.end(start, stop)
        started = time.perf_counter()
        new, info, position = piece(state, info, start, end)
        reached = int(position)  # waits for the device
        if reached < end:  # the same steps again, without the last
            return piece(state, info, start, reached)[0], info, reached, True
        pace.took(end - start, time.perf_counter() - started)
        state, start = new, reached
    return state, info, start, False
