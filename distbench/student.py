"""Quantiles of the normal and of Student's t distribution, from the standard library alone."""

from __future__ import annotations

import math
from statistics import NormalDist

EXPANSION_DF = 10_000.0
"""Above it Student's t is its expansion in 1/df, whose first missing term is then below 1e-12."""


def normal_quantile(p: float) -> float:
    """Return the standard normal quantile.

    Args:
        p: probability, in (0, 1).

    Raises:
        ValueError: ``p`` is outside (0, 1).

    Source:
        the standard library's: Wichura, algorithm AS 241, Applied Statistics 37 (1988).
    """
    if not 0 < p < 1:
        raise ValueError(f"a probability of {p} is not in (0, 1)")
    return NormalDist().inv_cdf(p)


def t_quantile(p: float, df: float) -> float:
    """Return a quantile of Student's t.

    Newton's method on the logarithm of the tail (near the middle, the central) probability against
    log t: both are concave there, so that the iteration cannot cycle.

    Args:
        p: probability, in (0, 1).
        df: degrees of freedom, above 0, not only whole ones; ``math.inf`` is the normal.

    Raises:
        ValueError: ``p`` or ``df`` is out of range.

    Source:
        the expansion for many degrees of freedom: Abramowitz and Stegun, 26.7.5.
    """
    z = normal_quantile(p)
    if not df > 0:
        raise ValueError(f"{df} degrees of freedom are not above 0")
    if z == 0:
        return 0.0
    tail, sign, x = min(p, 1 - p), math.copysign(1.0, z), abs(z)
    if df > EXPANSION_DF:
        y = x * x
        terms = (
            x * (y + 1) / 4,
            x * (3 + y * (16 + 5 * y)) / 96,
            x * (-15 + y * (17 + y * (19 + 3 * y))) / 384,
            x * (-945 + y * (-1920 + y * (1482 + y * (776 + 79 * y)))) / 92160,
        )
        return sign * (x + sum(term / df**k for k, term in enumerate(terms, 1)))
    central = tail > 0.25
    wanted = 0.5 - tail if central else tail
    log_density = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    t = x
    for _ in range(200):
        found = _t_halves(t, df)[0 if central else 1]
        density = math.exp(log_density - (df + 1) / 2 * math.log1p(t * t / df))
        slope = t * density / found
        step = math.log(wanted / found) / (slope if central else -slope)
        t *= math.exp(step)
        if abs(step) < 1e-14:
            break
    return sign * t


def _t_halves(t: float, df: float) -> tuple[float, float]:
    """Return P(0 < T < t) and P(T > t) of Student's t, for t > 0."""
    square = t * t
    if square < 3:
        inner = _beta_fraction(0.5, df / 2, square / (df + square)) / 2
        return inner, 0.5 - inner
    outer = _beta_fraction(df / 2, 0.5, df / (df + square)) / 2
    return 0.5 - outer, outer


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function by its continued fraction.

    It converges fast for x < (a + 1) / (a + b + 2). Source: DLMF 8.17.22, by Lentz's method.
    """
    log_front = a * math.log(x) + b * math.log1p(-x)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    c, d, value = 1.0, 0.0, 1.0
    for k in range(1, 10_000):
        m, odd = divmod(k, 2)
        top = -(a + m) * (a + b + m) if odd else m * (b - m)
        term = top * x / ((a + k - 1) * (a + k))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) / value
