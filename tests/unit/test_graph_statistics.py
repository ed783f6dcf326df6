"""Association, exact tails and false discovery rates, against brute force and numbers worked out by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tl_codebook.errors import ConfigError, DataError
from tl_codebook.graphs.statistics import STATISTICS, association, benjamini_hochberg, hypergeometric_tail


def exact_tail(x, a, b, n):
    """P(X >= x), in whole numbers."""
    ways = sum(math.comb(a, k) * math.comb(n - a, b - k) for k in range(x, min(a, b) + 1))
    return float(Fraction(ways, math.comb(n, b)))


def tables(n):
    return [(x, a, b) for a in range(1, n + 1) for b in range(1, n + 1) for x in range(max(0, a + b - n), min(a, b) + 1)]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_the_tail_of_every_small_table(n):
    x, a, b = map(np.array, zip(*tables(n), strict=True))
    expected = [exact_tail(*table, n) for table in tables(n)]
    np.testing.assert_allclose(hypergeometric_tail(x, a, b, n), expected, rtol=1e-11)


def test_the_tail_of_large_tables():
    cases = [
        (60, 500, 800, 9000),
        (30, 500, 800, 9000),
        (44, 500, 800, 9000),
        (45, 500, 800, 9000),
        (900, 1000, 1000, 2000),
        (0, 3, 4, 9000),
    ]
    cases += [(0, 3, 4, 9000), (3, 3, 3, 9000), (4000, 6000, 6000, 9000), (4100, 6000, 6000, 9000), (3000, 6000, 6000, 9000)]
    for x, a, b, n in cases:
        found = hypergeometric_tail(np.array([x]), np.array([a]), np.array([b]), n)[0]
        assert found == pytest.approx(exact_tail(x, a, b, n), rel=1e-9), (x, a, b, n)


def test_the_tail_keeps_its_order_among_many_tables_and_underflows_to_zero():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 2000, 3000), rng.integers(1, 2000, 3000)
    x = np.minimum(rng.integers(0, 400, 3000), np.minimum(a, b))
    together = hypergeometric_tail(x, a, b, 10_000)
    for i in range(0, 3000, 97):
        assert together[i] == pytest.approx(exact_tail(int(x[i]), int(a[i]), int(b[i]), 10_000), rel=1e-8, abs=1e-300)
    assert hypergeometric_tail(np.array([5000]), np.array([5000]), np.array([5000]), 2_000_000).tolist() == [0.0]
    assert hypergeometric_tail(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), 5).tolist() == []


BY_HAND = {  # of 20 places 5 have the one, 8 the other, 4 both
    "lift": 4 * 20 / (5 * 8),
    "jaccard": 4 / 9,
    "cond_prob": 4 / 5,
    "npmi": math.log(2) / math.log(5),
    "mi": (0.2 * math.log(2) + 0.05 * math.log(1 / 3) + 0.2 * math.log(2 / 3) + 0.55 * math.log(11 / 9)) / math.log(2),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_association_by_hand(statistic):
    assert association(statistic, np.array([4]), np.array([5]), np.array([8]), 20).tolist() == [
        pytest.approx(BY_HAND[statistic], rel=1e-12)
    ]


LIMITS = {  # never together; independent; the same places; everywhere
    "npmi": (-1, 0, 1, 1),
    "lift": (0, 1, 5, 1),
    "jaccard": (0, 0.25, 1, 1),
    "mi": (0.4 * math.log2(5 / 4) + 0.6 * math.log2(15 / 16), 0, math.log2(5) / 5 + 0.8 * math.log2(5 / 4), 0),
    "cond_prob": (0, 0.4, 1, 1),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_association_at_its_limits(statistic):
    x, a, b = np.array([0, 4, 4, 20]), np.array([4, 10, 4, 20]), np.array([4, 8, 4, 20])
    expected = list(LIMITS[statistic])
    if statistic == "jaccard":
        expected[1] = 4 / 14
    np.testing.assert_allclose(association(statistic, x, a, b, 20), expected, atol=1e-12)


def adjusted(p, m):
    """The definition: the smallest rate at which the step-up procedure rejects."""
    order = sorted(range(len(p)), key=p.__getitem__)
    result = {}
    for rank, i in enumerate(order, 1):
        result[i] = min(1.0, min(p[j] * m / (r + 1) for r, j in enumerate(order) if r + 1 >= rank))
    return [result[i] for i in range(len(p))]


def test_benjamini_hochberg_against_its_definition():
    p = np.random.default_rng(1).random(40) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), adjusted(p.tolist(), 40), rtol=1e-12)
    # Tests whose p-values were never computed count as 1, as if they stood there.
    np.testing.assert_allclose(benjamini_hochberg(p, 100), benjamini_hochberg(np.append(p, np.ones(60)))[:40], rtol=1e-12)
    assert benjamini_hochberg(np.zeros(0)).tolist() == []


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ConfigError, match=r"'nmpi' was asked for. Did you mean 'npmi' or 'mi'\? Give one of npmi, lift, jaccard, mi, cond_prob"
    ):
        association("nmpi", np.array([1]), np.array([1]), np.array([1]), 2)
    for x, a, b, n in [(3, 2, 5, 9), (-1, 2, 5, 9), (1, 10, 5, 9), (1, 8, 8, 9)]:
        with pytest.raises(DataError, match=r"counts that cannot be were given: of 9 places"):
            hypergeometric_tail(np.array([x]), np.array([a]), np.array([b]), n)
    with pytest.raises(DataError, match=r"3 p-values were given for 2 tests"):
        benjamini_hochberg(np.array([0.1, 0.2, 0.3]), 2)
    with pytest.raises(DataError, match=r"Give values from 0 to 1"):
        benjamini_hochberg(np.array([0.1, np.nan]))
