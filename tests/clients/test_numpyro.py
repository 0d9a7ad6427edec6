"""A transform and a guide, inside NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw, grid, stack

pytest.importorskip("numpyro", reason="needs NumPyro: pip install '.[numpyro]'")

import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.initialization import init_to_value
from numpyro.infer.reparam import NeuTraReparam

from planar_vae_jax import PlanarFlow
from planar_vae_jax.clients.numpyro import AutoPlanar, PlanarTransform

pytestmark = pytest.mark.usefixtures("any_promotion")


def normal(*shape):
    return dist.Normal(jnp.zeros(shape), 1.0).to_event(1)


# --- The transform


@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_the_density_of_a_transformed_normal_integrates_to_one(h, x64):
    params, _ = draw(2, 4)
    density = dist.TransformedDistribution(normal(2), PlanarTransform(params, h))
    points, area = grid(-12.0, 12.0, 481)
    assert float(jnp.sum(jnp.exp(jax.jit(density.log_prob)(points))) * area) == pytest.approx(1.0, abs=1e-4)


def test_leading_axes_of_the_layers_are_a_batch_of_flows(x64):
    flows = [draw(3, 4, seed=seed)[0] for seed in range(5)]
    batch = dist.TransformedDistribution(normal(3), PlanarTransform(stack(flows)))
    assert (batch.batch_shape, batch.event_shape) == ((5,), (3,))
    assert batch.expand((2, 5)).batch_shape == (2, 5)
    x, intermediates = batch.sample_with_intermediates(jax.random.key(0), (7,))
    log_prob = batch.log_prob(x)
    assert (x.shape, log_prob.shape) == ((7, 5, 3), (7, 5))
    np.testing.assert_allclose(batch.log_prob(x, intermediates), log_prob, rtol=0, atol=1e-12)
    for i, params in enumerate(flows):
        expected = PlanarFlow(params).log_prob(x[:, i])
        np.testing.assert_allclose(log_prob[:, i], expected, rtol=0, atol=1e-12)


def test_the_inverse_and_both_log_determinants_fit(x64):
    params, x = draw(3, 4)
    transform = PlanarTransform(params)
    y = transform(x)
    np.testing.assert_allclose(transform.inv(y), x, rtol=0, atol=1e-13)
    _, expected = np.linalg.slogdet(jax.jacobian(transform)(x))
    np.testing.assert_allclose(transform.log_abs_det_jacobian(x, y), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(transform.inv.log_abs_det_jacobian(y, x), -expected, rtol=0, atol=1e-12)


def test_jit_vmap_and_grad_take_the_transform_itself(x64):
    flows = [draw(2, 3, seed=seed)[0] for seed in range(4)]
    x = np.ones(2)
    each = np.stack([PlanarTransform(params, "softsign")(x) for params in flows])
    transform = PlanarTransform(stack(flows), "softsign")
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda t: t(x)))(transform), each, rtol=0, atol=1e-13)
    gradient = jax.grad(lambda t: jnp.sum(t(x)))(transform)
    assert isinstance(gradient, PlanarTransform)
    assert gradient.params.u.shape == (4, 3, 2)


# --- The guide

NOISE, DATA = 0.5, np.array([1.0, -2.0, 0.3], np.float32)


def conjugate(data=DATA):
    """Three independent normals, each seen once: the posterior and the evidence are known."""
    with numpyro.plate("n", 3):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("data", dist.Normal(x, NOISE), obs=data)


POSTERIOR_MEAN, POSTERIOR_STD = DATA / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)
EVIDENCE = -0.5 * np.sum(DATA**2 / (1 + NOISE**2) + np.log(2 * np.pi * (1 + NOISE**2)))


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        guide = AutoPlanar(conjugate, flow_length=4)
        optimizer = numpyro.optim.optax_to_numpyro(optax.adam(optax.cosine_decay_schedule(0.03, 600)))
        svi = SVI(conjugate, guide, optimizer, Trace_ELBO(num_particles=8))
        return guide, svi.run(jax.random.key(0), 600, progress_bar=False).params


def test_the_guide_reaches_a_known_evidence(trained):
    guide, params = trained
    loss = Trace_ELBO(num_particles=2000).loss(jax.random.key(1), params, conjugate, guide)
    assert float(loss) == pytest.approx(-EVIDENCE, abs=0.02)


def test_its_density_is_numpyros_posterior_and_has_the_known_moments(trained):
    guide, params = trained
    density = guide.density(params)
    x, log_prob = density.sample_and_log_prob(jax.random.key(2), 4000)
    np.testing.assert_allclose(x.mean(0), POSTERIOR_MEAN, atol=0.04)
    np.testing.assert_allclose(x.std(0), POSTERIOR_STD, atol=0.04)
    posterior = guide.get_posterior(params)
    np.testing.assert_allclose(posterior.log_prob(x[:20]), log_prob[:20], atol=1e-4)
    np.testing.assert_allclose(guide.get_transform(params)(jnp.ones(3)), density.transform(jnp.ones(3))[0], rtol=1e-5)


def test_samples_of_the_posterior_and_predictions(trained):
    guide, params = trained
    samples = guide.sample_posterior(jax.random.key(3), params, sample_shape=(2, 1000))["x"]
    assert samples.shape == (2, 1000, 3)
    np.testing.assert_allclose(samples.mean((0, 1)), POSTERIOR_MEAN, atol=0.05)
    predictive = Predictive(conjugate, guide=guide, params=params, num_samples=2000)
    seen = predictive(jax.random.key(4), None)["data"]
    np.testing.assert_allclose(seen.std(0), np.hypot(POSTERIOR_STD, NOISE), atol=0.05)


def test_nuts_in_the_guides_noise_has_the_known_posterior(trained):
    guide, params = trained
    neutra = NeuTraReparam(guide, params)
    mcmc = MCMC(NUTS(neutra.reparam(conjugate)), num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(5))
    x = neutra.transform_sample(mcmc.get_samples()["auto_shared_latent"])["x"]
    np.testing.assert_allclose(x.mean(0), POSTERIOR_MEAN, atol=0.1)
    np.testing.assert_allclose(x.std(0), POSTERIOR_STD, atol=0.1)


def test_without_layers_it_is_numpyros_diagonal_normal():
    """Also its start: around the model's initial values, in the unconstrained space of a positive variable."""

    def model():
        numpyro.sample("scale", dist.HalfNormal(2.0))

    start = {"init_loc_fn": init_to_value(values={"scale": 3.0}), "init_scale": 0.2}
    losses = []
    for guide in (AutoPlanar(model, 0, prefix="own", **start), AutoDiagonalNormal(model, **start)):
        svi = SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(num_particles=200))
        losses.append(svi.evaluate(svi.init(jax.random.key(0))))
    np.testing.assert_allclose(*losses, rtol=0.02)
    svi = SVI(model, AutoPlanar(model, 2, **start), numpyro.optim.Adam(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    assert set(params) == {"auto_layers", "auto_loc", "auto_log_scale"}
    np.testing.assert_allclose(jnp.exp(svi.guide.density(params).loc), 3.0, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(params["auto_log_scale"]), 0.2, rtol=1e-6)


def test_a_guide_in_double_precision(x64):
    guide = AutoPlanar(conjugate, flow_length=2, init_loc_fn=init_to_value(values={"x": np.ones(3, np.float32)}))
    svi = SVI(conjugate, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    state, _ = jax.eval_shape(svi.update, svi.init(jax.random.key(0)))
    params = jax.eval_shape(svi.get_params, state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow_length": -1}, "flow_length must be a whole number >= 0; got -1"),
        ({"flow_length": 2.0}, "flow_length must be a whole number >= 0; got 2.0"),
        ({"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoPlanar(conjugate, **arguments)


def test_an_unknown_nonlinearity_is_refused():
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign .*; got 'relu'"):
        PlanarTransform(draw(2, 3)[0], "relu")
