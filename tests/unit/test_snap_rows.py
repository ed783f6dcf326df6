"""The k best of each row, found through maxima of blocks, against sorting the whole row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_snap import normal
from tl_codebook.snap import definition, rows

NEG = -torch.inf


def random(seed):
    return torch.Generator().manual_seed(seed)


KINDS = {
    "normal": lambda n, c, seed: normal(n, c, seed=seed),
    "few integers": lambda n, c, seed: torch.randint(-2, 3, (n, c), generator=random(seed)).float(),
    "all equal": lambda n, c, seed: torch.full((n, c), float(seed % 3 - 1)),
    "mostly disabled": lambda n, c, seed: normal(n, c, seed=seed).masked_fill(torch.rand(n, c, generator=random(seed)) < 0.95, NEG),
    "all disabled": lambda n, c, seed: torch.full((n, c), NEG),
    "zeros of both signs": lambda n, c, seed: torch.where(torch.rand(n, c, generator=random(seed)) < 0.5, -0.0, 0.0),
    "zeros and less": lambda n, c, seed: torch.tensor([-1.0, -0.0, 0.0])[torch.randint(0, 3, (n, c), generator=random(seed))],
    "huge": lambda n, c, seed: normal(n, c, seed=seed).clamp(-3, 3) * 1e38,
    "tiny": lambda n, c, seed: normal(n, c, seed=seed) * 1e-42,
    "negative": lambda n, c, seed: -normal(n, c, seed=seed).abs() - 1,
    "rising": lambda n, c, seed: torch.arange(c).float().repeat(n, 1),
    "falling": lambda n, c, seed: -torch.arange(c).float().repeat(n, 1),
    "one far above": lambda n, c, seed: torch.zeros(n, c).scatter(1, torch.randint(0, c, (n, 1), generator=random(seed)), 5.0),
    "infinite": lambda n, c, seed: normal(n, c, seed=seed).masked_fill(torch.rand(n, c, generator=random(seed)) < 0.1, torch.inf),
}


def padded(scores, k):
    n_codes = scores.shape[1]
    table = torch.full((scores.shape[0], rows.padded(n_codes, k)), NEG)
    table[:, :n_codes] = scores
    return table


def assert_best(scores, k):
    n_codes = scores.shape[1]
    table = padded(scores, k)
    assert table.shape[1] >= n_codes
    before = table.clone()
    ids = rows.best(table, n_codes, k)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, definition.top_codes(scores, k))
    assert torch.equal(table.view(torch.int32), before.view(torch.int32)), "the table of scores was written to"


def assert_first_best(scores):
    table = padded(scores, 1)
    before = table.clone()
    assert torch.equal(rows.first_best(table), definition.top_codes(scores, 1).squeeze(1))
    assert torch.equal(table.view(torch.int32), before.view(torch.int32)), "the table of scores was written to"


def boundaries(k, up_to):
    """Return the numbers of codes at which the pyramid over a row gets another shape."""
    return [n for n in range(2, up_to) if rows.factors_for(n, k) != rows.factors_for(n - 1, k)]


SIZES = st.one_of(st.integers(1, 80), st.integers(1, 1500), st.sampled_from([64, 65, 128, 384, 511, 512, 513, 1024, 3071, 3072, 4096]))


@given(n_rows=st.integers(0, 5), n_codes=SIZES, kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=200)
def test_the_best_codes_are_those_of_a_sorted_row(n_rows, n_codes, kind, seed, data):
    k = data.draw(st.one_of(st.integers(1, min(n_codes, 9)), st.integers(1, n_codes)))
    scores = KINDS[kind](n_rows, n_codes, seed)
    assert_best(scores, k)
    assert_first_best(scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 8, 31, 32, 64])
def test_around_each_shape_of_the_pyramid(k, kind):
    found = boundaries(k, 5000)
    assert found, "no number of codes below 5000 has a pyramid: choose others"
    for n_codes in (size + step for size in found for step in (-1, 0, 1, 7)):
        assert_best(KINDS[kind](3, n_codes, n_codes), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_codes", [1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097])
def test_the_first_best_around_each_number_of_blocks(n_codes, kind):
    assert_first_best(KINDS[kind](3, n_codes, n_codes))


@pytest.mark.parametrize("k", [1, 8, 64])
def test_many_codes_and_ties_across_blocks_that_are_far_apart(k):
    n_codes = 40_000
    scores = torch.randint(0, 50, (4, n_codes), generator=random(1)).float()
    scores[0] = 0.0
    scores[1, ::1000] = 99.0
    scores[2] = normal(n_codes)
    assert_best(scores, k)
    assert_first_best(scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_codes", [1, 5, 64, 65, 1000])
def test_all_codes_is_a_sort(n_codes, kind):
    assert_best(KINDS[kind](3, n_codes, 7), n_codes)


@pytest.mark.parametrize("n_codes", [5, 64, 700, 4097])
def test_no_rows(n_codes):
    for k in (1, 2, 5):
        assert rows.best(torch.empty(0, rows.padded(n_codes, k)), n_codes, k).shape == (0, k)
    assert rows.first_best(torch.empty(0, rows.padded(n_codes, 1))).shape == (0,)


@pytest.mark.parametrize("n_codes", [5, 64, 65, 700, 4097])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_nan_gives_ids_in_range_and_leaves_other_rows_alone(n_codes, k):
    scores = normal(6, n_codes)
    expected = definition.top_codes(scores, k)
    nan = torch.tensor([0x7FC00000, -0x400000, 0x7FC00001, -1], dtype=torch.int32).view(
        torch.float32
    )  # of both signs, as products make them
    assert nan.isnan().all()
    scores[0] = nan[0]
    scores[2] = nan[1]
    scores[4, ::2] = nan[torch.arange(len(scores[4, ::2])) % 4]
    table = padded(scores, k)
    ids = rows.best(table, n_codes, k)
    assert ((ids >= 0) & (ids < n_codes)).all()
    assert torch.equal(ids[1::2], expected[1::2])
    if k == 1:
        first = rows.first_best(table)
        assert (first >= 0).all()
        assert (first < table.shape[1]).all()  # the caller keeps it below the number of codes
        assert torch.equal(first[1::2], expected[1::2, 0])


def test_what_one_call_left_behind_does_not_reach_the_next():
    """Memory is reused between calls, with other shapes."""
    calls = [(50, 3000, 8), (3, 700, 2), (80, 100, 40), (1, 3000, 64), (50, 3000, 8)]
    for seed, (n_rows, n_codes, k) in enumerate(calls):
        assert_best(KINDS["few integers" if seed % 2 else "normal"](n_rows, n_codes, seed), k)


@pytest.mark.parametrize(("n_codes", "k"), [(1, 1), (100, 1), (64, 1), (1000, 8), (999, 64), (50_000, 8)])
def test_padding_is_small(n_codes, k):
    assert n_codes <= rows.padded(n_codes, k) <= n_codes + max(64, n_codes // 4)
