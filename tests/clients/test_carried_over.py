"""Layers of other libraries are the same map here, to 1e-12."""

import numpy as np
import pytest

from planar_vae_jax import planar_flow
from planar_vae_jax.flows import planar_from_constrained

pytestmark = pytest.mark.usefixtures("x64")


def u_hat(u, w):
    """Rezende & Mohamed (2015, appendix A.1): the constraint of normflows, Pyro and sylvester-flows."""
    p = np.sum(u * w, -1, keepdims=True)
    return u + (np.logaddexp(0.0, p) - 1.0 - p) * w / np.sum(w * w, -1, keepdims=True)


def drawn(*lead, layers=5, dim=3):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=shape) for shape in ((*lead, layers, dim), (*lead, layers, dim), (*lead, layers), (20, dim))
    )


def assert_same(params, z, expected, log_det):
    found = planar_flow(params, z)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], log_det, rtol=0, atol=1e-12)


def test_layers_of_sylvester_flows():
    """Its package is not on the index: its layers, amortised, are written out here after van den Berg et al. (2018)."""
    u, w, b, z = drawn(20)
    y, log_det = z, 0.0
    for k in range(5):
        hat, a = u_hat(u[:, k], w[:, k]), np.sum(w[:, k] * y, -1) + b[:, k]
        y = y + hat * np.tanh(a)[:, None]
        log_det = log_det + np.log(np.abs(1.0 + (1.0 - np.tanh(a) ** 2) * np.sum(hat * w[:, k], -1)))
    assert_same(planar_from_constrained(u_hat(u, w), w, b), z, y, log_det)


@pytest.mark.slow
def test_layers_of_normflows():
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[bench]'")
    normflows = pytest.importorskip("normflows", reason="needs normflows: pip install '.[bench]'")
    u, w, b, z = drawn()
    y, log_det = torch.tensor(z), 0.0
    for k in range(5):
        layer = normflows.flows.Planar((3,), u=torch.tensor(u[k : k + 1]), w=torch.tensor(w[k : k + 1]))
        layer.b.data = torch.tensor(b[k : k + 1])
        y, step = layer(y)
        log_det = log_det + step.detach().numpy()
    assert_same(planar_from_constrained(u_hat(u, w), w, b), z, y.detach().numpy(), log_det)


@pytest.mark.slow
def test_layers_of_pyro():
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install '.[bench]'")
    transforms = pytest.importorskip("pyro.distributions.transforms", reason="needs Pyro: pip install '.[bench]'")
    u, w, b, z = drawn()
    y, log_det = torch.tensor(z), 0.0
    for k in range(5):
        layer = transforms.Planar(3)
        layer.u.data, layer.w.data, layer.bias.data = (torch.tensor(one) for one in (u[k], w[k], b[k : k + 1]))
        x, y = y, layer(y)
        log_det = log_det + layer.log_abs_det_jacobian(x, y).detach().numpy()
    assert_same(planar_from_constrained(u_hat(u, w), w, b), z, y.detach().numpy(), log_det)
