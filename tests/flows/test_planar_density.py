"""The density of a planar flow on a normal base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, draw, grid, normal_log_prob, stack

from planar_vae_jax import Planar, PlanarFlow, planar_flow
from planar_vae_jax.flows.distribution import first_layers


def random_flow(flows=(), base=(), dim=3, dtype=np.float64):
    rng = np.random.default_rng(1)
    shapes = (*flows, 4, dim), (*flows, 4, dim), (*flows, 4)
    params = Planar(*(0.5 * rng.normal(size=shape).astype(dtype) for shape in shapes))
    mean, log_std = (0.5 * rng.normal(size=(*base, dim)).astype(dtype) for _ in range(2))
    return PlanarFlow(params, mean, log_std)


@pytest.mark.parametrize(("flows", "base"), [((), (5,)), ((5,), ()), ((2, 1), (5,))], ids=str)
def test_samples_have_the_log_density_that_the_inverse_gives_them(flows, base, x64):
    flow = random_flow(flows, base)
    batch = np.broadcast_shapes(flows, base)
    assert flow.batch_shape == batch

    @jax.jit
    def run(flow, key):
        zK, log_prob = flow.sample_and_log_prob(key, (7,))
        return zK, log_prob, flow.log_prob(zK), flow.sample(key, (7,))

    zK, log_prob, inverse, again = run(flow, jax.random.key(0))
    one = jax.eval_shape(PlanarFlow.sample, flow, jax.random.key(0))
    assert (zK.shape, log_prob.shape, one.shape) == ((7, *batch, 3), (7, *batch), (*batch, 3))
    assert_trees_close((inverse, again), (log_prob, zK), tolerance=1e-12)


@pytest.mark.parametrize(
    ("flows", "mean", "log_std", "lower", "points"),
    [
        ((5,), (4, 1), (), None, ()),
        ((), (4, 5), (), None, (5,)),
        ((), (), (4, 5), None, (5,)),
        ((4, 5), (), (), None, ()),
        ((), (), (), (4, 5), (5,)),
        ((5,), (), (5,), (4, 1), (1,)),
        ((), (5,), (4, 1), (5,), (3, 1, 1)),
    ],
    ids=str,
)
def test_points_may_have_fewer_axes_than_what_the_density_is_made_of(flows, mean, log_std, lower, points, x64):
    rng = np.random.default_rng(2)
    shapes = [(*flows, 4, 3), (*flows, 4, 3), (*flows, 4), (*mean, 3), (*log_std, 3), (*points, 3)]
    *leaves, x = (0.5 * rng.normal(size=shape) for shape in (*shapes[:-1], (*(lower or ()), 3, 3), shapes[-1]))

    def density(u, w, b, mean, log_std, factor):
        return PlanarFlow(Planar(u, w, b), mean, log_std, lower=None if lower is None else factor)

    def run(x, *leaves):
        flow = density(*leaves)
        return flow.log_prob(x), flow.transform(x)

    lead = np.broadcast_shapes(flows, mean, log_std, lower or (), points)
    own = [2, 2, 1, 1, 1, 2]
    rows = [
        np.broadcast_to(leaf, (*lead, *leaf.shape[leaf.ndim - axes :])).reshape(-1, *leaf.shape[leaf.ndim - axes :])
        for leaf, axes in zip((x, *leaves), (1, *own), strict=True)
    ]
    expected = jax.jit(jax.vmap(run))(*rows)
    found = run(x, *leaves)  # eagerly, as each operation may raise where ranks differ
    assert found[0].shape == lead
    assert [leaf.shape for leaf in found[1]] == [(*lead, 3), lead, lead]
    expected = jax.tree.map(lambda leaf: np.reshape(leaf, (*lead, *leaf.shape[1:])), expected)
    assert_trees_close(found, expected, tolerance=1e-13)
    drawn, log_prob = density(*leaves).sample_and_log_prob(jax.random.key(0), 2)
    batch = np.broadcast_shapes(flows, mean, log_std, lower or ())
    assert (drawn.shape, log_prob.shape) == ((2, *batch, 3), (2, *batch))
    assert_trees_close(density(*leaves).log_prob(drawn), log_prob, tolerance=1e-12)


@pytest.mark.parametrize("flows", [(), (5,)], ids=str)
def test_the_first_layers_are_the_flow_of_these_layers(flows, x64):
    flow = random_flow(flows)
    params = Planar(flow.params.u[..., :2, :], flow.params.w[..., :2, :], flow.params.b[..., :2])
    expected = PlanarFlow(params, flow.mean, flow.log_std)
    x = np.random.default_rng(0).normal(size=3)
    assert_trees_close(first_layers(flow, 2).log_prob(x), expected.log_prob(x), tolerance=1e-13)


def test_the_density_is_the_bases_over_the_jacobian_and_integrates_to_one(x64):
    flow = random_flow(dim=2)
    noise = np.random.default_rng(0).normal(size=(6, 2))
    z0 = np.asarray(flow.mean) + np.exp(np.asarray(flow.log_std)) * noise

    @jax.jit
    def run(flow, noise, z0):
        return flow.transform(noise), planar_flow(flow.params, z0), normal_log_prob(z0, flow.mean, flow.log_std)

    (zK, log_q0, log_det), mapped, log_base = run(flow, noise, z0)
    assert_trees_close((zK, log_det), mapped, tolerance=1e-14)
    assert_trees_close(log_q0, log_base, tolerance=1e-13)
    points, area = grid(-12.0, 12.0, 401)
    assert np.sum(np.exp(jax.jit(PlanarFlow.log_prob)(flow, points))) * area == pytest.approx(1.0, abs=1e-6)


def test_it_is_a_pytree_whose_nonlinearity_is_static(x64):
    flow = random_flow()
    leaves, structure = jax.tree.flatten(flow)
    assert len(leaves) == 5
    assert jax.tree.unflatten(structure, leaves).h == "tanh"
    other = PlanarFlow(flow.params, flow.mean, flow.log_std, h="softsign")
    assert jax.tree.structure(other) != structure
    x = np.ones(3)

    @jax.jit
    def run(flow, stacked):
        gradient = jax.grad(lambda flow: flow.log_prob(x))(flow)
        return gradient, jax.vmap(lambda flow: flow.log_prob(x))(stacked), flow.log_prob(x), stacked.log_prob(x)

    gradient, both, one, of_stacked = run(flow, stack([flow, jax.tree.map(lambda leaf: 2 * np.asarray(leaf), flow)]))
    assert isinstance(gradient, PlanarFlow)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(np.asarray(both)[0], one, rtol=1e-13)
    np.testing.assert_allclose(both, of_stacked, rtol=1e-13)


def test_numbers_become_arrays_of_the_parameters_dtype(dtype):
    params, _ = draw(3, 2, dtype=dtype)
    for flow in (PlanarFlow(params), PlanarFlow(params, 0, [1, 2, 3]), PlanarFlow(params, mean=0.5, log_std=-1.0)):
        assert {leaf.dtype for leaf in jax.tree.leaves(flow)} == {np.dtype(dtype)}
        drawn = jax.eval_shape(lambda flow: flow.sample(jax.random.key(0), (2,)), flow)
        assert drawn.dtype == dtype
    assert flow.mean.shape == flow.log_std.shape == (3,)
    assert "mean=" in repr(flow)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": np.zeros(2, np.float32)}, r"mean must be of shape \[\] or \[\.\.\., 3\], as params has; got \(2,\)"),
        ({"log_std": np.zeros((3, 1), np.float32)}, r"log_std must be of shape .*; got \(3, 1\)"),
        (
            {"mean": jnp.zeros(3, jnp.bfloat16)},
            r"mean and params must be of one floating dtype; got bfloat16 and float32",
        ),
        ({"mean": np.zeros((4, 3), np.float32), "log_std": np.zeros((5, 3), np.float32)}, "must broadcast; got"),
        ({"h": "relu"}, "h must be one of tanh, softsign"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given, said):
    params, _ = draw(3, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=said):
        PlanarFlow(params, **given)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (2,)], ids=str)
def test_noise_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise must be of shape \[\.\.\., 3\], as params has; got \("):
        random_flow(dtype=np.float32).transform(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw(2, 3, scale=0.5)[0])
    flow, wide = PlanarFlow(params), PlanarFlow(jax.tree.map(lambda leaf: leaf.astype(np.float32), params))
    noise = np.ones((4, 2), dtype)

    @jax.jit
    def run(flow, wide, key):
        z, log_q = flow.sample_and_log_prob(key, (5,))
        of_wide = wide.sample(key, (5,)), wide.transform(noise.astype(np.float32))[0]
        return (z, flow.transform(noise)[0]), of_wide, log_q, flow.log_prob(z), flow.log_prob(noise)

    mine, theirs, log_q, log_prob, of_half = run(flow, wide, jax.random.key(0))
    assert mine[0].dtype == log_q.dtype == of_half.dtype == np.float32
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(log_prob, log_q, atol=1e-5)


def test_a_number_is_a_shape_of_samples():
    flow, key = random_flow(dtype=np.float32), jax.random.key(0)
    for number in (5, np.int64(5)):
        np.testing.assert_array_equal(flow.sample(key, number), flow.sample(key, (5,)))
        assert flow.sample_and_log_prob(key, number)[1].shape == (5,)
    with pytest.raises(TypeError):
        flow.sample(key, 2.5)


def test_densities_with_a_number_for_a_base_may_be_stacked():
    params, _ = draw(2, 3, scale=0.5, dtype=np.float32)
    flows = [PlanarFlow(params, 0.0, log_std) for log_std in (0.0, 1.0)]  # as many as there are dimensions
    x = np.array([0.5, -1.0], np.float32)

    @jax.jit
    def run(flows, stacked, log_stds):
        made = jax.vmap(lambda log_std: PlanarFlow(params, 0.0, log_std))(log_stds)
        return [flow.log_prob(x) for flow in flows], stacked.log_prob(x), jax.vmap(lambda flow: flow.log_prob(x))(made)

    one_by_one, of_stacked, of_made = run(flows, stack(flows), np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(of_stacked, one_by_one, rtol=1e-6)
    np.testing.assert_allclose(of_made, one_by_one, rtol=1e-6)
