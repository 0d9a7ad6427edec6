"""A bijector inside Distrax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draw, stack

pytest.importorskip("distrax", reason="needs Distrax: pip install '.[distrax]'")

import distrax

from planar_vae_jax import PlanarFlow
from planar_vae_jax.clients.distrax import PlanarBijector

pytestmark = pytest.mark.usefixtures("any_promotion")


def normal(dim):
    return distrax.MultivariateNormalDiag(jnp.zeros(dim), jnp.ones(dim))


@pytest.mark.parametrize("h", ["tanh", "softsign"])
def test_a_transformed_normal_is_the_flows_density(h, x64):
    params, _ = draw(3, 4)
    density = distrax.Transformed(normal(3), PlanarBijector(params, h))
    x, log_prob = density.sample_and_log_prob(seed=jax.random.key(0), sample_shape=(7,))
    assert (x.shape, log_prob.shape) == ((7, 3), (7,))
    expected = PlanarFlow(params, h=h).log_prob(x)
    np.testing.assert_allclose(log_prob, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(density.log_prob(x), expected, rtol=0, atol=1e-12)


def test_inverse_and_chain_take_it(x64):
    (first, x), (second, _) = (draw(3, 4, seed=seed) for seed in range(2))
    bijector = PlanarBijector(first)
    y, log_det = bijector.forward_and_log_det(x)
    assert float(log_det) == pytest.approx(np.linalg.slogdet(jax.jacobian(bijector.forward)(x))[1], abs=1e-12)
    back, inverse = distrax.Inverse(bijector).forward_and_log_det(y)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-13)
    assert float(inverse) == pytest.approx(-float(log_det), abs=1e-12)
    shift = distrax.Block(distrax.ScalarAffine(1.0, 2.0), 1)
    chain = distrax.Chain([shift, PlanarBijector(second), distrax.Inverse(bijector)])  # the last one first
    z, log_det = chain.forward_and_log_det(x)
    np.testing.assert_allclose(chain.inverse(z), x, rtol=0, atol=1e-12)
    assert float(log_det) == pytest.approx(np.linalg.slogdet(jax.jacobian(chain.forward)(x))[1], abs=1e-12)


def test_leading_axes_of_the_layers_are_a_batch_of_flows(x64):
    flows = [draw(3, 4, seed=seed)[0] for seed in range(5)]
    bijector = PlanarBijector(stack(flows))
    density = distrax.Transformed(distrax.MultivariateNormalDiag(jnp.zeros((5, 3)), jnp.ones((5, 3))), bijector)
    assert (density.batch_shape, density.event_shape) == ((5,), (3,))
    x = density.sample(seed=jax.random.key(0), sample_shape=(7,))
    expected = np.stack([PlanarFlow(params).log_prob(x[:, i]) for i, params in enumerate(flows)], 1)
    np.testing.assert_allclose(density.log_prob(x), expected, rtol=0, atol=1e-12)


def test_jit_vmap_and_grad_take_the_bijector_itself(x64):
    flows = [draw(2, 3, seed=seed)[0] for seed in range(4)]
    x = np.ones(2)
    each = np.stack([PlanarBijector(params, "softsign").forward(x) for params in flows])
    bijector = PlanarBijector(stack(flows), "softsign")
    found = jax.jit(jax.vmap(lambda bijector: bijector.forward(x)))(bijector)
    np.testing.assert_allclose(found, each, rtol=0, atol=1e-13)
    gradient = jax.grad(lambda bijector: jnp.sum(bijector.forward(x)))(bijector)
    assert gradient.params.u.shape == (4, 3, 2)


def test_an_unknown_nonlinearity_is_refused():
    with pytest.raises(ValueError, match=r"h must be one of tanh, softsign .*; got 'relu'"):
        PlanarBijector(draw(2, 3)[0], "relu")
