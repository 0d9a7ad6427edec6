"""Training as a pure function of a loss, an optimiser, data and a PRNG key; it knows no model and no data set.

::

    loss(params, batch, key, step) -> (value to minimise [], {name: figure []})

Every key is derived from the run's key, the epoch and the step, and the bounds of the loop over steps are arguments. So
one compiled :func:`train_steps` serves any piece of any epoch, a run that is cut into pieces has the bits of the uncut
run, and ``jax.vmap`` over keys trains many seeds at once. Nothing in the loop depends on what it computes: a loop that
stopped at a loss that is not finite would become, under ``jax.vmap``, a select of every parameter. The host checks the
losses between two calls instead (:mod:`planar_vae_jax.runs.fit`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from planar_vae_jax.train import mesh

Params = Any  # a pytree of arrays, such as a Flax module
Loss = Callable[[Params, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """What the next step needs."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array  # [] int32, steps done


class StepInfo(NamedTuple):
    """The figures of a step, for people to read. For many steps, each leaf has a leading axis of steps."""

    loss: jax.Array  # [], the value that was minimised
    gradient_norm: jax.Array  # []
    figures: dict[str, jax.Array]  # the figures that the loss returned beside its value, [] each


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def epoch_keys(key: jax.Array, epoch: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the key of an epoch's order and the key of its steps; ``key`` is that of the run."""
    order_key, steps_key = jax.random.split(jax.random.fold_in(key, epoch))
    return order_key, steps_key


def epoch_order(key: jax.Array, size: int, batch_size: int) -> jax.Array:
    """Returns a random order of ``size`` examples, ``[steps, batch_size]`` int32.

    An epoch leaves out the ``size mod batch_size`` examples that come last in its order.
    """
    steps = size // batch_size
    return jax.random.permutation(key, size)[: steps * batch_size].reshape(steps, batch_size)


def check_loss(loss: Loss, params: Params, batch: Any, key: jax.Array, step: jax.Array) -> tuple[Any, dict[str, Any]]:
    """Returns shapes and dtypes of what a loss returns; the arguments may be arrays or their shapes.

    Raises:
        ValueError: the loss returns anything but ``(value [], {name: figure []})``.
    """
    found = jax.eval_shape(loss, params, batch, key, step)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise ValueError(f"loss must return (value, {{name: figure}}); got {found}")
    value, figures = found
    for name, leaf in {"the value": value, **figures}.items():
        if getattr(leaf, "shape", None) != ():
            raise ValueError(f"loss must return scalars; got {name} of {leaf}")
    return value, figures


def empty_info(loss: Loss, state: TrainState, batch: Any, key: jax.Array, steps: int) -> StepInfo:
    """Returns the info of ``steps`` steps before any step is taken: zeros.

    Args:
        batch: the batch of one step, as arrays or as shapes.
    """
    value, figures = check_loss(loss, state.params, batch, key, state.step)
    norm = jax.eval_shape(optax.tree.norm, state.params)  # a gradient has the shapes of the parameters
    return jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), StepInfo(value, norm, figures))


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
    """Takes the steps ``start`` to ``stop - 1`` of an epoch; returns the new state and info. The bounds may be traced.

    The optimiser is also given the value and the gradient, as optax's line searches need them. Under a mesh
    (:mod:`planar_vae_jax.train.mesh`) each batch is split over its devices; everything else is whole on every device.

    Args:
        info: the info of all steps of the epoch (:func:`empty_info`), which is filled in for the steps taken.
        data: a pytree of arrays ``[N, ...]``; None: the loss gets no batch, and draws what it needs by its key.
        order: ``[steps, batch_size]``, see :func:`epoch_order`; the batch of a step is ``data[order[step]]``.
        key: the key of the epoch's steps (:func:`epoch_keys`).
    """
    order = jax.tree.map(lambda leaf: mesh.split(leaf, axis=1), order)
    update = optax.with_extra_args_support(optimizer).update

    def step(position: jax.Array, carry: tuple[TrainState, StepInfo]) -> tuple[TrainState, StepInfo]:
        state, info = carry
        batch = None
        if data is not None:
            indices = lax.dynamic_index_in_dim(order, position, keepdims=False)
            batch = jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), data)
        step_key = jax.random.fold_in(key, state.step)
        (value, figures), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, step_key, state.step)
        updates, opt_state = update(gradient, state.opt_state, state.params, value=value, grad=gradient)
        params = optax.apply_updates(state.params, updates)
        one = StepInfo(value, optax.tree.norm(gradient), figures)
        info = jax.tree.map(lambda leaf, entry: lax.dynamic_update_index_in_dim(leaf, entry, position, 0), info, one)
        return TrainState(params, opt_state, state.step + 1), info

    first, last = (jnp.asarray(bound, jnp.int32) for bound in (start, stop))
    carry = mesh.varying_like((state, info), (state, data, order, key))
    return mesh.everywhere(lax.fori_loop(first, last, step, carry))


def train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: Any,
    key: jax.Array,
    *,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
) -> tuple[TrainState, StepInfo]:
    """Trains on arrays in memory: one compiled program under ``jax.jit``, many seeds under ``jax.vmap``.

    With ``data=None`` the loss draws what it needs by its key, and ``steps`` takes the place of the other two numbers.

    Args:
        loss: see the module's docstring.
        optimizer: an optax optimiser.
        params: the initial parameters, any pytree of arrays such as a Flax module.
        data: a pytree of arrays ``[N, ...]``, in a new random order in each epoch; or None.
        key: the PRNG key from which everything random is derived.
        batch_size: examples per step, at most N.
        epochs: passes over the data.
        steps: steps without data.

    Returns:
        The final state, and the info of every step, whose leaves are ``[epochs, steps]``, or ``[steps]`` without data.

    Raises:
        ValueError: the arrays of ``data`` differ in length, ``batch_size`` is not between 1 and N, ``epochs`` or
            ``steps`` is negative or given for the other kind of training, or the loss does not return a value and a
            dict of scalars.
    """
    if data is None:
        return _train_without_data(loss, optimizer, params, key, batch_size=batch_size, epochs=epochs, steps=steps)
    if steps is not None or batch_size is None or epochs is None:
        raise ValueError(
            f"batch_size and epochs must be given with data, and steps only with data=None; "
            f"got batch_size={batch_size}, epochs={epochs}, steps={steps}"
        )
    data = jax.tree.map(jnp.asarray, data)
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(data)]
    if not shapes or [] in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"data must be arrays [N, ...] of one length N; got the shapes {shapes}")
    size = shapes[0][0]
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must be between 1 and the {size} examples of data; got {batch_size}")
    if epochs < 0:
        raise ValueError(f"epochs must be at least 0; got {epochs}")
    steps, state = size // batch_size, init_state(params, optimizer)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), data)
    info = empty_info(loss, state, one, key, steps)

    def epoch(state: TrainState, number: jax.Array) -> tuple[TrainState, StepInfo]:
        order_key, steps_key = epoch_keys(key, number)
        order = epoch_order(order_key, size, batch_size)
        return train_steps(loss, optimizer, state, info, data, order, steps_key, 0, steps)

    return lax.scan(epoch, mesh.varying_like(state, (state, data, key)), jnp.arange(epochs))


def _train_without_data(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    key: jax.Array,
    *,
    steps: int | None,
    **other: Any,
) -> tuple[TrainState, StepInfo]:
    """:func:`train` without data: one epoch of ``steps`` steps."""
    if steps is None or steps < 0 or any(value is not None for value in other.values()):
        given = ", ".join(f"{name}={value}" for name, value in {**other, "steps": steps}.items())
        raise ValueError(f"with data=None, steps must be given, at least 0, and nothing else; got {given}")
    state = init_state(params, optimizer)
    info = empty_info(loss, state, None, key, steps)
    _, steps_key = epoch_keys(key, 0)
    state = mesh.varying_like(state, (state, key))
    return train_steps(loss, optimizer, state, info, None, None, steps_key, 0, steps)
