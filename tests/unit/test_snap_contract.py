"""What a snap on the CPU promises, against scores in float64: ids up to rounding, vectors bit for bit, NaN, disabled codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_snap import BOTH, SELECTIONS, SIMILARITIES, normal
from tl_codebook.snap import cpu, decode, definition, ops, select, snap

EACH = pytest.mark.parametrize("selection", SELECTIONS)
WIDTHS = pytest.mark.parametrize(
    "d_group", [3, 64, 300]
)  # narrow; wide enough for a table of products; wide enough for no copy of the codes
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def grams(monkeypatch):
    """What cpu._grams returned at each call."""
    made, original = [], cpu._grams
    monkeypatch.setattr(cpu, "_grams", lambda *args: made.append(original(*args)) or made[-1])
    return made


def assert_chosen(x, codes, ids, similarity, selection, disabled=None):
    """Choose again in float64: at each slot the code is the best, or less than rounding below it."""
    n_rows, n_groups, k = ids.shape
    assert ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < codes.shape[1])).all()
    rest, exact = x.double(), codes.double()
    longest = exact.norm(dim=-1).max().clamp(min=1)
    closed = torch.zeros(n_rows, n_groups, codes.shape[1], dtype=torch.bool)
    if disabled is not None:
        closed |= disabled
    for slot in range(k):
        table = definition.scores(rest, exact, similarity).masked_fill(closed, -torch.inf)
        taken = table.gather(-1, ids[..., slot, None]).squeeze(-1)
        tolerance = 1e-6 * (x.double().norm(dim=-1) + rest.norm(dim=-1) + longest) * longest
        assert (taken >= table.amax(-1) - tolerance).all(), (slot, (table.amax(-1) - taken).max())
        if selection == "nearest":
            closed = closed.scatter(-1, ids[..., slot, None], True)  # no code twice
        else:
            rest = rest - definition.decode(ids[..., slot, None], exact, "sum")


def exactly(x, codes, k, similarity, selection, disabled=None):
    choose = definition.residual_codes if selection == "residual" else definition.nearest_codes
    return choose(x.double(), codes.double(), k, similarity, disabled)


@given(
    n_rows=st.integers(0, 50),
    n_groups=st.integers(1, 4),
    d_group=st.sampled_from([1, 3, 16, 64, 257, 300]),
    n_codes=st.one_of(st.integers(1, 20), st.integers(1, 700)),
    similarity=st.sampled_from(SIMILARITIES),
    selection=st.sampled_from(SELECTIONS),
    dtypes=st.sampled_from([(torch.float32, torch.float32), *((a, b) for a in HALF for b in (a, torch.float32)), (torch.float32, HALF[1])]),
    reduce=st.sampled_from(["sum", "mean"]),
    strided=st.booleans(),
    seed=st.integers(0, 9999),
    data=st.data(),
)
@settings(max_examples=80)
def test_the_snap_is_its_definition(n_rows, n_groups, d_group, n_codes, similarity, selection, dtypes, reduce, strided, seed, data):
    k = data.draw(st.integers(1, min(n_codes, 6)))
    x = normal(n_rows, n_groups, d_group, seed=seed, dtype=dtypes[0])
    codes = normal(n_groups, n_codes, d_group, seed=seed + 1, dtype=dtypes[1])
    kept = x.clone(), codes.clone()
    if strided:
        x = torch.cat([x, x], -1).permute(2, 0, 1).contiguous().permute(1, 2, 0)[..., d_group:]
        codes = torch.stack([codes, codes], 2)[:, :, 1]
    out, ids = cpu.snap(x, codes, k, similarity, selection, reduce)
    assert ids.shape == (n_rows, n_groups, k)
    assert_chosen(x, codes, ids, similarity, selection)
    assert out.dtype == codes.dtype
    assert out.shape == x.shape
    assert torch.equal(out, decode(ids, codes, reduce))
    torch.testing.assert_close(out.double(), definition.decode(ids, codes.double(), reduce), rtol=1e-2, atol=1e-2)
    nothing, again = cpu.snap(x, codes, k, similarity, selection, None)
    assert nothing is None
    assert torch.equal(again, ids)
    assert torch.equal(x, kept[0])
    assert torch.equal(codes, kept[1])
    if k == 1:
        other = "nearest" if selection == "residual" else "residual"
        assert torch.equal(cpu.snap(x, codes, 1, similarity, other, None)[1], ids)


@BOTH
@EACH
@WIDTHS
@pytest.mark.parametrize("k", [1, 4])
def test_the_same_every_time_and_on_any_number_of_threads(similarity, selection, d_group, k, threads, grams):
    x, codes = normal(900, 2, d_group), normal(2, 200, d_group, seed=1)
    results = []
    for n in (1, 1, 2, 2, 3):
        threads(n)
        results.append(cpu.snap(x, codes, k, similarity, selection, "sum"))
    assert_chosen(x, codes, results[0][1], similarity, selection)
    for out, ids in results[1:]:
        assert torch.equal(ids, results[0][1])
        assert torch.equal(out, results[0][0])
    if selection == "residual" and k > 1:
        assert all((made is not None) == (d_group >= 48) for made in grams)


@BOTH
@EACH
@WIDTHS
def test_a_row_alone_chooses_what_it_chooses_in_a_batch(similarity, selection, d_group):
    x, codes = normal(60, 2, d_group), normal(2, 300, d_group, seed=1)
    together = select(x, codes, 3, similarity=similarity, selection=selection)
    alone = torch.cat([select(row[None], codes, 3, similarity=similarity, selection=selection) for row in x])
    assert_chosen(x, codes, alone, similarity, selection)
    assert (alone == together).all(-1).double().mean() > 0.99  # all but near ties


@WIDTHS
@pytest.mark.parametrize("everywhere", [True, False], ids=["all dimensions", "one dimension"])
@pytest.mark.parametrize(("selection", "k"), [("nearest", 1), ("nearest", 8), ("residual", 4)])
def test_a_large_common_offset_costs_no_digits(d_group, everywhere, selection, k, grams):
    """Models have activations that are large in the same place everywhere: x . c - |c|^2 / 2 would be all rounding."""
    x, codes = normal(1000, 1, d_group), normal(1, 400, d_group, seed=1)
    for tensor in (x, codes):
        tensor[..., slice(None) if everywhere else slice(1, 2)] += 300
    expected = exactly(x, codes, k, "euclidean", selection)
    ids = cpu.snap(x, codes, k, "euclidean", selection, None)[1]
    assert (ids == expected).double().mean() >= 0.999
    if selection == "residual":
        assert (grams[0] is not None) == (d_group >= 48)


def test_the_offset_of_the_test_above_would_be_noticed():
    x, codes = normal(1000, 1, 64) + 300, normal(1, 400, 64, seed=1) + 300
    expected = exactly(x, codes, 1, "euclidean", "nearest")
    assert (definition.nearest_codes(x, codes, 1, "euclidean") == expected).double().mean() < 0.9


@BOTH
@EACH
@WIDTHS
@pytest.mark.parametrize("k", [1, 3])
def test_rows_with_nan_or_inf_come_back_as_nan_and_harm_nobody(similarity, selection, d_group, k):
    n_rows = 150
    x, codes = normal(n_rows, 2, d_group), normal(2, 70, d_group, seed=1)
    expected, expected_ids = snap(x, codes, k, similarity=similarity, selection=selection)
    for start in range(3):  # each row is bad in one of the rounds, the first and the last of the batch as well
        wrong = torch.zeros(n_rows, 2, dtype=torch.bool)
        wrong[start::3, start % 2] = True
        bad = x.clone()
        for i, (row, group) in enumerate(wrong.nonzero().tolist()):
            bad[row, group, i % d_group] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        out, ids = snap(bad, codes, k, similarity=similarity, selection=selection)
        assert (ids[wrong] == -1).all()
        assert out[wrong].isnan().all()
        assert torch.equal(ids[~wrong], expected_ids[~wrong])
        assert torch.equal(out[~wrong], expected[~wrong])
        assert torch.equal(select(bad, codes, k, similarity=similarity, selection=selection), ids)


@EACH
@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
def test_a_batch_of_nothing_but_nan(selection, d_group, dtype):
    x, codes = torch.full((40, 1, d_group), torch.nan, dtype=dtype), normal(1, 80, d_group, dtype=dtype)
    out, ids = snap(x, codes, 3, selection=selection)
    assert (ids == -1).all()
    assert out.isnan().all()
    _, ids = cpu.snap(x.float(), codes.float(), 3, "euclidean", selection, "sum")
    assert ((ids >= 0) & (ids < 80)).all()


@EACH
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_finite_rows_whose_sum_is_not_are_snapped(selection, dtype, value):
    x = torch.zeros(6, 1, 3, dtype=dtype)
    x[range(6), 0, [0, 1, 2, 0, 1, 2]] = torch.tensor([value] * 5 + [-value], dtype=dtype)
    codes = torch.eye(3, dtype=dtype)[None]
    ids = select(x, codes, 1, similarity="inner_product", selection=selection)
    assert ids.flatten().tolist() == [0, 1, 2, 0, 1, 0]


@BOTH
@EACH
@WIDTHS
@pytest.mark.parametrize("per_row", [False, True])
def test_disabled_codes(similarity, selection, d_group, per_row, grams):
    n_rows, n_codes, k = 300, 90, 4
    x, codes = normal(n_rows, 2, d_group), normal(2, n_codes, d_group, seed=1)
    disabled = torch.rand(n_rows if per_row else 1, 2, n_codes, generator=torch.Generator().manual_seed(2)) < 0.8
    disabled[..., 5:10] = False
    ids = select(x, codes, k, similarity=similarity, selection=selection, disabled=disabled)
    assert not disabled.expand(n_rows, -1, -1).gather(-1, ids).any()
    assert_chosen(x, codes, ids, similarity, selection, disabled)
    if selection == "residual":
        assert (grams[0] is not None) == (d_group >= 48)


@BOTH
@EACH
@WIDTHS
@pytest.mark.parametrize("per_row", [False, True])
def test_slots_that_no_enabled_code_is_left_for_stay_empty(similarity, selection, d_group, per_row):
    n_rows, n_codes, k = 60, 70, 4
    x, codes = normal(n_rows, 2, d_group), normal(2, n_codes, d_group, seed=1)
    enabled = torch.arange(n_rows if per_row else 1) % 6 if per_row else torch.tensor([2])  # 0 to 5 codes
    order = torch.rand(len(enabled), 2, n_codes, generator=torch.Generator().manual_seed(2)).argsort(-1)
    disabled = order >= enabled[:, None, None]
    args = (x, codes, k, similarity, selection, "mean", disabled)
    out, ids = ops.choose_and_decode(*args)
    assert torch.equal(select(x, codes, k, similarity=similarity, selection=selection, disabled=disabled), ids)
    filled = (enabled if selection == "nearest" else torch.where(enabled > 0, k, 0)).clamp(max=k).expand(n_rows)
    assert torch.equal(ids >= 0, (torch.arange(k) < filled[:, None])[:, None].expand_as(ids))
    assert (ids >= -1).all()
    assert not (disabled.expand(n_rows, -1, -1).gather(-1, ids.clamp(min=0)) & (ids >= 0)).any()
    assert torch.equal(out, decode(ids, codes, "mean"))
    assert (out[filled == 0] == 0).all()
    assert not out.isnan().any()
    full = filled == k
    if full.any():
        masked = disabled[full] if per_row else disabled
        assert_chosen(x[full], codes, ids[full], similarity, selection, masked)


def test_a_disabled_code_and_a_row_of_nan():
    x, codes = normal(50, 1, 8), normal(1, 70, 8, seed=1)
    x[7] = torch.nan
    disabled = torch.zeros(1, 1, 70, dtype=torch.bool)
    disabled[..., :69] = True
    out, ids = ops.choose_and_decode(x, codes, 2, "euclidean", "nearest", "sum", disabled)
    others = torch.arange(50) != 7
    assert ids[7].tolist() == [[-1, -1]]
    assert out[7].isnan().all()
    assert ids[others].unique(dim=0).tolist() == [[[69, -1]]]
    assert torch.equal(out[others], codes[:, 69].expand(49, 1, 8))


@BOTH
@EACH
@WIDTHS
@pytest.mark.parametrize("k", [1, 3])
def test_zero_codes_score_zero(similarity, selection, d_group, k):
    """All other codes point away from the vectors and score less than nothing."""
    x, codes = normal(200, 1, d_group).abs() + 0.1, -normal(1, 80, d_group, seed=1).abs() - 0.1
    codes[:, 41] = 0.0
    ids = select(x, codes, k, similarity=similarity, selection=selection)
    assert (ids[..., 0] == 41).all()
    if selection == "residual":  # a zero code leaves everything over
        assert (ids == 41).all()
    codes[:] = 0.0
    ids = select(x, codes, k, similarity=similarity, selection=selection)
    assert torch.equal(ids, (torch.zeros(k) if selection == "residual" else torch.arange(k)).long().expand_as(ids))


def integers(*shape, low=-2, high=2, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def lengths_of_powers_of_two(n_codes, d_group, seed=0):
    """Return codes of 0, 1, 4 or 16 entries of +-1: their lengths and cosines are exact in fp32, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(n_codes, d_group, generator=generator).argsort(-1)
    entries = torch.tensor([0, 1, 4, 16])[torch.randint(0, 4, (n_codes, 1), generator=generator)]
    entries[d_group < entries] = 1
    signs = torch.randint(0, 2, (n_codes, d_group), generator=generator) * 2.0 - 1
    return torch.where(rank < entries, signs, 0.0)[None]


def assert_exact(x, codes, k, similarity, selection, expected, grams, monkeypatch):
    """The ids are the expected ones, and those of several residual codes are with and without the table of products."""
    assert torch.equal(cpu.snap(x, codes, k, similarity, selection, None)[1], expected)
    if selection == "residual" and k > 1:
        assert (grams[0] is not None) == (x.shape[-1] >= 48)
        monkeypatch.setattr(cpu, "_grams", lambda *args: None)
        assert torch.equal(cpu.snap(x, codes, k, similarity, selection, None)[1], expected)


@EACH
@pytest.mark.parametrize("d_group", [2, 5, 64, 300])
@pytest.mark.parametrize("k", [1, 2, 4, 40])
@pytest.mark.parametrize("offset", [0, 304])
def test_whole_numbers_tie_and_the_lowest_id_wins(selection, d_group, k, offset, grams, monkeypatch):
    x, codes = integers(400, 1, d_group) + offset, integers(1, 200, d_group, seed=1) + offset
    codes[:, 100:] = codes[:, torch.randperm(100, generator=torch.Generator().manual_seed(3))]
    if selection == "residual":
        k = min(k, 4)
    expected = exactly(x, codes, k, "euclidean", selection)
    assert_exact(x, codes, k, "euclidean", selection, expected, grams, monkeypatch)


@EACH
@pytest.mark.parametrize("d_group", [2, 5, 64, 300])
@pytest.mark.parametrize("k", [1, 2, 4, 40])
def test_exact_cosines_tie_and_the_lowest_id_wins(selection, d_group, k, grams, monkeypatch):
    x, codes = integers(400, 1, d_group), lengths_of_powers_of_two(200, d_group)
    expected = exactly(x, codes, k, "inner_product", selection)
    assert_exact(x, codes, k, "inner_product", selection, expected, grams, monkeypatch)


@EACH
def test_ties_are_ties_in_whichever_chunk(selection, monkeypatch):
    x, codes = integers(130, 2, 6), integers(2, 300, 6, seed=1)
    expected = exactly(x, codes, 3, "euclidean", selection)
    for n_rows in (1, 7, 129, 500):
        monkeypatch.setattr(cpu, "_chunk_rows", lambda *_, n_rows=n_rows: n_rows)
        assert torch.equal(cpu.snap(x, codes, 3, "euclidean", selection, None)[1], expected)


@EACH
@pytest.mark.parametrize("k", [2, 5])
def test_k_is_the_beginning_of_more(selection, k):
    x, codes = normal(300, 1, 16), normal(1, 500, 16, seed=1)
    more = select(x, codes, 6, selection=selection)
    assert torch.equal(select(x, codes, k, selection=selection), more[..., :k])


@EACH
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_summed_up_in_fp32(selection, dtype):
    codes = torch.tensor([[[256.0, 0.0], [1.0, 0.0]]], dtype=dtype)
    x = torch.tensor([[300.0, 0.0]], dtype=dtype)
    out, ids = snap(x, codes, 2, selection=selection)
    assert torch.equal(out[0], codes.float()[0, ids[0]].sum(0).to(dtype))
    total = decode(torch.tensor([[0] + [1] * 44]), codes, "sum")  # in bf16, 256 + 1 is 256
    assert total[0, 0].item() == 300
    assert total.dtype == dtype


def test_the_dtype_of_the_codes_decides():
    x, codes = normal(5, 1, 4), normal(1, 9, 4, seed=1)
    for a in (*HALF, torch.float32):
        for b in (*HALF, torch.float32):
            out, ids = snap(x.to(a), codes.to(b), 2)
            assert out.dtype == b
            assert ids.dtype == torch.int64
            assert torch.equal(out, decode(ids, codes.to(b)))


@EACH
@pytest.mark.parametrize("other", [*HALF, torch.float32])
def test_double_precision_on_one_side_is_enough(selection, other):
    x, codes = normal(50, 1, 4, dtype=other), normal(1, 90, 4, seed=1, dtype=other)
    for a, b in ((x.double(), codes), (x, codes.double())):
        out, ids = snap(a, codes=b, k=3, selection=selection)
        assert out.dtype == b.dtype
        assert torch.equal(ids, exactly(x, codes, 3, "euclidean", selection))
