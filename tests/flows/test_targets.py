"""Targets against the formulas as they stand in the papers, in float64 NumPy, and against exact integrals."""

import functools
import math

import jax
import numpy as np
import pytest
from helpers import grid

from planar_vae_jax.flows import targets
from planar_vae_jax.flows.targets import TARGETS

U = ("U1", "U2", "U3", "U4")
EXTENT = 4.0  # half the side of the square in which U1 to U4 are the paper's
TAPER = 0.5  # the standard deviation with which U2 to U4 fall off beyond it


def paper_energy(name, z1, z2):
    """Table 1 of Rezende & Mohamed (2015)."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    if name == "U1":
        ring = 0.5 * ((np.sqrt(z1**2 + z2**2) - 2) / 0.4) ** 2
        return ring - np.log(np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2))
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    if name == "U3":
        return -np.log(np.exp(-0.5 * ((z2 - w1) / 0.35) ** 2) + np.exp(-0.5 * ((z2 - w1 + w2) / 0.35) ** 2))
    return -np.log(np.exp(-0.5 * ((z2 - w1) / 0.4) ** 2) + np.exp(-0.5 * ((z2 - w1 + w3) / 0.35) ** 2))


POINTS = 2000


def evaluate(name, z):
    """Log-densities at up to POINTS points, always POINTS of them at once, so that a target is compiled once."""
    values = jax.jit(get_target(name).log_density)(np.resize(np.float32(z), (POINTS, 2)))
    return np.asarray(values)[: len(z)]


@functools.cache
def gradients(name):
    """Values and gradients at some points, each by itself."""
    return jax.jit(jax.vmap(jax.value_and_grad(get_target(name).log_density)))


@functools.cache
def get_target(name):
    return targets.get_target(name)


@pytest.mark.parametrize("name", U)
def test_inside_the_square_the_density_is_the_papers(name):
    z1, z2 = np.random.default_rng(0).uniform(-EXTENT, EXTENT, (2, POINTS))
    z1, z2 = z1.astype(np.float32), z2.astype(np.float32)
    expected = paper_energy(name, z1.astype(np.float64), z2.astype(np.float64))
    # U3 and U4 in float64 lose exp(-large); the difference is worked out where they do not.
    np.testing.assert_allclose(evaluate(name, np.stack([z1, z2], axis=-1)), -expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "z", "value"),
    [
        ("U1", (2.0, 0.0), math.log1p(math.exp(-200 / 9))),  # on the ring, at a mode
        ("U1", (0.0, 2.0), math.log(2) - 50 / 9),  # on the ring, between the modes
        ("U1", (0.0, 0.0), math.log(2) - 12.5 - 50 / 9),
        ("U2", (1.0, 1.0), 0.0),  # on the crest of the wave
        ("U2", (0.0, 0.4), -0.5),  # one standard deviation off
        ("U3", (1.0, 1.0), math.log1p(math.exp(-0.5 * (3 / 0.35) ** 2))),
        ("U3", (1.0, -2.0), math.log1p(math.exp(-0.5 * (3 / 0.35) ** 2))),  # the second ridge, 3 below
        ("U4", (1.0, -0.5), math.log(math.exp(-0.5 * (1.5 / 0.4) ** 2) + 1)),
        ("mixture", (1.5, 1.5), math.log((1 + math.exp(-9)) / (4 * math.pi))),
        ("mixture", (0.0, 0.0), -2.25 - math.log(2 * math.pi)),
    ],
)
def test_values_worked_out_by_hand(name, z, value):
    assert evaluate(name, [z])[0] == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0])
def test_the_mixture_integrates_to_one(scale):
    target = targets.get_target("mixture", scale=scale)
    assert target.log_z == 0.0
    points, area = grid(-10.0, 10.0, 401)
    density = np.exp(np.asarray(jax.jit(target.log_density)(np.float32(points)), np.float64))
    assert math.log(np.sum(density) * area) == pytest.approx(0.0, abs=1e-5)


def test_log_z_of_u2_in_closed_form():
    # A normal of std 0.4 in z2 for every z1; along z1 the square, and a half normal on either side of it.
    exact = math.log(0.4 * math.sqrt(2 * math.pi) * (2 * EXTENT + TAPER * math.sqrt(2 * math.pi)))
    assert get_target("U2").log_z == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("name", U)
def test_log_z_by_another_rule(name):
    points, area = grid(-9.0, 9.0, 701)
    z1, z2 = points.T
    beyond = np.maximum(np.abs(z1) - EXTENT, 0) if name != "U1" else np.zeros_like(z1)
    with np.errstate(divide="ignore"):
        values = np.exp(-paper_energy(name, z1, z2) - 0.5 * (beyond / TAPER) ** 2)
    assert get_target(name).log_z == pytest.approx(math.log(values.sum() * area), abs=1e-4)


@pytest.mark.parametrize("name", ["U2", "U3", "U4"])
def test_the_taper_begins_smoothly_and_falls_off(name):
    points = np.array([[EXTENT - 1e-3, 0.1], [EXTENT + 1e-3, 0.1], [EXTENT, 0.0], [EXTENT + 4.0, 0.0], [0.0, 0.0]])
    (_, _, near, far, _), slope = map(np.asarray, gradients(name)(np.float32(points)))
    np.testing.assert_allclose(slope[0], slope[1], atol=0.2)  # the wave itself bends by 0.1 here
    # Four further on, the wave (of period 4) is where it was, but the step of U4 and the bump of U3 are over.
    assert far - near == pytest.approx(-0.5 * (4.0 / TAPER) ** 2, abs=0.01)


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_has_the_values_of_its_events(name):
    log_density = get_target(name).log_density
    z = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    batch, events = jax.jit(lambda z: (log_density(z), jax.vmap(jax.vmap(log_density))(z)))(z)
    assert batch.shape == (3, 4)
    np.testing.assert_allclose(batch, events, rtol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_values_and_gradients_are_finite_everywhere(name):
    points = np.array([[0.0, 0.0], [100.0, -100.0], [-1e4, 1e4], [2.0, 0.0], [EXTENT, EXTENT]], np.float32)
    value, gradient = map(np.asarray, gradients(name)(points))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


def test_wide_modes_get_a_larger_picture():
    assert get_target("mixture").extent == EXTENT
    assert targets.get_target("mixture", scale=2.0).extent == 6.5


@pytest.mark.parametrize("name", ["U5", "u1", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="target must be one of mixture, U1, U2, U3, U4"):
        get_target(name)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a positive number"):
        targets.get_target("mixture", scale=scale)
