"""Training many seeds at once by ``jax.vmap``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training_cases import ADAM, BATCH, DATA, PARAMS, SHAPE, STEPS, noisy

from planar_vae_jax.train.loop import empty_info, init_state, train, train_steps


def over_seeds(key):
    return train(noisy, ADAM, jax.random.normal(key, (3,)), DATA, key, batch_size=BATCH, epochs=3)


def test_vmap_over_seeds_equals_separate_trainings():
    keys = jax.random.split(jax.random.key(0), 4)
    state, info = jax.jit(jax.vmap(over_seeds))(keys)
    assert info.loss.shape == (4, 3, STEPS)
    for i, key in enumerate(keys):
        one_state, one_info = jax.jit(over_seeds)(key)
        np.testing.assert_array_equal(info.figures["uniform"][i], one_info.figures["uniform"])
        np.testing.assert_array_equal(info.figures["batch"][i], one_info.figures["batch"])
        np.testing.assert_allclose(info.loss[i], one_info.loss, rtol=1e-5)
        np.testing.assert_allclose(state.params[i], one_state.params, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in np.asarray(state.params).tolist()}) == 4


def primitives(jaxpr):
    """Of a jaxpr and of those inside it: ``(name, shapes of its results)``."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [variable.aval.shape for variable in equation.outvars]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_vmap_over_seeds_adds_no_selects():
    def selects(function, *args):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
        return sorted(name for name, _ in primitives(jaxpr) if name.startswith("select"))

    key = jax.random.key(0)
    keys = jax.random.split(key, 4)
    assert "scan" in {name for name, _ in primitives(jax.make_jaxpr(over_seeds)(key).jaxpr)}
    assert selects(jax.vmap(over_seeds), keys) == selects(over_seeds, key)

    def piece(bound):
        state = init_state(jnp.asarray(PARAMS), ADAM)
        info = empty_info(noisy, state, SHAPE, key, STEPS)
        return lambda key: train_steps(
            noisy, ADAM, state, info, jnp.asarray(DATA), jnp.zeros((STEPS, BATCH), int), key, 0, bound
        )

    # Bounds that are arguments too: no parameter is selected.
    jaxpr = jax.make_jaxpr(lambda keys, bound: jax.vmap(piece(bound))(keys))(keys, 3).jaxpr
    assert not [shapes for name, shapes in primitives(jaxpr) if name.startswith("select") and (4, 3) in shapes]


def test_one_seed_that_fails_leaves_the_others_alone():
    def loss(params, batch, key, step):
        return jnp.where((step == 3) & (params > 0.0), jnp.nan, params * 1.0), {}

    optimizer = optax.sgd(0.1)
    run = jax.vmap(
        lambda params: train(loss, optimizer, params, jnp.arange(6), jax.random.key(0), batch_size=1, epochs=1)
    )
    state, info = run(jnp.array([1.0, -1.0, 2.0, -2.0]))
    np.testing.assert_array_equal(np.isnan(info.loss[:, 0, 3]), [True, False, True, False])
    np.testing.assert_allclose(state.params[jnp.array([1, 3])], [-1.6, -2.6], rtol=1e-6)
    assert not np.any(np.isnan(info.loss[:, 0, :3]))
