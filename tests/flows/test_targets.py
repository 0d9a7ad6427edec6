"""Targets against the formulas as they stand in the papers, in float64 NumPy, and against exact integrals."""

import functools
import math

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from helpers import grid

from planar_vae_jax.flows import targets
from planar_vae_jax.flows.targets import POINT_TARGETS, TARGETS, draw_points

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


@pytest.mark.parametrize("name", [*TARGETS, *POINT_TARGETS])
def test_a_batch_has_the_values_of_its_events(name):
    log_density = get_target(name).log_density
    z = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    batch, events = jax.jit(lambda z: (log_density(z), jax.vmap(jax.vmap(log_density))(z)))(z)
    assert batch.shape == (3, 4)
    np.testing.assert_allclose(batch, events, rtol=1e-5)


@pytest.mark.parametrize("name", [*TARGETS, *POINT_TARGETS])
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


# --- Points


def on_a_curve(curve, start, stop, std):
    """The density of points that are spread evenly over ``curve(angle)``, with normal noise, by adaptive quadrature."""

    def density(z):
        def at(angle):
            squares = np.sum((z - curve(angle)) ** 2) / std**2
            return np.exp(-0.5 * squares) / (2 * np.pi * std**2) / (stop - start)

        return scipy.integrate.quad(at, start, stop, limit=200)[0]

    return density


def two_moons(z):
    upper = on_a_curve(lambda t: np.array([np.cos(t), np.sin(t)]), 0, np.pi, 0.1)
    lower = on_a_curve(lambda t: np.array([1 - np.cos(t), 0.5 - np.sin(t)]), 0, np.pi, 0.1)
    return 0.5 * (upper(z) + lower(z))


def circles(z):
    """A ring with normal noise, in closed form."""
    radius, std = np.sqrt(np.sum(z**2)), 0.08
    return 0.5 * sum(
        np.exp(-0.5 * (radius - ring) ** 2 / std**2)
        * scipy.special.ive(0, radius * ring / std**2)
        / (2 * np.pi * std**2)
        for ring in (1.0, 0.5)
    )


def eight_gaussians(z):
    angles = np.pi / 8 * np.arange(1, 16, 2)
    return np.mean([scipy.stats.multivariate_normal([2 * np.cos(a), 2 * np.sin(a)], 0.0625).pdf(z) for a in angles])


@pytest.mark.parametrize("density", [two_moons, circles, eight_gaussians])
def test_the_density_behind_points_is_that_of_their_definition(density):
    points = draw_points(density.__name__, 60, seed=1)
    # The ends of a moon are those of its outermost centres, which moves a little mass.
    tolerance = 2e-2 if density is two_moons else 2e-5
    np.testing.assert_allclose(
        np.exp(evaluate(density.__name__, points)), [density(z) for z in points], rtol=tolerance, atol=1e-6
    )


@pytest.mark.parametrize("name", POINT_TARGETS)
def test_points_have_the_mass_moments_and_entropy_of_their_density(name):
    target = get_target(name)
    assert target.log_z == 0.0
    z, area = grid(-target.extent, target.extent, 301)
    log_p = np.concatenate([evaluate(name, part) for part in np.array_split(z, -(-len(z) // POINTS))]).astype(
        np.float64
    )
    mass = np.exp(log_p) * area
    assert np.sum(mass) == pytest.approx(1.0, abs=1e-3)
    points = draw_points(name, POINTS, seed=0)
    error = 5 / math.sqrt(POINTS)
    np.testing.assert_allclose(np.mean(points, 0), mass @ z, atol=error * np.max(np.std(points, 0)))
    second = np.einsum("n,ni,nj->ij", mass, z, z)
    np.testing.assert_allclose(points.T @ points / POINTS, second, atol=error * np.max(np.abs(second)))
    drawn = evaluate(name, points)
    assert np.mean(drawn) == pytest.approx(mass @ log_p, abs=float(error * np.std(drawn)))


def test_points_follow_from_their_seed():
    points = draw_points("circles", 5, seed=7)
    assert (points.shape, points.dtype) == ((5, 2), np.float64)
    np.testing.assert_array_equal(points, draw_points("circles", 5, seed=7))
    assert not np.any(points == draw_points("circles", 5, seed=8))
    with pytest.raises(ValueError, match=r"name must be one of two_moons, circles, eight_gaussians; got 'U1'"):
        draw_points("U1", 5, seed=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be a positive number"):
        targets.get_target("mixture", scale=scale)
