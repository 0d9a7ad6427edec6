"""Training is a pure function of its key, in pieces of any length, and optimises what it is given."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import (
    ADAM,
    BATCH,
    DATA,
    PARAMS,
    SHAPE,
    SIZE,
    STEPS,
    adam,
    an_epoch,
    assert_same_bits,
    compiled,
    half_square,
    noisy,
    noisy_train,
    one_step,
)

from planar_vae_jax.train.loop import (
    empty_info,
    epoch_keys,
    epoch_order,
    init_state,
    train,
    train_steps,
)

ROOT = Path(__file__).parents[2]

# --- Steps


def test_a_step_is_the_optimisers_update_and_reports_the_loss_before_it():
    optimizer = optax.sgd(0.1)
    params, batch = jnp.array([1.0, -2.0]), jnp.array([0.0, 1.0])
    state = init_state(params, optimizer)
    new, info = one_step(half_square, optimizer, state, batch, jax.random.key(0))
    np.testing.assert_allclose(new.params, [0.9, -1.7], rtol=1e-6)
    assert (state.step, new.step, new.step.dtype) == (0, 1, jnp.int32)
    assert float(info.loss) == pytest.approx(5.0)
    assert float(info.gradient_norm) == pytest.approx(np.sqrt(10.0), rel=1e-6)
    assert info.figures["first"] == batch[0]
    np.testing.assert_array_equal(state.params, params)


def test_gradient_norm_is_that_of_all_leaves_together():
    def loss(params, batch, key, step):
        return 3.0 * params["a"] + jnp.sum(params["b"][0] * batch), {}

    params = {"a": jnp.array(0.0), "b": [jnp.zeros((2, 2))]}
    optimizer = optax.sgd(1.0)
    batch = jnp.array([[1.0, 2.0], [1.0, 1.0]])
    _, info = one_step(loss, optimizer, init_state(params, optimizer), batch, jax.random.key(0))
    assert float(info.gradient_norm) == pytest.approx(4.0, rel=1e-6)


def test_the_optimiser_sees_the_parameters_as_weight_decay_needs_them():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    state = init_state(jnp.array([2.0]), optimizer)
    new, _ = one_step(lambda *_: (jnp.zeros(()), {}), optimizer, state, None, jax.random.key(0))
    np.testing.assert_allclose(new.params, [2.0 - 0.1 * 0.5 * 2.0], rtol=1e-6)


def test_gradient_descent_on_a_quadratic_takes_its_known_course():
    rate, steps = 0.1, 25
    target, origin = np.array([1.0, -3.0], np.float32), np.array([5.0, 5.0], np.float32)
    optimizer = optax.sgd(rate)
    data = np.broadcast_to(target, (steps, 2))
    state = init_state(jnp.asarray(origin), optimizer)
    info = empty_info(half_square, state, data[0], jax.random.key(0), steps)
    order = jnp.arange(steps)  # one example a step
    state, info = compiled(half_square, optimizer)(state, info, data, order, jax.random.key(0), 0, steps)
    distance = (1 - rate) ** np.arange(steps + 1) * np.linalg.norm(origin - target)
    np.testing.assert_allclose(info.loss, 0.5 * distance[:-1] ** 2, rtol=1e-5)
    np.testing.assert_allclose(info.gradient_norm, distance[:-1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(state.params - target), distance[-1], rtol=1e-5)
    assert state.step == steps


def test_adam_finds_the_least_squares_solution_over_random_batches():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32) + 0.7  # no noise: every batch has the same minimum
    optimizer = adam(optax.linear_schedule(0.1, 0.0, 600))

    def loss(params, batch, key, step):
        slope, intercept = params
        x, y = batch
        return jnp.mean(jnp.square(jnp.dot(x, slope) + intercept - y)), {}

    params = (jnp.zeros(3), jnp.zeros(()))
    state, info = jax.jit(lambda key: train(loss, optimizer, params, (x, y), key, batch_size=20, epochs=200))(
        jax.random.key(0)
    )
    slope, intercept = state.params
    np.testing.assert_allclose(slope, [1.0, -2.0, 0.5], atol=1e-4)
    assert float(intercept) == pytest.approx(0.7, abs=1e-4)
    assert info.loss.shape == (200, 3)
    assert info.loss[-1, -1] < 1e-8 < 1.0 < info.loss[0, 0]
    assert state.step == 600


def test_without_data_the_loss_is_given_no_batch_and_draws_by_its_key():
    def loss(params, batch, key, step):
        assert batch is None
        return jnp.sum(params) * jax.random.normal(key), {}

    optimizer, key = optax.sgd(0.1), jax.random.key(1)
    state = init_state(jnp.zeros(2), optimizer)
    info = empty_info(loss, state, None, key, 3)
    state, info = train_steps(loss, optimizer, state, info, None, None, key, 0, 3)
    noise = [jax.random.normal(jax.random.fold_in(key, step)) for step in range(3)]
    np.testing.assert_allclose(state.params, -0.1 * np.sum(noise) * np.ones(2), rtol=1e-5)


# --- Keys


def test_every_step_has_its_own_key_derived_from_the_epochs_and_its_number():
    key = jax.random.key(3)
    state, first = an_epoch(key)
    _, second = an_epoch(key, number=1, state=state)
    for number, info in enumerate((first, second)):
        _, steps_key = epoch_keys(key, number)
        steps = range(number * STEPS, (number + 1) * STEPS)
        np.testing.assert_array_equal(info.figures["step"], steps)
        expected = [jax.random.uniform(jax.random.fold_in(steps_key, step)) for step in steps]
        np.testing.assert_array_equal(info.figures["uniform"], np.stack(expected))
    uniforms = np.concatenate([first.figures["uniform"], second.figures["uniform"]])
    assert len(set(uniforms.tolist())) == 2 * STEPS


def test_keys_of_epochs_differ_from_each_other_and_from_the_steps():
    pairs = [epoch_keys(jax.random.key(seed), epoch) for seed in range(2) for epoch in range(5)]
    data = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for pair in pairs for key in pair]
    assert len(set(data)) == 20


def test_train_is_a_function_of_its_key():
    first, again, other = (noisy_train()(PARAMS, DATA, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert np.all(first[0].params != other[0].params)
    assert np.all(first[1].loss != other[1].loss)


def test_train_is_its_epochs_one_after_the_other():
    key = jax.random.key(7)
    state, info = noisy_train()(PARAMS, DATA, key)
    one = None
    for number in range(3):
        one, epoch = an_epoch(key, number=number, state=one)
        np.testing.assert_array_equal(info.figures["uniform"][number], epoch.figures["uniform"])
        np.testing.assert_allclose(info.loss[number], epoch.loss, rtol=1e-5)
    np.testing.assert_allclose(state.params, one.params, rtol=1e-5, atol=1e-6)


# --- Epochs


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_an_epoch_takes_floor_n_over_b_batches_and_visits_no_example_twice(batch_size):
    order = epoch_order(jax.random.key(0), SIZE, batch_size)
    assert order.shape == (SIZE // batch_size, batch_size)
    assert order.dtype == jnp.int32
    visited = np.asarray(order).ravel().tolist()
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(SIZE))


def test_all_leaves_of_an_example_stay_together():
    def loss(params, batch, key, step):
        index, square = batch
        return jnp.sum(params), {"same": jnp.all(index**2 == square), "sum": jnp.sum(index)}

    data = (jnp.arange(SIZE), jnp.arange(SIZE) ** 2)
    _, info = train(loss, optax.sgd(0.0), jnp.zeros(2), data, jax.random.key(0), batch_size=5, epochs=2)
    assert np.all(info.figures["same"])
    assert len(set(np.asarray(info.figures["sum"]).ravel().tolist())) > 2


def test_every_epoch_has_a_new_order_and_leaves_out_other_examples():
    orders = [epoch_order(epoch_keys(jax.random.key(0), number)[0], SIZE, 5) for number in range(6)]
    orders = [tuple(np.asarray(order).ravel().tolist()) for order in orders]
    assert len(set(orders)) == 6
    assert all(list(order) != sorted(order) for order in orders)
    assert len({frozenset(order) for order in orders}) > 1
    assert set().union(*orders) == set(range(SIZE))


def test_orders_are_drawn_evenly():
    # 300 epochs of one batch of 5 from 23: each example is left out with probability 18/23 in each.
    first = jax.vmap(lambda key: epoch_order(key, SIZE, 5)[0])(jax.random.split(jax.random.key(1), 300))
    counts = np.bincount(np.asarray(first).ravel(), minlength=SIZE)
    mean = 300 * 5 / SIZE
    assert np.max(np.abs(counts - mean)) < 5 * np.sqrt(mean * (1 - 5 / SIZE))


# --- Pieces


@pytest.mark.parametrize("cuts", [(1,), (2, 2, 3), (1, 2, 3), (0, 4)])
def test_pieces_of_any_length_give_the_same_epoch_bit_for_bit(cuts):
    key = jax.random.key(3)
    assert_same_bits(an_epoch(key, *cuts), an_epoch(key))


def test_a_piece_of_no_steps_changes_nothing_and_empty_info_is_finite():
    key = jax.random.key(0)
    state = init_state(jnp.asarray(PARAMS), ADAM)
    info = empty_info(noisy, state, SHAPE, key, STEPS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(info))  # else JAX_DEBUG_NANS stops at them
    assert_same_bits(compiled()(state, info, DATA, jnp.zeros((STEPS, BATCH), jnp.int32), key, 2, 2), (state, info))


def test_bounds_that_are_traced_are_one_program():
    """Else each piece of an epoch would compile again."""
    traced = []

    def loss(params, batch, key, step):
        traced.append(step)
        return noisy(params, batch, key, step)

    steps, key = jax.jit(functools.partial(train_steps, loss, ADAM)), jax.random.key(0)
    state = init_state(jnp.asarray(PARAMS), ADAM)
    info = empty_info(noisy, state, SHAPE, key, STEPS)
    order = epoch_order(key, SIZE, BATCH)
    counts = set()
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        state, info = steps(state, info, DATA, order, key, start, stop)
        counts.add(len(traced))
    assert len(counts) == 1


# --- Optimisers that need more than the gradient


@pytest.mark.usefixtures("any_promotion")
def test_an_optimiser_that_needs_the_value_is_given_the_value():
    """reduce_on_plateau halves the step once the loss no longer falls: with a rate of 2 it alternates for ever."""

    def loss(params, batch, key, step):
        return 0.5 * jnp.sum(jnp.square(params)), {}

    def values(optimizer):
        _, info = train(loss, optimizer, jnp.ones(2), jnp.arange(20), jax.random.key(0), batch_size=1, epochs=1)
        return np.asarray(info.loss[0])

    np.testing.assert_allclose(values(optax.sgd(2.0)), 1.0, rtol=1e-6)
    plateau = optax.chain(optax.sgd(2.0), optax.contrib.reduce_on_plateau(patience=2, factor=0.5, cooldown=0))
    found = values(plateau)
    np.testing.assert_allclose(found[:2], 1.0, rtol=1e-6)
    assert found[-1] < 1e-6


def test_an_optimiser_is_given_the_value_and_the_gradient_by_name():
    def update(updates, state, params=None, *, value, grad, **extra):
        return jax.tree.map(lambda update, g: -0.1 * value * g, updates, grad), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, batch = jnp.array([1.0, -2.0]), jnp.array([0.0, 1.0])
    new, info = one_step(half_square, optimizer, init_state(params, optimizer), batch, jax.random.key(0))
    np.testing.assert_allclose(new.params, params - 0.1 * info.loss * (params - batch), rtol=1e-6)


# --- Errors


def run(loss=noisy, data=DATA, **changed):
    return train(loss, ADAM, PARAMS, data, jax.random.key(0), **{"batch_size": BATCH, "epochs": 1} | changed)


@pytest.mark.parametrize("batch_size", [0, SIZE + 1, -1])
def test_a_batch_size_that_does_not_fit_is_an_error(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be between 1 and the 23 examples of data; got {batch_size}"):
        run(batch_size=batch_size)


@pytest.mark.parametrize(
    ("data", "shapes"),
    [
        ({"x": np.zeros((100, 3)), "y": np.zeros(50)}, r"\[\[100, 3\], \[50\]\]"),
        ((np.zeros((4, 3)), np.zeros(())), r"\[\[4, 3\], \[\]\]"),
        ((), r"\[\]"),
    ],
)
def test_data_of_different_lengths_are_an_error(data, shapes):
    with pytest.raises(ValueError, match=rf"data must be arrays \[N, ...\] of one length N; got the shapes {shapes}$"):
        run(data=data)


def test_train_without_data_takes_steps_alone():
    def loss(params, batch, key, step):
        assert batch is None
        return jnp.sum(jnp.square(params)) + jnp.sum(params) * jax.random.normal(key), {"first": params[0]}

    def train_alone(key, **given):
        return train(loss, ADAM, PARAMS, None, key, **given)

    state, info = jax.jit(lambda key: train_alone(key, steps=5))(jax.random.key(0))
    _, steps_key = epoch_keys(jax.random.key(0), 0)
    start = init_state(PARAMS, ADAM)
    empty = empty_info(loss, start, None, steps_key, 5)
    expected = train_steps(loss, ADAM, start, empty, None, None, steps_key, 0, 5)
    np.testing.assert_allclose(state.params, expected[0].params, rtol=1e-6)
    assert (info.loss.shape, info.figures["first"].shape, int(state.step)) == ((5,), (5,), 5)
    both, _ = jax.vmap(lambda key: train_alone(key, steps=5))(jax.random.split(jax.random.key(0), 2))
    assert both.params.shape == (2, *PARAMS.shape)
    for given in ({}, {"steps": -1}, {"steps": 5, "epochs": 1}, {"steps": 5, "batch_size": 4}):
        with pytest.raises(ValueError, match="with data=None, steps must be given, at least 0, and nothing else; got"):
            train_alone(jax.random.key(0), **given)


@pytest.mark.parametrize("given", [{"steps": 5}, {"batch_size": None}, {"epochs": None}])
def test_data_are_taken_by_batch_and_epoch(given):
    with pytest.raises(
        ValueError, match="batch_size and epochs must be given with data, and steps only with data=None"
    ):
        run(**given)


def test_a_negative_number_of_epochs_is_an_error_and_none_is_the_start():
    with pytest.raises(ValueError, match="epochs must be at least 0; got -1"):
        run(epochs=-1)
    state, info = run(epochs=0)
    np.testing.assert_array_equal(state.params, PARAMS)
    assert info.loss.shape == (0, STEPS)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda p, *_: jnp.sum(p), r"loss must return \(value, \{name: figure\}\); got ShapeDtypeStruct"),
        (lambda p, *_: (jnp.sum(p), jnp.sum(p)), r"loss must return \(value, \{name: figure\}\); got \(Shape"),
        (lambda p, *_: (jnp.sum(p), {}, {}), r"loss must return \(value, \{name: figure\}\); got \(Shape"),
        (lambda p, *_: (p, {}), r"loss must return scalars; got the value of ShapeDtypeStruct\(shape=\(3,\)"),
        (
            lambda p, *_: (jnp.sum(p), {"mean": p}),
            r"loss must return scalars; got mean of ShapeDtypeStruct\(shape=\(3,",
        ),
        (lambda p, *_: (jnp.sum(p), {"a": {"b": jnp.sum(p)}}), r"loss must return scalars; got a of \{'b': "),
    ],
)
def test_a_loss_that_returns_anything_else_is_an_error(loss, words):
    with pytest.raises(ValueError, match=words):
        run(loss)


# --- Meshes

SHARDED = """
import os
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, PartitionSpec
from planar_vae_jax.train.loop import train

def loss(params, batch, key, step):
    return jnp.mean((batch @ params - jax.random.normal(key, ())) ** 2), {"norm": jnp.sum(params**2)}

def run(keys):
    params = jax.random.normal(keys[0], (3,))
    state, info = train(loss, optax.adam(0.1), params, jnp.ones((32, 3)), keys[0], batch_size=8, epochs=2)
    return jax.tree.map(lambda leaf: leaf[None], (state.params, info))

keys = jax.random.split(jax.random.key(0), 4)
mesh = jax.make_mesh((4,), ("seeds",), axis_types=(AxisType.Auto,))
each = PartitionSpec("seeds")
sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=each, out_specs=each, check_vma=True))(keys)
alone = jax.vmap(lambda key: run(key[None]))(keys)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, 0], rtol=1e-5, atol=1e-6), sharded, alone)
print("the same")
"""


def test_a_seed_on_each_device_by_shard_map_is_that_seed_by_vmap():
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr
