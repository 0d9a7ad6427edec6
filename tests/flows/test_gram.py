"""The Gram form: its recursion, and its derivatives of any order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import objective
from helpers import assert_trees_close, draw

from planar_vae_jax import Planar, init_planar, planar_flow
from planar_vae_jax.flows import _gram as gram

FORWARD, REVERSE = jax.jacfwd, jax.jacrev


@functools.cache
def nested(method, modes, argnum):
    """The objective of one event differentiated once by each of ``modes``, by ``b`` or ``z0`` alone."""
    params, z0 = draw(6, 45 if len(modes) == 2 else 7, scale=0.5)  # six blocks, of which one is filled up, or one

    def function(*args):
        return objective(Planar(*args[:3]), args[3], h="tanh", method=method)[0]

    for mode in modes:
        function = mode(function, argnum)
    return np.asarray(jax.jit(function)(*params, z0))


@pytest.mark.parametrize(
    ("modes", "arguments"),
    [
        ((REVERSE, FORWARD), "b"),
        ((REVERSE, REVERSE), "b z0"),
        ((FORWARD, REVERSE), "z0"),
        ((FORWARD, FORWARD), "b"),
        pytest.param((REVERSE, REVERSE, REVERSE), "z0", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(mode.__name__ for mode in value),
)
def test_the_gram_form_can_be_differentiated_in_either_mode_again_and_again(modes, arguments, x64):
    # By z0 or b alone: constants among what is differentiated are a case of their own.
    for argument in arguments.split():
        argnum = {"b": 2, "z0": 3}[argument]
        # The same numbers in whichever mode: of the layer scan each is taken once.
        expected = nested("scan", (REVERSE, REVERSE) if len(modes) == 2 else (FORWARD, FORWARD, FORWARD), argnum)
        assert np.max(np.abs(expected)) > 1e-3
        assert_trees_close(nested("gram", modes, argnum), expected, tolerance=1e-11)


@functools.cache
def gradients_of_scans():
    """Of the layer scan, for each of ``[3, 4]`` flows and events by itself."""
    one = jax.value_and_grad(functools.partial(objective, h="tanh", method="scan"), argnums=(0, 1), has_aux=True)
    return jax.jit(jax.vmap(jax.vmap(one)))


@pytest.mark.parametrize(
    ("axes", "dim"), [((None, None), 6), ((None, 0), 6), ((0, None), 6), ((0, 0), 6), ((None, 0), 2)], ids=str
)
def test_the_gram_form_under_two_vmaps_is_the_layer_scan(axes, dim, x64):
    # Samples of images: parameters may be shared by all, by the samples of an image, or by none.
    params, _ = draw(dim, 45, scale=0.7)
    shape = tuple(size if axis == 0 else 1 for size, axis in zip((3, 4), axes, strict=True))
    shared = tuple(position for position, axis in enumerate(axes) if axis is None)
    scales = np.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)
    params = jax.tree.map(lambda leaf: np.multiply.outer(scales, leaf), params)
    z0 = np.random.default_rng(0).normal(size=(3, 4, dim))

    function = functools.partial(objective, h="tanh", method="gram")
    for axis in reversed(axes):
        function = jax.vmap(function, in_axes=(axis, 0))
    gradients = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args)[0]), argnums=(0, 1)))
    actual = gradients(jax.tree.map(lambda leaf: np.squeeze(leaf, shared), params), z0)

    each = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (3, 4, *leaf.shape[2:])), params)
    (values, _), (in_params, in_z0) = gradients_of_scans()(each, z0)
    in_params = jax.tree.map(lambda leaf: np.sum(leaf, axis=shared), in_params)
    assert_trees_close(actual, (np.sum(values), (in_params, in_z0)), tolerance=1e-12)


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
    params = jax.eval_shape(functools.partial(init_planar, flow_length=32, dim=784), jax.random.key(0))
    z0 = jax.ShapeDtypeStruct((64, 784), jnp.float32)

    def kept(method):
        flow = functools.partial(planar_flow, method=method)
        # The pullback is a pytree, and its leaves are what reverse mode keeps.
        pullback = jax.eval_shape(lambda *args: jax.vjp(flow, *args)[1], params, z0)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    copies = 32 * 64 * 784  # z after every layer
    assert kept("scan") > copies
    assert kept("gram") < copies / 4


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_of_no_events_in_two_blocks_there_are_no_results_and_gradients_are_0(lead):
    params, _ = draw(6, 9, dtype=np.float32)

    def total(*args):
        zK, log_det = planar_flow(*args)
        return jnp.sum(zK) + jnp.sum(log_det), (zK, log_det)

    z0 = np.zeros((*lead, 6), np.float32)
    gradients, (zK, log_det) = jax.grad(total, argnums=(0, 1), has_aux=True)(params, z0)
    assert (zK.shape, log_det.shape) == (z0.shape, lead)
    assert_trees_close(gradients, jax.tree.map(np.zeros_like, (params, z0)), tolerance=0)


@pytest.mark.parametrize("transform", [jax.jvp, jax.vjp], ids=lambda transform: transform.__name__)
def test_many_blocks_have_the_derivatives_of_the_layer_scan(transform, x64):
    params, z0 = draw(5, 140, scale=0.4)

    def derivatives(method):
        function = functools.partial(planar_flow, method=method)

        @jax.jit
        def run(*args):
            if transform is jax.jvp:
                return jax.jvp(function, args, args)
            outputs, pullback = jax.vjp(function, *args)
            return outputs, pullback(outputs)

        return run(params, z0)

    assert_trees_close(derivatives("gram"), derivatives("scan"), tolerance=1e-11)
