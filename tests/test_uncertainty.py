"""Means, their standard errors, and how many digits are shown."""

import numpy as np
import pytest

from planar_vae_jax.uncertainty import mean_and_error, with_error


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
