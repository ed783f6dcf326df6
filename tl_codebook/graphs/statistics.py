"""Statistics of two codes that fire together: how strong, how improbable by chance, and how many such pairs to expect by chance."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

from tl_codebook.errors import ConfigError, DataError, nearest

__all__ = ["STATISTICS", "association", "benjamini_hochberg", "check_statistic", "hypergeometric_tail"]

Counts = Int[np.ndarray, " pair"]
Values = Float[np.ndarray, " pair"]

STATISTICS = ("npmi", "lift", "jaccard", "mi", "cond_prob")
"""What `association` can compute."""

_BLOCK = 1 << 16
_PRECISE = 1e-14


def check_statistic(name: str) -> None:
    """Raise unless there is a statistic of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STATISTICS:
        raise ConfigError(f"statistic={name!r} was asked for. {nearest(str(name), STATISTICS)}Give one of {', '.join(STATISTICS)}.")


def _checked(together: Counts, earlier: Counts, later: Counts, total: int) -> tuple[Values, Values, Values]:
    x, a, b = (np.asarray(counts).astype(np.float64) for counts in (together, earlier, later))
    if len(x) and bool((x < 0).any() or (x > np.minimum(a, b)).any() or (np.maximum(a, b) > total).any() or (a + b - x > total).any()):
        raise DataError(
            f"counts that cannot be were given: of {total} places, two codes fire together at no more than either does, and at one or "
            "the other of them at no more than all."
        )
    return x, a, b


def association(statistic: str, together: Counts, earlier: Counts, later: Counts, total: int) -> Values:
    """Return how strongly two codes go together, from the places at which both fire, the one does, the other does, and all places.

    ``npmi``: normalised pointwise mutual information, -1 (never together) through 0 (independent) to 1 (never apart). ``lift``: how many
    times more often together than independent ones, 0 or more. ``jaccard``: places with both among places with either, 0 to 1. ``mi``:
    mutual information of firing and not firing, bits, 0 to 1; great too where two codes avoid each other. ``cond_prob``: probability of
    the later code where the earlier one fires, 0 to 1. Float64.

    Args:
        statistic: One of these.
        together, earlier, later: Counts for each pair; those of single codes 1 or more.
        total: Places, >= 1.

    Raises:
        ConfigError: another statistic.
        DataError: counts that cannot be.

    Source: Bouma 2009, section 2 (npmi).

    >>> association("lift", np.array([4]), np.array([5]), np.array([8]), 20).tolist()
    [2.0]
    """
    check_statistic(statistic)
    x, a, b = _checked(together, earlier, later, total)
    if statistic == "jaccard":
        return x / (a + b - x)
    if statistic == "cond_prob":
        return x / a
    if statistic == "lift":
        return x * total / (a * b)
    if statistic == "mi":
        mi = np.zeros_like(x)
        for n, row, column in ((x, a, b), (a - x, a, total - b), (b - x, total - a, b), (total - a - b + x, total - a, total - b)):
            some = n > 0  # 0 log 0 = 0
            mi[some] += n[some] / total * np.log2(n[some] * total / (row[some] * column[some]))
        return np.maximum(mi, 0.0)
    result = np.full_like(x, -1.0)
    some, always = (x > 0) & (x < total), x == total
    result[some] = np.log(x[some] * total / (a[some] * b[some])) / -np.log(x[some] / total)
    result[always] = 1.0  # the limit: both fire everywhere, never apart
    return result


def hypergeometric_tail(together: Counts, earlier: Counts, later: Counts, total: int) -> Values:
    """Return the probability that two codes fire together as often as they do or more often, were they thrown among the places by chance.

    One-sided Fisher's exact test: P(X >= together) of a hypergeometric X. Exact but for rounding: a relative error of about 1e-16 times
    the largest log-factorial, log(total!) (1e-8 for two million places). 0 where it is below 1e-308.

    Args:
        together, earlier, later: Places at which both fire, the one does and the other does, for each pair.
        total: Places, >= 1.

    Raises:
        DataError: counts that cannot be.

    >>> hypergeometric_tail(np.array([2]), np.array([2]), np.array([2]), 4)  # one of the 6 ways to choose 2 places of 4
    array([0.1666...])
    """
    x, a, b = _checked(together, earlier, later, total)
    result = np.empty_like(x)
    order = np.argsort(a * b, kind="stable")  # like with like: a block takes as many steps as its widest distribution
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        result[block] = _tail(x[block], a[block], b[block], float(total))
    return np.clip(result, 0.0, 1.0)


def _log_choose(n: Values, k: Values) -> Values:
    def factorial(v: Values) -> Values:
        return torch.lgamma(torch.from_numpy(v + 1.0)).numpy()

    return factorial(n) - factorial(k) - factorial(n - k)


def _tail(x: Values, a: Values, b: Values, total: float) -> Values:
    """Sum away from the mode, where each term is smaller than the one before it: above x upwards, else one less the sum below x."""
    above = x * total > a * b
    first = np.where(above, x, x - 1.0)
    some = first >= np.maximum(0.0, a + b - total)  # below x there may be nothing
    sums = np.zeros_like(x)
    k, a, b, up = first[some], a[some], b[some], above[some]
    everything = np.full_like(a, total)
    log_first = _log_choose(a, k) + _log_choose(total - a, b - k) - _log_choose(everything, b)
    with np.errstate(under="ignore"):
        sums[some] = np.exp(log_first) * _series(k, a, b, total - a - b, up)
    return np.where(above, sums, 1.0 - sums)


def _series(k: Values, a: Values, b: Values, rest: Values, up: np.ndarray) -> Values:
    """Return 1 + r1 + r1 r2 + ..., where r are the ratios of a term and the one before it."""
    result, alive = np.ones_like(k), np.arange(len(k))
    step = np.where(up, 1.0, -1.0)
    term, total = np.ones_like(k), np.ones_like(k)
    with np.errstate(all="ignore"):  # the ratio that is not taken may be none
        while len(alive):
            for _ in range(8):  # sorting out what is done costs as much as some steps
                upwards = (a - k) * (b - k) / ((k + 1.0) * (rest + k + 1.0))
                ratio = np.where(up, upwards, k * (rest + k) / ((a - k + 1.0) * (b - k + 1.0)))
                ratio = np.maximum(ratio, 0.0)
                term = term * ratio
                total = total + term
                k = k + step
            done = (term <= _PRECISE * total * (1.0 - ratio)) | (term == 0.0)
            result[alive[done]] = total[done]
            left = ~done
            alive, k, a, b, rest, up, step = (v[left] for v in (alive, k, a, b, rest, up, step))
            term, total = term[left], total[left]
    return result


def benjamini_hochberg(p_values: Values, n_tests: int | None = None) -> Values:
    """Return for each p-value the smallest false discovery rate at which it counts as found.

    Args:
        p_values: Of the tests that were made, 0 to 1.
        n_tests: How many tests there are where only the smaller p-values were computed; the others count as 1.

    Raises:
        DataError: p-values outside 0 to 1, or fewer tests than p-values.

    Source: Benjamini and Hochberg 1995, section 3.1.

    >>> benjamini_hochberg(np.array([0.04, 0.01, 0.5])).tolist()
    [0.06, 0.03, 0.5]
    """
    p = np.asarray(p_values, dtype=np.float64)
    n = len(p) if n_tests is None else n_tests
    if n < len(p) or not bool(((p >= 0) & (p <= 1)).all()):
        raise DataError(f"{len(p)} p-values were given for {n} tests. Give values from 0 to 1, and at least as many tests.")
    order = np.argsort(p, kind="stable")
    ranked = p[order] * n / np.arange(1, len(p) + 1)
    result = np.empty_like(p)
    result[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return result
