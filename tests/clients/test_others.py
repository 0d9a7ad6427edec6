"""BlackJAX, Flax, Equinox and TFP take densities and layers as they are (docs/clients/others.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, draw

from planar_vae_jax import PlanarDensity, PlanarFlow, inverse_planar_flow, planar_flow

pytestmark = pytest.mark.usefixtures("any_promotion")

MEAN, STD = np.array([1.0, -1.0], np.float32), np.array([0.5, 2.0], np.float32)


def target(x):
    """A normal density whose integral is e^3."""
    return 3.0 + jnp.sum(jax.scipy.stats.norm.logpdf(x, MEAN, STD))


@pytest.fixture(scope="module")
def density():
    """Near the target and wider."""
    return PlanarDensity.init(jax.random.key(0), 4, 2, loc=0.8 * MEAN, scale=1.3 * STD)


def blackjax():
    return pytest.importorskip("blackjax", reason="needs BlackJAX: pip install '.[clients]'")


def test_independent_metropolis_has_the_targets_moments(density):
    sampler = blackjax().irmh(target, lambda key: density.sample(key), lambda _, to: density.log_prob(to.position))

    def step(state, key):
        state, info = sampler.step(key, state)
        return state, (state.position, info.acceptance_rate)

    def chain(key, first):
        return jax.lax.scan(step, sampler.init(first), jax.random.split(key, 200))[1]

    keys, first = jax.random.split(jax.random.key(1), 50), density.sample(jax.random.key(2), 50)
    positions, accepted = jax.jit(jax.vmap(chain))(keys, first)
    assert accepted.mean() > 0.6
    np.testing.assert_allclose(positions[:, 50:].mean((0, 1)), MEAN, atol=0.1)
    np.testing.assert_allclose(positions[:, 50:].std((0, 1)), STD, rtol=0.1)


def test_importance_sampling_has_the_targets_integral(density):
    x, log_prob = density.sample_and_log_prob(jax.random.key(1), 4000)
    log_weights = jax.vmap(target)(x) - log_prob
    assert float(jax.nn.logsumexp(log_weights) - np.log(len(x))) == pytest.approx(3.0, abs=0.05)
    assert blackjax().pareto_khat(jax.nn.softmax(log_weights), tail="upper") < 0.7


def test_tempered_smc_moves_draws_to_the_target(density):
    library = blackjax()
    smc = library.adaptive_tempered_smc(
        density.log_prob,
        lambda x: target(x) - density.log_prob(x),
        library.hmc.build_kernel(),
        library.hmc.init,
        library.smc.extend_params({"step_size": 0.3, "inverse_mass_matrix": STD**2, "num_integration_steps": 3}),
        library.smc.resampling.systematic,
        target_ess=0.9,
        num_mcmc_steps=1,
    )
    state, step = smc.init(density.sample(jax.random.key(1), 1000)), jax.jit(smc.step)
    for key in jax.random.split(jax.random.key(2), 10):
        if state.tempering_param < 1:
            state, _ = step(key, state)
    assert state.tempering_param == 1
    np.testing.assert_allclose(state.particles.mean(0), MEAN, atol=0.2)
    np.testing.assert_allclose(state.particles.std(0), STD, rtol=0.15)


# --- A flow as a parameter: each library's gradient is JAX's


def negative(flow, x):
    return -jnp.mean(flow.log_prob(x))


@pytest.fixture(scope="module")
def flow():
    return PlanarFlow(draw(2, 3, dtype=np.float32)[0])


POINTS = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(4, 2)


def test_nnx(flow):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.flow = nnx.Param(flow)

        def __call__(self, x):
            return self.flow.log_prob(x)

    gradient = jax.jit(jax.grad(lambda model: -jnp.mean(model(POINTS))))(Model())
    expected = jax.grad(negative)(flow, POINTS)
    assert_trees_close(jax.tree.leaves(gradient), jax.tree.leaves(expected), tolerance=1e-6)


def test_linen(flow):
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("flow", lambda key: flow).log_prob(x)

    variables = Model().init(jax.random.key(0), POINTS)
    gradient = jax.grad(lambda variables: -jnp.mean(Model().apply(variables, POINTS)))(variables)
    assert_trees_close(gradient["params"]["flow"], jax.grad(negative)(flow, POINTS), tolerance=1e-6)


def test_equinox(flow):
    eqx = pytest.importorskip("equinox", reason="needs Equinox: pip install '.[clients]'")

    class Model(eqx.Module):
        flow: PlanarFlow

    gradient = eqx.filter_grad(lambda model: negative(model.flow, POINTS))(Model(flow))
    assert_trees_close(gradient.flow, jax.grad(negative)(flow, POINTS), tolerance=1e-6)


def test_tfp(flow):
    reason = "needs TFP on JAX: pip install '.[distrax]'"
    tfp = pytest.importorskip("tensorflow_probability.substrates.jax", reason=reason)

    class Bijector(tfp.bijectors.Bijector):
        def __init__(self, params):
            super().__init__(forward_min_event_ndims=1, name="planar")
            self.params = params

        def _forward(self, x):
            return planar_flow(self.params, x)[0]

        def _inverse(self, y):
            return inverse_planar_flow(self.params, y)[0]

        def _forward_log_det_jacobian(self, x):
            return planar_flow(self.params, x)[1]

    base = tfp.distributions.MultivariateNormalDiag(np.zeros(2, np.float32), np.ones(2, np.float32))
    found = tfp.distributions.TransformedDistribution(base, Bijector(flow.params))
    np.testing.assert_allclose(found.log_prob(POINTS), flow.log_prob(POINTS), atol=1e-5)
    assert found.sample(5, seed=jax.random.key(0)).shape == (5, 2)
