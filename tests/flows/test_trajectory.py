"""Where events are after each layer, against the flow of the first layers."""

import jax
import numpy as np
import pytest
from helpers import assert_trees_close

from planar_vae_jax import Planar, planar_flow
from planar_vae_jax.flows import planar_trajectory

K = 5


def flow_and_events(of_params, of_events, dim, flow_length=K):
    rng = np.random.default_rng(0)
    shapes = (*of_params, flow_length, dim), (*of_params, flow_length, dim), (*of_params, flow_length)
    return Planar(*(rng.normal(size=shape) for shape in shapes)), rng.normal(size=(*of_events, dim))


@pytest.mark.parametrize("dim", [2, 6])
@pytest.mark.parametrize(("of_params", "of_events"), [((), ()), ((), (3, 4)), ((4,), (3, 4)), ((3, 1), (4,))], ids=str)
def test_each_entry_is_the_flow_of_the_first_layers(of_params, of_events, dim, x64):
    params, z0 = flow_and_events(of_params, of_events, dim)
    z, log_det = planar_trajectory(params, z0)
    lead = np.broadcast_shapes(of_params, of_events)
    assert (z.shape, log_det.shape) == ((K + 1, *lead, dim), (K + 1, *lead))
    for k in range(K + 1):
        first = Planar(params.u[..., :k, :], params.w[..., :k, :], params.b[..., :k])
        assert_trees_close((z[k], log_det[k]), planar_flow(first, z0, method="scan"), tolerance=1e-13)


def test_derivatives_are_those_of_the_flow(x64):
    params, z0 = flow_and_events((), (4,), 3)

    def total(function, params, z0):
        z, log_det = function(params, z0)
        return np.cos(np.arange(3.0)) @ z.sum(0) + 2.0 * log_det.sum()

    def last(params, z0):
        return jax.tree.map(lambda leaf: leaf[-1], planar_trajectory(params, z0))

    of_flow, of_last = (
        jax.jit(jax.grad(lambda *x, f=f: total(f, *x), (0, 1)))(params, z0) for f in (planar_flow, last)
    )
    assert_trees_close(of_last, of_flow, tolerance=1e-12)


def test_without_layers_events_stay_where_they_are(dtype):
    params, z0 = flow_and_events((), (4,), 3, flow_length=0)
    z, log_det = planar_trajectory(jax.tree.map(lambda leaf: leaf.astype(dtype), params), z0.astype(dtype))
    np.testing.assert_array_equal(z, z0.astype(dtype)[None])
    np.testing.assert_array_equal(log_det, np.zeros((1, 4)))
    assert z.dtype == log_det.dtype == dtype


def test_what_does_not_fit_is_refused():
    params, z0 = flow_and_events((), (4,), 3)
    with pytest.raises(ValueError, match=r"z0 must be of shape \[\.\.\., 3\]"):
        planar_trajectory(params, z0[:, :2])
    with pytest.raises(ValueError, match="h must be one of"):
        planar_trajectory(params, z0, h="relu")
