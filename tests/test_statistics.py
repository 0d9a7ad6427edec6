"""Means, their standard errors, and how many digits are shown."""

import math

import numpy as np
import pytest

from planar_vae_jax.statistics import (
    mean_and_error,
    mean_and_interval,
    with_error,
    with_interval,
)


def test_the_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / 20)
    assert mean_and_error(np.array([3.0])) == (3.0, None)


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (99.1234, 0.2512, "99.12 ± 0.25"),
        (99.1234, 0.0996, "99.12 ± 0.10"),
        (99.1234, 1.26, "99.1 ± 1.3"),
        (1234.56, 12.6, "1235 ± 13"),
        (123456.0, 789.0, "123456 ± 789"),
        (0.00012345, 0.0000141, "0.000123 ± 0.000014"),
        (-0.04, 0.05, "-0.040 ± 0.050"),
        (3.0, 0.0, "3 ± 0"),
        (1.234567e30, 2.6e29, "1.235e+30 ± 2.6e+29"),
        (99.1234, None, "99.12"),
        (99.1234, float("nan"), "99.12"),
        (None, 0.1, "-"),
        (float("inf"), 0.1, "-"),
    ],
)
def test_a_mean_has_the_digits_that_its_error_bears(mean, error, text):
    assert with_error(mean, error) == text


@pytest.mark.parametrize(
    ("confidence", "degrees", "quantile"),
    [  # printed tables of Student's t
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 3, 3.18245),
        (0.95, 7, 2.36462),
        (0.95, 10, 2.22814),
        (0.95, 30, 2.04227),
        (0.95, 120, 1.97993),
        (0.99, 5, 4.03214),
        (0.999, 4, 8.61030),
        (0.90, 9, 1.83311),
        (0.5, 8, 0.706387),
        (0.95, 10**5, 1.95999),
    ],
)
def test_intervals_reach_as_far_as_the_tables_of_students_t_say(confidence, degrees, quantile):
    values = np.random.default_rng(0).normal(size=degrees + 1)
    mean, error = mean_and_error(values)
    _, low, high = mean_and_interval(values, confidence)
    assert (high - mean) / error == pytest.approx(quantile, rel=3e-6)
    assert (mean - low) / error == pytest.approx(quantile, rel=3e-6)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = [low < 3.0 < high for _, low, high in map(mean_and_interval, generator.normal(3.0, 2.0, (4000, 4)))]
    assert np.mean(held) == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / 4000))
    assert mean_and_interval(np.array([3.0])) == (3.0, None, None)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((-0.5212, -0.6123, -0.4301), "-0.521 [-0.612, -0.430]"),
        ((12.0, -13.4, 37.4), "12 [-13, 37]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((-0.04, -1.12, 1.04), "0.0 [-1.1, 1.0]"),
        ((-0.5212, None, None), "-0.5212"),
        ((None, None, None), "-"),
    ],
)
def test_an_interval_has_the_digits_that_it_bears(interval, text):
    assert with_interval(*interval) == text
