"""``PlanarDensity``: both directions of a density on data, against the Jacobian, integrals and SciPy's normal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import assert_trees_close, draw, grid, stack

from planar_vae_jax import Planar, PlanarDensity, inverse_planar_flow, planar_flow
from planar_vae_jax.flows import first_layers

both_directions = pytest.mark.parametrize("inverted", [False, True], ids=["sampling", "density"])


def random_density(*, inverted, flows=(), affine=(), lower=None, dim=3, flow_length=4, h="tanh"):
    rng = np.random.default_rng(1)
    shapes = (*flows, flow_length, dim), (*flows, flow_length, dim), (*flows, flow_length)
    params = Planar(*(0.7 * rng.normal(size=shape) for shape in shapes))
    loc, log_scale = (0.5 * rng.normal(size=(*affine, dim)) for _ in range(2))
    factor = None if lower is None else rng.normal(size=(*lower, dim, dim))
    return PlanarDensity(params, loc, log_scale, factor, h=h, inverted=inverted)


@both_directions
@pytest.mark.parametrize(("flows", "affine", "lower"), [((), (), None), ((), (5,), ()), ((2, 1), (5,), (5,))], ids=str)
def test_the_map_its_inverse_and_both_log_determinants_belong_together(inverted, flows, affine, lower, x64):
    density = random_density(inverted=inverted, flows=flows, affine=affine, lower=lower)
    batch = np.broadcast_shapes(flows, affine, lower or ())
    assert density.batch_shape == batch

    @jax.jit
    def run(density, eps, key):
        x, log_det = density.transform(eps)
        drawn, log_prob = density.sample_and_log_prob(key, 7)
        jacobian = jax.jacfwd(lambda eps: density.transform(eps)[0].reshape(-1, 3).sum(0))(eps)
        return (
            x,
            log_det,
            density.inverse(x),
            jacobian,
            drawn,
            log_prob,
            density.log_prob(drawn),
            density.sample(key, 7),
        )

    eps = np.random.default_rng(2).normal(size=3)
    x, log_det, (back, minus), jacobian, drawn, log_prob, by_inverse, again = run(density, eps, jax.random.key(0))
    assert (x.shape, log_det.shape, drawn.shape, log_prob.shape) == ((*batch, 3), batch, (7, *batch, 3), (7, *batch))
    assert_trees_close((back, minus), (np.broadcast_to(eps, x.shape), -log_det), tolerance=1e-11)
    assert_trees_close((by_inverse, again), (log_prob, drawn), tolerance=1e-11)
    if not batch:
        assert float(log_det) == pytest.approx(np.linalg.slogdet(jacobian)[1], rel=1e-12)


@both_directions
@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_a_density_integrates_to_one(inverted, h, x64):
    density = random_density(inverted=inverted, lower=(), dim=2, h=h)
    points, area = grid(-20.0, 20.0, 601)
    total = np.sum(np.exp(jax.jit(PlanarDensity.log_prob)(density, points))) * area
    assert total == pytest.approx(1.0, abs=1e-5)


def test_the_layers_pass_forwards_where_no_inverse_is_wanted(x64):
    """Noise to data in the sampling direction, data to noise in the other."""
    sampling, density = (random_density(inverted=inverted) for inverted in (False, True))
    eps = x = np.random.default_rng(0).normal(size=(6, 3))
    loc, scale = np.asarray(density.loc), np.exp(np.asarray(density.log_scale))
    assert_trees_close(
        sampling.transform(eps)[0], loc + scale * np.asarray(planar_flow(density.params, eps)[0]), tolerance=1e-13
    )
    assert_trees_close(density.inverse(x)[0], planar_flow(density.params, (x - loc) / scale)[0], tolerance=1e-13)
    assert_trees_close(
        density.transform(eps)[0],
        loc + scale * np.asarray(inverse_planar_flow(density.params, eps)[0]),
        tolerance=1e-13,
    )


@both_directions
def test_without_layers_it_is_a_normal(inverted, x64):
    density = random_density(inverted=inverted, lower=(), flow_length=0)
    factor = np.diag(np.exp(density.log_scale)) + np.tril(density.lower, -1)
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = scipy.stats.multivariate_normal(density.loc, factor @ factor.T).logpdf(x)
    np.testing.assert_allclose(density.log_prob(x), expected, rtol=1e-12)


@both_directions
def test_the_first_layers_are_those_that_noise_passes_first(inverted, x64):
    density = random_density(inverted=inverted)
    kept = slice(3, 4) if inverted else slice(0, 1)
    expected = PlanarDensity(
        Planar(*(leaf[kept] for leaf in density.params)), density.loc, density.log_scale, inverted=inverted
    )
    noise = np.random.default_rng(0).normal(size=(6, 3))
    assert_trees_close(first_layers(density, 1).transform(noise), expected.transform(noise), tolerance=1e-13)


@both_directions
def test_first_and_second_derivatives_are_those_of_differences(inverted, x64):
    density = random_density(inverted=inverted, lower=(), dim=2, flow_length=2)
    x = np.array([0.4, -0.7])
    leaves, structure = jax.tree.flatten(density)
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves] + [x])

    @jax.jit
    def log_prob(flat):
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(flat, ends)
        rebuilt = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=False)]
        return jax.tree.unflatten(structure, rebuilt).log_prob(parts[-1])

    gradient, hessian = jax.jit(jax.grad(log_prob)), jax.jit(jax.hessian(log_prob))(flat)
    steps = 1e-5 * np.eye(flat.size)
    by_differences = [(log_prob(flat + step) - log_prob(flat - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(gradient(flat), by_differences, atol=1e-7)
    by_differences = [(gradient(flat + step) - gradient(flat - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(hessian, by_differences, atol=1e-6)


def test_it_is_a_pytree_whose_direction_and_nonlinearity_are_static(x64):
    density = random_density(inverted=True)
    leaves, structure = jax.tree.flatten(density)
    assert len(leaves) == 5
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert (rebuilt.h, rebuilt.inverted) == ("tanh", True)
    assert jax.tree.structure(random_density(inverted=False)) != structure
    assert jax.tree.structure(random_density(inverted=True, h="softsign")) != structure
    x, stacked = np.ones(3), stack([density, jax.tree.map(lambda leaf: 2 * np.asarray(leaf), density)])
    of_stacked, both = jax.jit(lambda d: (d.log_prob(x), jax.vmap(lambda one: one.log_prob(x))(d)))(stacked)
    np.testing.assert_allclose(of_stacked, both, rtol=1e-13)


@both_directions
def test_it_begins_near_the_normal_that_is_asked_for(inverted, dtype):
    loc, scale = np.array([1.0, -2.0], dtype), np.array([0.5, 3.0], dtype)
    density = PlanarDensity.init(jax.random.key(0), 3, 2, loc=loc, scale=scale, inverted=inverted)
    assert {leaf.dtype for leaf in jax.tree.leaves(density)} == {np.dtype(dtype)}
    assert (density.inverted, density.dim, density.params.b.shape) == (inverted, 2, (3,))
    drawn = np.asarray(jax.jit(lambda key: density.sample(key, 4000))(jax.random.key(1)))
    np.testing.assert_allclose((drawn.mean(0) - loc) / scale, np.zeros(2), atol=0.4)
    np.testing.assert_allclose(drawn.std(0) / scale, np.ones(2), atol=0.3)
    made = jax.jit(lambda key, scale: PlanarDensity.init(key, 3, 2, loc=loc, scale=scale))(jax.random.key(0), scale)
    np.testing.assert_array_equal(made.params.u, density.params.u)


@pytest.mark.parametrize("scale", [0.0, [1.0, -1.0], float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be positive; got"):
        PlanarDensity.init(jax.random.key(0), 3, 2, scale=np.asarray(scale, np.float32))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loc": np.zeros(2, np.float32)}, r"loc must be of shape \[\] or \[\.\.\., 3\], as params has; got \(2,\)"),
        ({"log_scale": np.zeros((3, 1), np.float32)}, r"log_scale must be of shape .*; got \(3, 1\)"),
        ({"lower": np.zeros((3, 1), np.float32)}, r"lower must be of shape .*; got \(3, 1\)"),
        (
            {"loc": np.zeros((4, 3), np.float32), "log_scale": np.zeros((5, 3), np.float32)},
            "the leading axes of params, loc and log_scale must broadcast; got",
        ),
        ({"h": "relu"}, "h must be one of tanh, softsign"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given, said):
    params, _ = draw(3, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=said):
        PlanarDensity(params, **given)


@pytest.mark.parametrize("method", ["transform", "inverse", "log_prob"])
def test_events_of_another_size_or_dtype_are_refused(method):
    density = PlanarDensity(draw(3, 2, dtype=np.float32)[0])
    for wrong in (np.zeros((), np.float32), np.zeros((4, 2), np.float32)):
        with pytest.raises(ValueError, match=r"(eps|x) must be of shape \[\.\.\., 3\], as params has; got \("):
            getattr(density, method)(wrong)
    with pytest.raises(ValueError, match=r"(eps|x) and params must be of one floating dtype; got int32 and float32"):
        getattr(density, method)(np.zeros(3, np.int32))


@both_directions
def test_half_precision_is_computed_in_float32(inverted):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(2, 3, scale=0.5)[0])
    wide = PlanarDensity(jax.tree.map(lambda leaf: leaf.astype(np.float32), params), inverted=inverted)
    density, x = PlanarDensity(params, inverted=inverted), np.ones((4, 2), jnp.bfloat16)
    (drawn, log_prob), of_wide = density.sample_and_log_prob(jax.random.key(0), 5), wide.sample(jax.random.key(0), 5)
    assert drawn.dtype == log_prob.dtype == density.log_prob(x).dtype == np.float32
    np.testing.assert_array_equal(drawn, of_wide)
    np.testing.assert_array_equal(density.log_prob(x), wide.log_prob(x.astype(np.float32)))
