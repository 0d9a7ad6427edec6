"""The flow's equations in exact arithmetic: the truth that the numerics are tested against.

The papers' formulas as they stand, in 250 decimal digits. Decimal and not numpy's longdouble, which is a plain double
on some machines.
"""

import decimal
import functools
from decimal import Decimal

import numpy as np

DIGITS = 250


def exactly(function):
    """Runs ``function`` with DIGITS digits and exponents that neither under- nor overflow."""

    def run(*args, **kwargs):
        with decimal.localcontext(decimal.Context(prec=DIGITS, Emin=-(10**9), Emax=10**9)):
            return function(*args, **kwargs)

    return run


def to_exact(values):
    """Any array of floats as an object array of the same numbers."""
    values = np.asarray(values)
    exact = np.empty(values.shape, object)
    exact.reshape(-1)[:] = [Decimal(float(value)) for value in values.reshape(-1)]
    return exact


def from_exact(values):
    """Rounded to float64."""
    return np.asarray(values, object).astype(np.float64)


# An exponential of so many digits takes a quarter of a millisecond: that of one number is not computed again.


@functools.lru_cache(2**12)
@exactly
def exact_tanh(a):
    e = (-2 * abs(a)).exp()
    return ((1 - e) / (1 + e)).copy_sign(a)


def exact_softsign(a):
    return a / (1 + abs(a))


# name -> (h, h')
EXACT_NONLINEARITIES = {
    "tanh": (exact_tanh, lambda a: 1 - exact_tanh(a) ** 2),
    "softsign": (exact_softsign, lambda a: 1 / (1 + abs(a)) ** 2),
}


E_MINUS_1 = exactly(lambda: Decimal(1).exp() - 1)()


@functools.lru_cache(2**12)
@exactly
def exact_m(p):
    """``softplus(p + log(e - 1))``."""
    return (1 + p.exp() * E_MINUS_1).ln()


def exact_flow(u, w, b, z, h):
    """K layers (Rezende & Mohamed 2015, eq. 10 and A.1, with the shift), arrays of Decimal in and out."""
    value, slope = EXACT_NONLINEARITIES[h]
    det = Decimal(1)
    for u_k, w_k, b_k in zip(u, w, b, strict=True):
        p, norm2 = np.dot(w_k, u_k), np.dot(w_k, w_k)
        u_hat = u_k + (exact_m(p) - 1 - p) * w_k / norm2 if norm2 else u_k
        a = np.dot(w_k, z) + b_k
        z = z + u_hat * value(a)
        det *= 1 + slope(a) * np.dot(w_k, u_hat)
    return z, abs(det).ln()
