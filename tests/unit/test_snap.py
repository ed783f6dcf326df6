"""Choosing codes: the definition against brute force, ties, precision, chunks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_codebook.snap import cpu, definition, ops, select, snap

SIMILARITIES = ("inner_product", "euclidean")
SELECTIONS = ("nearest", "residual")
BOTH = pytest.mark.parametrize("similarity", SIMILARITIES)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_scores(vector, codes, similarity):
    """Score the codes of one group with Python floats."""
    result = []
    for code in codes.tolist():
        product = math.fsum(a * b for a, b in zip(vector.tolist(), code, strict=True))
        square = math.fsum(c * c for c in code)
        if similarity == "euclidean":
            result.append(product - square / 2)
        else:
            result.append(product / math.sqrt(square) if square else 0.0)
    return result


def brute_order(scores):
    return sorted(range(len(scores)), key=lambda code: (-scores[code], code))


def brute_nearest(x, codes, k, similarity):
    rows = [
        [brute_order(brute_scores(vector, codes[group], similarity))[:k] for group, vector in enumerate(row)]
        for row in x.reshape(-1, *x.shape[-2:])
    ]
    return torch.tensor(rows).reshape(*x.shape[:-1], k)


def brute_residual(x, codes, k, similarity):
    rows = []
    for row in x.reshape(-1, *x.shape[-2:]).double():
        for group, rest in enumerate(row):
            chosen = []
            for _ in range(k):
                chosen.append(brute_order(brute_scores(rest, codes[group], similarity))[0])
                rest = rest - codes[group, chosen[-1]].double()
            rows.append(chosen)
    return torch.tensor(rows).reshape(*x.shape[:-1], k)


BRUTE = {"nearest": brute_nearest, "residual": brute_residual}


@BOTH
def test_scores_equal_brute_force(similarity):
    x, codes = normal(3, 2, 5), normal(2, 11, 5, seed=1)
    codes[1, 4] = 0.0
    table = definition.scores(x, codes, similarity)
    assert table.shape == (3, 2, 11)
    assert table.dtype == torch.float32
    for row in range(3):
        for group in range(2):
            expected = torch.tensor(brute_scores(x[row, group], codes[group], similarity))
            torch.testing.assert_close(table[row, group], expected)
    assert (table[:, 1, 4] == 0).all()


def test_scores_rank_as_cosine_and_as_distance():
    x, codes = normal(20, 1, 6, dtype=torch.float64), normal(1, 30, 6, seed=1, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(x, codes, dim=-1)
    distance = (x - codes).norm(dim=-1)
    assert torch.equal(select(x, codes, 30, similarity="inner_product", selection="nearest")[:, 0], cosine.argsort(descending=True))
    assert torch.equal(select(x, codes, 30, similarity="euclidean", selection="nearest")[:, 0], distance.argsort())


@BOTH
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_ids_equal_brute_force(similarity, selection, k):
    x, codes = normal(2, 4, 3, 5), normal(3, 7, 5, seed=1)
    ids = select(x, codes, k, similarity=similarity, selection=selection)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, BRUTE[selection](x, codes, k, similarity))


@BOTH
@pytest.mark.parametrize("k", [1, 3])
def test_duplicates_of_a_code_go_to_the_lowest_id(similarity, k):
    base = normal(1, 37, 19, seed=1)
    codes = base.repeat(1, 3, 1)
    x = normal(200, 1, 19)
    first = select(x, base, k, similarity=similarity, selection="nearest")
    ids = select(x, codes, 3 * k, similarity=similarity, selection="nearest")
    assert torch.equal(ids, torch.stack([first, first + 37, first + 74], -1).flatten(-2))
    assert torch.equal(select(x, codes, 1, similarity=similarity, selection="nearest"), first[..., :1])
    residual = select(x, codes, k, similarity=similarity, selection="residual")
    assert torch.equal(residual, select(x, base, k, similarity=similarity, selection="residual"))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_codes_that_differ_in_length_alone_tie_for_the_cosine(k):
    codes = torch.tensor([[[0.5, 0.5], [4.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])
    ids = select(torch.tensor([[3.0, 0.0]]), codes, k, similarity="inner_product", selection="nearest")
    assert ids.tolist() == [[1, 2, 3, 0][:k]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_zero_vector_takes_the_lowest_ids(dtype, selection, k):
    codes = normal(2, 6, 4, dtype=dtype)
    ids = select(torch.zeros(3, 2, 4, dtype=dtype), codes, k, similarity="inner_product", selection="nearest")
    assert torch.equal(ids, torch.arange(k).expand(3, 2, k))
    first = select(torch.zeros(3, 2, 4, dtype=dtype), codes, k, similarity="inner_product", selection=selection)[..., 0]
    assert (first == 0).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_zero_is_zero(k, dtype):
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0], dtype=dtype)
    assert definition.top_codes(scores, k).tolist() == [1, 2, 3, 0][:k]
    zeros = torch.tensor([[[0.0, 0.0], [-0.0, -0.0], [0.0, -0.0], [-0.0, 0.0]]], dtype=dtype)
    for vector in (-1.0, -0.0, 0.0, 1.0):
        for similarity in SIMILARITIES:
            ids = select(torch.full((1, 2), vector, dtype=dtype), zeros, k, similarity=similarity, selection="nearest")
            assert ids.tolist() == [[0, 1, 2, 3][:k]]


SCORES = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]))


@given(st.lists(SCORES, min_size=1, max_size=9), st.data())
def test_top_codes_sort_by_score_then_id(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    expected = brute_order(scores)[:k]
    for dtype in (torch.float32, torch.float64):
        assert definition.top_codes(torch.tensor(scores, dtype=dtype), k).tolist() == expected


@BOTH
def test_a_zero_code_scores_zero(similarity):
    # The other codes point away from the vector: they score less than nothing.
    codes = torch.tensor([[[-1.0, -1.0], [0.0, 0.0], [-3.0, 0.0]]])
    x = torch.tensor([[1.0, 1.0]])
    assert definition.scores(x, codes, similarity)[0, 1] == 0
    assert select(x, codes, 1, similarity=similarity, selection="nearest").tolist() == [[1]]


@BOTH
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("k", [1, 3])
def test_disabled_codes_are_never_chosen(similarity, selection, k):
    x, codes = normal(4, 5, 2, 6), normal(2, 8, 6, seed=1)
    keep = torch.tensor([1, 2, 4, 7])
    disabled = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    disabled[..., keep] = False
    ids = select(x, codes, k, similarity=similarity, selection=selection, disabled=disabled.expand(1, 1, 2, 8))
    assert torch.isin(ids, keep).all()
    assert torch.equal(ids, keep[select(x, codes[:, keep], k, similarity=similarity, selection=selection)])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_disabled_codes_may_differ_by_position(selection):
    x, codes = normal(4, 5, 2, 6), normal(2, 8, 6, seed=1)
    free = select(x, codes, 2, selection=selection)
    disabled = torch.zeros(4, 5, 2, 8, dtype=torch.bool).scatter(-1, free[..., :1], True)
    disabled[0] = False
    ids = select(x, codes, 2, selection=selection, disabled=disabled)
    assert torch.equal(ids[0], free[0])
    assert not (ids[1:] == free[1:, ..., :1]).any()
    one = select(x[2, 3, None], codes, 2, selection=selection, disabled=disabled[2, 3, None])
    assert torch.equal(ids[2, 3], one[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
def test_half_precision_inputs_rank_in_fp32(dtype, similarity):
    x, codes = normal(20, 1, 16, dtype=dtype), (1 + 0.1 * normal(1, 200, 16, seed=1)).to(dtype)  # close together
    for selection in SELECTIONS:
        ids = select(x, codes, 4, similarity=similarity, selection=selection)
        assert torch.equal(ids, BRUTE[selection](x.float(), codes.float(), 4, similarity))
    assert definition.scores(x, codes, similarity).dtype == torch.float32
    rounded = definition.scores(x, codes, similarity).to(dtype)
    assert not torch.equal(definition.top_codes(rounded.float(), 4), select(x, codes, 4, similarity=similarity, selection="nearest"))


def test_double_precision_stays():
    step = 3e-8  # fp32 cannot tell the codes apart
    codes = torch.tensor([[[1.0], [1.0 + step]]], dtype=torch.float64)
    x = torch.tensor([[1.0 + step]], dtype=torch.float64)
    assert select(x.float(), codes.float(), 1).tolist() == [[0]]
    for selection in SELECTIONS:
        assert select(x, codes, 1, selection=selection).tolist() == [[1]]
    assert select(x, codes, 2, selection="nearest").tolist() == [[1, 0]]
    assert definition.scores(x, codes, "euclidean").dtype == torch.float64


@BOTH
@pytest.mark.parametrize("selection", SELECTIONS)
def test_autocast_does_not_change_ids(similarity, selection):
    x, codes = normal(50, 1, 16), normal(1, 300, 16, seed=1)
    expected = select(x, codes, 4, similarity=similarity, selection=selection)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select(x, codes, 4, similarity=similarity, selection=selection), expected)
        assert not torch.equal(
            definition.nearest_codes(x, codes, 4, similarity), definition.nearest_codes(x.double(), codes.double(), 4, similarity)
        )


def test_the_error_of_residual_selection_is_what_the_scores_say():
    x, codes = normal(30, 2, 6, dtype=torch.float64), normal(2, 12, 6, seed=1, dtype=torch.float64)
    rest = x.clone()
    for k in range(1, 6):
        ids = select(x, codes, k)
        best = definition.scores(rest, codes, "euclidean").amax(-1)
        error = (x - definition.decode(ids, codes, "sum")).square().sum(-1)
        torch.testing.assert_close(error, rest.square().sum(-1) - 2 * best)
        rest = x - definition.decode(ids, codes, "sum")


@given(st.integers(0, 10**6), st.floats(0.01, 10))
@settings(max_examples=40)
def test_with_a_zero_code_more_codes_never_fit_worse(seed, scale):
    x, codes = normal(5, 2, 4, seed=seed), normal(2, 9, 4, seed=seed + 1) * scale
    codes[:, 3] = 0.0
    ids = select(x, codes, 6)
    errors = [(x - definition.decode(ids[..., :k], codes, "sum")).square().sum(-1) for k in range(7) if k]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-6).all()
    assert torch.equal(select(x, codes, 3), ids[..., :3])


@BOTH
@pytest.mark.parametrize("selection", SELECTIONS)
def test_chunks_do_not_change_ids(similarity, selection, monkeypatch):
    x, codes = normal(3, 11, 2, 5), normal(2, 13, 5, seed=1)
    disabled = torch.rand(3, 11, 2, 13, generator=torch.Generator().manual_seed(3)) < 0.3
    options = {"similarity": similarity, "selection": selection}
    whole = select(x, codes, 3, **options)
    whole_disabled = select(x, codes, 3, disabled=disabled, **options)
    for n_rows in (1, 4, 32):
        monkeypatch.setattr(cpu, "_chunk_rows", lambda *_, n_rows=n_rows: n_rows)
        assert torch.equal(select(x, codes, 3, **options), whole)
        assert torch.equal(select(x, codes, 3, disabled=disabled, **options), whole_disabled)
    assert not torch.gather(disabled, -1, whole_disabled).any()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_chunks_of_double_precision_do_not_change_ids(selection, monkeypatch):
    x, codes = normal(3, 11, 2, 5, dtype=torch.float64), normal(2, 13, 5, seed=1, dtype=torch.float64)
    disabled = torch.rand(3, 11, 2, 13, generator=torch.Generator().manual_seed(3)) < 0.3
    whole = [select(x, codes, 3, selection=selection, disabled=mask) for mask in (None, disabled, disabled[:1, :1])]
    for at_once in (1, 4 * 26, 26 * 33 - 1):  # one row, four rows, all but the last
        monkeypatch.setattr(ops, "_SCORES_AT_ONCE", at_once)
        parts = [select(x, codes, 3, selection=selection, disabled=mask) for mask in (None, disabled, disabled[:1, :1])]
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_more_rows_than_fit_at_once():
    x, codes = normal(430, 3, 4, 8), normal(4, 1024, 8, seed=1)
    assert cpu._chunk_rows(1290, 4, 1024, 8) < 1290
    assert torch.equal(select(x, codes, 2, selection="nearest"), definition.nearest_codes(x, codes, 2, "euclidean"))
    assert torch.equal(select(x, codes, 2), definition.residual_codes(x, codes, 2, "euclidean"))


@pytest.mark.parametrize("lead", [(0,), (0, 5), (5, 0)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_empty_batch_has_no_ids(lead, selection):
    x, codes = torch.zeros(*lead, 2, 4), normal(2, 6, 4)
    ids = select(x, codes, 3, selection=selection)
    assert ids.shape == (*lead, 2, 3)
    assert ids.dtype == torch.int64
    out, _ = snap(x, codes, 3, selection=selection)
    assert out.shape == (*lead, 2, 4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_memory_layout_does_not_matter(selection):
    x, codes = normal(4, 3, 2, 5), normal(2, 9, 5, seed=1)
    expected = select(x, codes, 3, selection=selection)
    strided_x = x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    strided_codes = torch.stack([codes, -codes], -1)[..., 0]
    assert not strided_x.is_contiguous()
    assert not strided_codes.is_contiguous()
    assert torch.equal(select(strided_x, strided_codes, 3, selection=selection), expected)
    wide = torch.cat([x, x], -1)[..., 5:]
    assert torch.equal(snap(wide, codes, 3, selection=selection)[0], snap(x, codes, 3, selection=selection)[0])


def test_choosing_makes_no_graph():
    x, codes = normal(4, 1, 5).requires_grad_(), normal(1, 9, 5, seed=1).requires_grad_()
    assert not select(x, codes, 3).requires_grad


def test_snap_returns_vectors_and_ids():
    x, codes = normal(4, 2, 5), normal(2, 9, 5, seed=1)
    for selection, reduce in (("nearest", "mean"), ("nearest", "sum"), ("residual", "sum")):
        out, ids = snap(x, codes, 3, selection=selection, reduce=reduce)
        assert torch.equal(ids, select(x, codes, 3, selection=selection))
        torch.testing.assert_close(out, definition.decode(ids, codes, reduce))
    out, _ = snap(x.bfloat16(), codes, 1)
    assert out.dtype == codes.dtype
