"""The Gram form: its recursion, and its derivatives of any order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_trees_close, draw
from flow_cases import objective

from planar_vae_jax import Planar, gram, init_planar, planar_flow


def nested(modes, function, argnums):
    """``function`` differentiated once by each of ``modes``."""
    for mode in modes:
        function = mode(function, argnums)
    return function


@pytest.mark.parametrize(
    "modes",
    [
        (jax.jacrev, jax.jacfwd),
        (jax.jacrev, jax.jacrev),
        (jax.jacfwd, jax.jacrev),
        (jax.jacfwd, jax.jacfwd),
        (jax.jacrev, jax.jacrev, jax.jacrev),
    ],
    ids=lambda modes: " ".join(mode.__name__ for mode in modes),
)
def test_the_gram_form_can_be_differentiated_in_either_mode_again_and_again(modes, x64):
    params, z0 = draw(6, 45, scale=0.5)  # two blocks

    def derivatives(method):
        def value(*args):
            return objective(Planar(*args[:3]), args[3], h="tanh", method=method)[0]

        # By z0 or b alone: constants among what is differentiated are a case of their own.
        argnums = (2, 3) if len(modes) == 2 else (3,)
        return jax.jit(lambda *args: [nested(modes, value, argnum)(*args) for argnum in argnums])(*params, z0)

    for actual, expected in zip(derivatives("gram"), derivatives("scan"), strict=True):
        assert np.max(np.abs(expected)) > 1e-3
        assert_trees_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize(
    ("axes", "dim"), [((None, None), 6), ((None, 0), 6), ((0, None), 6), ((0, 0), 6), ((None, 0), 2)], ids=str
)
def test_the_gram_form_under_two_vmaps_is_the_layer_scan(axes, dim, x64):
    # Samples of images: parameters may be shared by all, by the samples of an image, or by none.
    params, _ = draw(dim, 45, scale=0.7)
    shape = tuple(size for size, axis in zip((3, 4), axes, strict=True) if axis == 0)
    scales = np.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)
    params = jax.tree.map(lambda leaf: np.multiply.outer(scales, leaf), params)
    z0 = np.random.default_rng(0).normal(size=(3, 4, dim))

    def gradients(method):
        function = functools.partial(objective, h="tanh", method=method)
        for axis in reversed(axes):
            function = jax.vmap(function, in_axes=(axis, 0))
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args)[0]), argnums=(0, 1)))(params, z0)

    assert_trees_close(gradients("gram"), gradients("scan"), tolerance=1e-12)


@pytest.mark.parametrize("size", [1, 7, 40, 41, 100, 130])
def test_substitution_in_blocks_is_the_plain_one(size, x64):
    rng = np.random.default_rng(size)
    r, L, shift = rng.normal(size=(size, 3)), 0.3 * rng.normal(size=(size, size)), rng.normal(size=size)

    own = np.broadcast_to(shift[:, None], r.shape)

    value, total = np.zeros((2, size, 3))
    for k in range(size):
        total[k] = r[k] + L[k, :k] @ value[:k]
        value[k] = np.tanh(total[k] + shift[k])
    substitute = functools.partial(gram._substitute, lambda total, own: jnp.tanh(total + own))
    actual = jax.jit(substitute)(r, np.tril(L, -1), own)
    assert_trees_close(actual, (total, value), tolerance=1e-13)


def test_reverse_mode_of_the_gram_form_keeps_no_copy_of_z_for_every_layer():
    params, z0 = init_planar(jax.random.key(0), flow_length=32, dim=784), jnp.zeros((64, 784))

    def kept(method):
        flow = functools.partial(planar_flow, method=method)
        # The pullback is a pytree, and its leaves are what reverse mode keeps.
        pullback = jax.eval_shape(lambda *args: jax.vjp(flow, *args)[1], params, z0)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    copies = 32 * 64 * 784  # z after every layer
    assert kept("scan") > copies
    assert kept("gram") < copies / 4


@pytest.mark.parametrize("transform", [jax.jvp, jax.vjp], ids=lambda transform: transform.__name__)
def test_scanned_blocks_have_the_derivatives_of_the_layer_scan(transform, x64):
    params, z0 = draw(5, 140, scale=0.4)

    def derivatives(method):
        function = functools.partial(planar_flow, method=method)
        if transform is jax.jvp:
            return jax.jit(lambda *args: jax.jvp(function, args, args))(params, z0)
        return jax.jit(lambda *args: jax.vjp(function, *args)[1](function(*args)))(params, z0)

    assert_trees_close(derivatives("gram"), derivatives("scan"), tolerance=1e-11)
