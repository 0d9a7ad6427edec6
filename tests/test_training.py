"""Training runs are pure functions of their key, and optimise what they are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from planar_vae_jax.training import (
    Pace,
    empty_info,
    epoch_order,
    indexed,
    init_state,
    run_epoch,
    run_piece,
    run_pieces,
    run_steps,
    train,
    train_step,
)

# --- Problems with a known course


def half_square(params, batch, key):
    """``0.5 |params - batch|^2``: gradient descent moves by ``rate (batch - params)``."""
    del key
    return 0.5 * jnp.sum(jnp.square(params - batch)), {"batch": batch}


def noisy(params, batch, key):
    """A loss that depends on all it is given; reports the key's first random number."""
    noise = jax.random.normal(key, params.shape)
    loss = jnp.mean(jnp.square(params - batch + noise)) + 0.1 * jnp.sum(jnp.cos(params))
    return loss, jax.random.uniform(key)


def start(key):
    return jax.random.normal(key, (3,))


def adam(learning_rate):
    """Optax's Adam, which raises a Python float to an int32 count: the one thing strict promotion is off for."""
    optimizer = optax.adam(learning_rate)

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


DATA = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
ADAM = adam(0.05)


@functools.cache
def noisy_run():
    return jax.jit(functools.partial(run_steps, noisy, ADAM))


@functools.cache
def noisy_train():
    return jax.jit(functools.partial(train, start, noisy, ADAM))


def assert_same_bits(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


# --- Steps


def test_a_step_is_the_optimisers_update_and_reports_the_loss_before_it():
    optimizer = optax.sgd(0.1)
    params, batch = jnp.array([1.0, -2.0]), jnp.array([0.0, 1.0])
    state = init_state(params, optimizer)
    new, info = train_step(half_square, optimizer, state, batch, jax.random.key(0))
    np.testing.assert_allclose(new.params, [0.9, -1.7], rtol=1e-6)
    assert (state.step, new.step, new.step.dtype) == (0, 1, jnp.int32)
    assert float(info.loss) == pytest.approx(5.0)
    assert float(info.gradient_norm) == pytest.approx(np.sqrt(10.0), rel=1e-6)
    np.testing.assert_array_equal(info.aux["batch"], batch)
    np.testing.assert_array_equal(state.params, params)


def test_gradient_norm_is_that_of_all_leaves_together():
    def loss(params, batch, key):
        return 3.0 * params["a"] + jnp.sum(params["b"][0] * batch), None

    params = {"a": jnp.array(0.0), "b": [jnp.zeros((2, 2))]}
    optimizer = optax.sgd(1.0)
    batch = jnp.array([[1.0, 2.0], [1.0, 1.0]])
    _, info = train_step(loss, optimizer, init_state(params, optimizer), batch, jax.random.key(0))
    assert float(info.gradient_norm) == pytest.approx(4.0, rel=1e-6)


def test_the_optimiser_sees_the_parameters_as_weight_decay_needs_them():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    state = init_state(jnp.array([2.0]), optimizer)
    new, _ = train_step(lambda p, b, k: (jnp.zeros(()), None), optimizer, state, None, jax.random.key(0))
    np.testing.assert_allclose(new.params, [2.0 - 0.1 * 0.5 * 2.0], rtol=1e-6)


def test_gradient_descent_on_a_quadratic_takes_its_known_course():
    rate, steps = 0.1, 25
    target, origin = np.array([1.0, -3.0], np.float32), np.array([5.0, 5.0], np.float32)
    optimizer = optax.sgd(rate)
    data = np.broadcast_to(target, (steps, 2))
    state, info = jax.jit(functools.partial(run_steps, half_square, optimizer))(
        init_state(origin, optimizer), data, jax.random.key(0)
    )
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

    def loss(params, batch, key):
        slope, intercept = params
        x, y = batch
        return jnp.mean(jnp.square(jnp.dot(x, slope) + intercept - y)), None

    @jax.jit
    def run(key):
        def epoch(state, key):
            return run_epoch(loss, optimizer, state, (x, y), key, batch_size=20)

        state = init_state((jnp.zeros(3), jnp.zeros(())), optimizer)
        return jax.lax.scan(epoch, state, jax.random.split(key, 200))

    state, info = run(jax.random.key(0))
    slope, intercept = state.params
    np.testing.assert_allclose(slope, [1.0, -2.0, 0.5], atol=1e-4)
    assert float(intercept) == pytest.approx(0.7, abs=1e-4)
    assert info.loss[-1, -1] < 1e-8 < 1.0 < info.loss[0, 0]
    assert state.step == 600


# --- Keys


def test_every_step_has_its_own_key_derived_from_the_runs_key_and_its_number():
    key = jax.random.key(3)
    _, info = noisy_run()(init_state(start(key), ADAM), DATA, key)
    assert len(set(np.asarray(info.aux).tolist())) == len(DATA)
    expected = [jax.random.uniform(jax.random.fold_in(key, step)) for step in range(len(DATA))]
    np.testing.assert_array_equal(info.aux, np.stack(expected))


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_run_cut_in_two_is_the_same_run_bit_for_bit(cut):
    key = jax.random.key(3)
    state = init_state(start(key), ADAM)
    whole, info = noisy_run()(state, DATA, key)
    middle, first = noisy_run()(state, DATA[:cut], key)
    assert middle.step == cut
    end, second = noisy_run()(middle, DATA[cut:], key)
    assert_same_bits(end, whole)
    assert_same_bits(jax.tree.map(lambda *parts: np.concatenate(parts), first, second), info)


def test_a_run_of_no_steps_changes_nothing():
    state = init_state(start(jax.random.key(0)), ADAM)
    end, info = noisy_run()(state, DATA[:0], jax.random.key(0))
    assert_same_bits(end, state)
    assert info.loss.shape == (0,)


def test_train_is_a_function_of_its_key():
    first, again, other = (noisy_train()(DATA, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_same_bits(first, again)
    assert np.all(first[0].params != other[0].params)
    assert np.all(first[1].loss != other[1].loss)


def test_train_initialises_from_one_half_of_the_key_and_steps_with_the_other():
    key = jax.random.key(7)
    init_key, steps_key = jax.random.split(key)
    state, info = noisy_train()(DATA, key)
    expected_state, expected_info = noisy_run()(init_state(start(init_key), ADAM), DATA, steps_key)
    assert_same_bits(info.aux, expected_info.aux)
    np.testing.assert_allclose(state.params, expected_state.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.loss, expected_info.loss, rtol=1e-5)


def test_vmap_over_keys_equals_separate_runs():
    keys = jax.random.split(jax.random.key(0), 4)
    state, info = jax.jit(jax.vmap(functools.partial(train, start, noisy, ADAM), in_axes=(None, 0)))(DATA, keys)
    assert info.loss.shape == (4, 12)
    for i, key in enumerate(keys):
        one_state, one_info = noisy_train()(DATA, key)
        np.testing.assert_array_equal(info.aux[i], one_info.aux)
        np.testing.assert_allclose(info.loss[i], one_info.loss, rtol=1e-5)
        np.testing.assert_allclose(state.params[i], one_state.params, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in np.asarray(state.params).tolist()}) == 4


# --- Epochs

SIZE = 23


def count(params, batch, key):
    index, square = batch
    return jnp.sum(params), (index, square, jax.random.uniform(key))


@functools.cache
def epoch(batch_size):
    optimizer = optax.sgd(0.0)
    data = (jnp.arange(SIZE), jnp.arange(SIZE) ** 2)
    state = init_state(jnp.zeros(2), optimizer)
    function = jax.jit(functools.partial(run_epoch, count, optimizer, batch_size=batch_size))
    return lambda key, state=state: function(state, data, key)


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_an_epoch_takes_floor_n_over_b_batches_and_visits_no_example_twice(batch_size):
    state, info = epoch(batch_size)(jax.random.key(0))
    index, square, _ = info.aux
    assert index.shape == (SIZE // batch_size, batch_size)
    assert state.step == SIZE // batch_size
    visited = np.asarray(index).ravel().tolist()
    assert len(set(visited)) == len(visited) == SIZE // batch_size * batch_size
    assert set(visited) <= set(range(SIZE))
    np.testing.assert_array_equal(square, np.asarray(index) ** 2)  # all leaves of an example stay together


def test_every_epoch_has_a_new_order_and_new_step_keys_and_leaves_out_other_examples():
    infos = [epoch(5)(jax.random.key(seed))[1].aux for seed in range(6)]
    orders = [tuple(np.asarray(index).ravel().tolist()) for index, _, _ in infos]
    assert len(set(orders)) == 6
    assert all(list(order) != sorted(order) for order in orders)
    assert len({frozenset(order) for order in orders}) > 1
    assert set().union(*orders) == set(range(SIZE))
    uniforms = np.stack([uniform for _, _, uniform in infos])
    assert len(np.unique(uniforms)) == uniforms.size
    assert_same_bits(epoch(5)(jax.random.key(0))[1].aux, infos[0])


def test_orders_are_drawn_evenly():
    # 300 epochs of one batch of 5 from 23: each example is left out with probability 18/23 in each.
    first = jax.jit(jax.vmap(lambda key: epoch(5)(key)[1].aux[0][0]))(jax.random.split(jax.random.key(1), 300))
    counts = np.bincount(np.asarray(first).ravel(), minlength=SIZE)
    mean = 300 * 5 / SIZE
    assert np.max(np.abs(counts - mean)) < 5 * np.sqrt(mean * (1 - 5 / SIZE))


def test_epochs_go_on_counting_steps_so_that_a_resumed_run_is_the_same_run():
    state, first = epoch(5)(jax.random.key(0))
    state, second = epoch(5)(jax.random.key(0), state)
    assert state.step == 2 * (SIZE // 5)
    assert_same_bits(first.aux[0], second.aux[0])  # the order belongs to the epoch's key,
    assert not set(np.asarray(first.aux[2]).tolist()) & set(np.asarray(second.aux[2]).tolist())  # noise to the step


# --- Pieces and failures


@functools.cache
def noisy_piece():
    return jax.jit(functools.partial(run_piece, noisy, ADAM))


def cut_up(key, *cuts):
    state = init_state(start(key), ADAM)
    info = empty_info(noisy, ADAM, state, DATA, key)
    for begin, end in zip((0, *cuts), (*cuts, len(DATA)), strict=True):
        state, info, reached = noisy_piece()(state, info, DATA, key, begin, end)
        assert int(reached) == end
    return state, info


@pytest.mark.parametrize("cuts", [(), (1,), (5, 5, 11), tuple(range(1, 12))])
def test_pieces_of_any_length_are_one_program_and_the_same_run_bit_for_bit(cuts):
    key = jax.random.key(3)
    assert_same_bits(cut_up(key, *cuts), noisy_run()(init_state(start(key), ADAM), DATA, key))
    assert noisy_piece()._cache_size() == 1


def test_an_epoch_in_pieces_is_the_epoch():
    optimizer = optax.sgd(0.0)
    data = (jnp.arange(SIZE), jnp.arange(SIZE) ** 2)
    state, key = init_state(jnp.zeros(2), optimizer), jax.random.key(0)
    order, steps_key = epoch_order(key, SIZE, 5)
    loss = indexed(count, data)
    info = empty_info(loss, optimizer, state, order, steps_key)
    for begin, end in ((0, 3), (3, 4)):
        state, info, _ = run_piece(loss, optimizer, state, info, order, steps_key, begin, end)
    assert_same_bits((state, info), epoch(5)(key))


def bomb(params, batch, key):
    """A loss that is ``batch[1]``, with a gradient of ``batch[0]`` for each parameter."""
    del key
    return jnp.sum(params * batch[0]) - jax.lax.stop_gradient(jnp.sum(params * batch[0])) + batch[1], batch


FAILURES = {"loss": [1.0, np.nan], "infinite loss": [1.0, np.inf], "gradient": [np.inf, 0.0], "norm": [1e30, 0.0]}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_run_ends_at_the_first_step_that_is_not_finite(failure, at):
    data = np.tile(np.array([1.0, 0.5], np.float32), (10, 1))
    data[at] = FAILURES[failure]
    optimizer, key = optax.sgd(0.25), jax.random.key(0)
    initial = init_state(jnp.zeros(3), optimizer)
    piece = jax.jit(functools.partial(run_piece, bomb, optimizer))
    calls = []

    def counted(state, info, start, stop):
        calls.append((start, stop))
        return piece(state, info, data, key, start, stop)

    info = empty_info(bomb, optimizer, initial, data, key)
    pace = Pace()
    pace.took(6, 1.0)  # calls of six steps
    state, info, reached, failed = run_pieces(counted, initial, info, 0, 10, pace=pace)
    assert (reached, failed) == (at, True)
    # The state is the one before the step that failed, and the info that of the step.
    np.testing.assert_array_equal(state.params, np.full(3, -0.25 * at))
    assert state.step == at
    np.testing.assert_array_equal(info.aux[: at + 1], data[: at + 1])
    assert np.all(np.isnan(info.loss[at + 1 :]))
    assert not np.isfinite(info.loss[at]) or not np.isfinite(info.gradient_norm[at])
    assert all(stop <= 10 for _, stop in calls)
    # A whole run as one function ends there too.
    _, whole = jax.jit(functools.partial(run_steps, bomb, optimizer))(initial, data, key)
    assert_same_bits(whole, info)


def test_one_seed_that_fails_does_not_stop_the_others():
    def loss(params, batch, key):
        fails = (batch == 3) & (params > 0.0)
        return jnp.where(fails, jnp.nan, params * 0.0), None

    init = lambda key: jnp.where(jax.random.uniform(key) < 0.5, 1.0, -1.0)  # noqa: E731
    optimizer = optax.sgd(0.1)
    keys = jax.random.split(jax.random.key(0), 8)
    state, info = jax.vmap(functools.partial(train, init, loss, optimizer), in_axes=(None, 0))(jnp.arange(6), keys)
    fails = np.isnan(np.asarray(info.loss)[:, 3])
    assert 0 < fails.sum() < 8
    np.testing.assert_array_equal(state.step, np.where(fails, 4, 6))
    np.testing.assert_array_equal(np.isnan(info.loss).sum(1), np.where(fails, 3, 0))


def test_pieces_end_where_they_are_told_to_and_go_on_from_there():
    key = jax.random.key(3)
    state = init_state(start(key), ADAM)
    info = empty_info(noisy, ADAM, state, DATA, key)

    def piece(state, info, start, stop):
        return noisy_piece()(state, info, DATA, key, start, stop)

    pace = Pace()
    pace.took(4, 1.0)
    answers = iter([False, True])
    state, info, reached, failed = run_pieces(piece, state, info, 0, 12, pace=pace, stopping=lambda: next(answers))
    assert (reached, failed, int(state.step)) == (4, False, 4)
    state, info, reached, failed = run_pieces(piece, state, info, 4, 12, pace=pace)
    assert (reached, failed) == (12, False)
    assert_same_bits((state, info), cut_up(key))


def test_the_pace_finds_the_steps_that_fill_its_seconds():
    pace, done = Pace(seconds=2.0), []
    position = 0
    while position < 10_000:
        end = pace.end(position, 10_000)
        done.append(end - position)
        pace.took(end - position, 0.01 * (end - position) + (5.0 if position == 0 else 0.0))  # compiles at first
        position = end
    assert max(done) < 300  # 200, and a small rest taken along
    assert done.count(200) > 40
    pace.took(200, 1000.0)
    assert pace.end(0, 100) == 1
