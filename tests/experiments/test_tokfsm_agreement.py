"""Agreement of labellings: by hand, against every permutation, and what always holds."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_codebook.errors import DataError, ShapeError
from tl_codebook.experiments.tokfsm.agreement import adjusted_mutual_information, matched_agreement


def entropy(labels):
    return -sum(p * math.log(p) for p in (labels.count(label) / len(labels) for label in set(labels)))


def information(a, b):
    return entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True)))


def by_permutations(a, b):
    """The definition: the expectation is a mean over every way to deal b out."""
    expected = [information(a, dealt) for dealt in itertools.permutations(b)]
    expected = sum(expected) / len(expected)
    return (information(a, b) - expected) / ((entropy(a) + entropy(b)) / 2 - expected)


def matched_by_permutations(a, b):
    names = range(max(*a, *b) + 1)
    return max(sum(new[x] == y for x, y in zip(a, b, strict=True)) for new in itertools.permutations(names)) / len(a)


labellings = st.integers(1, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 2))
SAME, OTHER = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])


def test_by_hand():
    # Of the 6 ways to deal {0,0,1,1} out over four positions, 2 give log 2 and 4 give 0: log 2 / 3 is expected, log 2 the most.
    # For b = 0101 the information is 0: (0 - 1/3) / (1 - 1/3) = -1/2.
    assert adjusted_mutual_information(SAME, OTHER) == pytest.approx(-0.5)
    # {0,0,0,1} against {0,0,1,1}: one 1 always stands with one of the pairs, so every deal gives the same, and so does chance.
    assert adjusted_mutual_information(torch.tensor([0, 0, 0, 1]), SAME) == pytest.approx(0)
    assert matched_agreement(SAME, OTHER) == 1 / 2
    # Label 0 of a is 7 twice and 3 once, label 1 is 7 twice: 0 -> 7 and 1 unmatched gives 2; 0 -> 3 and 1 -> 7 gives 3, of 5.
    assert matched_agreement(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([7, 7, 3, 7, 7])) == 3 / 5


@pytest.mark.parametrize(
    ("a", "b"),
    [([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1]), ([0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]), ([0, 1, 2, 3, 4, 4], [0, 0, 0, 0, 1, 1])],
)
def test_the_expectation_is_that_of_every_permutation(a, b):
    assert adjusted_mutual_information(torch.tensor(a), torch.tensor(b)) == pytest.approx(by_permutations(a, b), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(labellings)
def test_any_small_labellings(pair):
    a, b = pair
    got = adjusted_mutual_information(torch.tensor(a), torch.tensor(b))
    if len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b)):
        assert got == 1
    else:
        assert got == pytest.approx(by_permutations(a, b), abs=1e-9)
    assert matched_agreement(torch.tensor(a), torch.tensor(b)) == matched_by_permutations(a, b)


@pytest.mark.parametrize("labels", [torch.zeros(5, dtype=torch.long), torch.arange(5), torch.tensor([3])])
def test_trivial_labellings(labels):
    assert adjusted_mutual_information(labels, labels.flip(0) + 8) == 1
    assert matched_agreement(labels, labels.flip(0) + 8) == 1


def test_one_trivial_labelling_says_nothing():
    for trivial in (torch.zeros(6, dtype=torch.long), torch.arange(6)):
        assert adjusted_mutual_information(trivial, torch.tensor([0, 0, 1, 1, 2, 2])) == pytest.approx(0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(0, 2**31))
def test_what_always_holds(n, n_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(n_labels, (2, n), generator=generator)
    names = torch.randperm(n_labels, generator=generator) - 5
    order = torch.randperm(n, generator=generator)
    for measure in (adjusted_mutual_information, matched_agreement):
        found = measure(a, b)
        assert found <= 1 + 1e-12
        assert measure(b, a) == pytest.approx(found, abs=1e-9)
        assert measure(names[a], b) == pytest.approx(found, abs=1e-9)
        assert measure(a[order], b[order]) == pytest.approx(found, abs=1e-9)
        assert measure(a, names[a]) == 1


def test_many_labels():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(1000, (2, 30_000), generator=generator)
    assert abs(adjusted_mutual_information(a, b)) < 0.01  # unadjusted it is .51 here
    assert adjusted_mutual_information(a, torch.randperm(1000, generator=generator)[a]) == 1
    some = torch.where(torch.rand(30_000, generator=generator) < 0.1, b, a)
    assert 0.7 < adjusted_mutual_information(a, some) < 0.95
    assert matched_agreement(a, some) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("measure", [adjusted_mutual_information, matched_agreement])
def test_what_cannot_be_is_refused(measure):
    with pytest.raises(ShapeError, match="labels of 4 and of 3 positions"):
        measure(SAME, OTHER[:3])
    with pytest.raises(DataError, match="labels of no position"):
        measure(SAME[:0], OTHER[:0])
