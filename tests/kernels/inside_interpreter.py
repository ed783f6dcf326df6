"""The kernels against the definition, in Triton's interpreter. `test_triton_interpreter.py` runs this file in a process of its own.

The interpreter cuts fp32 to bf16 where a GPU rounds, so outputs in bf16 may differ from torch by one unit in the last place here.
"""

import pytest
import torch

from tl_codebook.snap import definition, gpu, triton_common, triton_fused, triton_select

if not triton_common.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before triton is first imported", allow_module_level=True)

SMALL = triton_common.Tiles(16, 32, 16, 4, 2)
ONE_PASS = triton_fused.Plan(SMALL, SMALL, one_pass=True)
MAXIMA = triton_fused.Plan(SMALL, SMALL, one_pass=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIMILARITIES = ["euclidean", "inner_product"]


def fused(x, codes, k, similarity="euclidean", selection="nearest", disabled=None, plan=None, workspace=gpu.WORKSPACE):
    return triton_fused.select(x, codes, k, similarity, selection, disabled, workspace, plan)


def defined(x, codes, k, similarity="euclidean", selection="nearest", disabled=None):
    choose = definition.residual_codes if selection == "residual" else definition.nearest_codes
    return choose(x, codes, k, similarity, disabled)


def whole_numbers(n, groups, n_codes, d, dtype=torch.float32, largest=2):
    """Data whose scores are exact and often equal."""
    return (torch.randint(-largest, largest + 1, shape).to(dtype) for shape in ((n, groups, d), (groups, n_codes, d)))


def assert_ranked(x, codes, ids, similarity, disabled=None):
    """Check ids against the float64 ranking; scores closer than fp32 rounding may come in either order."""
    x, codes = x.double(), codes.double()
    table = definition.scores(x, codes, similarity)
    if disabled is not None:
        table = table.masked_fill(disabled, -torch.inf)
    expected = definition.top_codes(table, ids.shape[-1])
    gap = (table.gather(-1, ids) - table.gather(-1, expected)).abs()
    largest = codes.norm(dim=-1).amax(-1) if similarity == "euclidean" else torch.ones(codes.shape[0])
    assert (gap <= 1e-6 * (x.norm(dim=-1) * largest).unsqueeze(-1)).all()
    assert all(len(set(row.tolist())) == ids.shape[-1] for row in ids.flatten(0, 1))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    ("k", "plan", "dtype"),
    [(k, plan, dtype) for k, plan in [(1, ONE_PASS), (3, MAXIMA)] for dtype in DTYPES] + [(1, MAXIMA, DTYPES[0]), (10, MAXIMA, DTYPES[0])],
)
def test_the_fused_path_equals_the_definition_on_exact_scores_with_many_ties(k, plan, dtype, similarity):
    x, codes = whole_numbers(5, 2, 299, 21, dtype)
    ids, _ = fused(x, codes, k, similarity, plan=plan)
    assert torch.equal(ids, defined(x, codes, k, similarity))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 100])
def test_the_chunk_path_equals_the_definition_on_exact_scores_with_many_ties(k, dtype, similarity):
    x, codes = whole_numbers(4, 2, 299, 21, dtype)
    _, ids = gpu.snap(x, codes, k, similarity, "nearest", None, path="chunk")
    assert torch.equal(ids, defined(x, codes, k, similarity))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16, 100, 128, 130])
def test_every_k_gives_the_float64_ranking_and_decodes_it(k):
    x, codes = torch.randn(5, 2, 30), torch.randn(2, 301, 30)
    out, ids = gpu.snap(x, codes, k, "euclidean", "nearest", "mean")
    assert_ranked(x, codes, ids, "euclidean")
    assert torch.equal(out, gpu.decode(ids, codes, "mean"))
    torch.testing.assert_close(out, definition.decode(ids, codes, "mean"))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("dtype", "k", "path"), [(t, k, p) for t in DTYPES for k, p in [(1, "fused"), (4, "fused"), (5, "chunk")]])
def test_other_numbers_give_the_float64_ranking(dtype, k, path, similarity):
    x, codes = torch.randn(4, 2, 40).to(dtype), torch.randn(2, 150, 40).to(dtype)
    _, ids = gpu.snap(x, codes, k, similarity, "nearest", None, path=path)
    assert_ranked(x, codes, ids, similarity)


@pytest.mark.parametrize(("k", "path", "plan"), [(1, "fused", ONE_PASS), (1, "fused", MAXIMA), (4, "fused", MAXIMA), (4, "chunk", None)])
def test_a_common_offset_costs_no_digits(k, path, plan):
    x, codes = torch.randn(6, 2, 48), torch.randn(2, 200, 48)
    expected = defined(x.double(), codes.double(), k)
    x, codes = x + 300, codes + 300
    ids = fused(x, codes, k, plan=plan)[0] if path == "fused" else gpu.snap(x, codes, k, "euclidean", "nearest", None, path=path)[1]
    same = (ids == defined(x.double(), codes.double(), k)).float().mean()
    assert same == 1
    assert (ids == expected).float().mean() > 0.9  # adding 300 rounds the data itself


@pytest.mark.parametrize("k", [1, 3])
def test_nearly_every_row_of_ordinary_data_is_proven(k):
    x, codes = torch.randn(20, 1, 64), torch.randn(1, 300, 64)
    ids, redone = fused(x, codes, k)
    assert redone.sum() <= 1
    assert torch.equal(ids, defined(x.double(), codes.double(), k))


@pytest.mark.parametrize(("k", "plan"), [(1, ONE_PASS), (1, MAXIMA), (3, MAXIMA)])
def test_codes_closer_than_bf16_can_tell(k, plan):
    """All three products of the split operands are needed, and then few rows are in doubt."""
    x, codes = torch.randn(8, 1, 64), torch.randn(1, 1, 64) + 0.01 * torch.randn(1, 300, 64)
    ids, redone = fused(x, codes, k, "inner_product", plan=plan)
    assert torch.equal(ids, defined(x.double(), codes.double(), k, "inner_product"))
    assert redone.sum() < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "plan"), [(1, ONE_PASS), (1, MAXIMA), (2, MAXIMA)])
def test_every_code_can_win(k, plan, dtype):
    """One row for each place: in whole tiles, in the last one, in its last block, which is not whole."""
    codes = 2 * torch.randn(1, 75, 64).sign().to(dtype)
    ids, _ = fused(codes[0].unsqueeze(1), codes, k, plan=plan)
    assert torch.equal(ids[:, 0, 0], torch.arange(75))


@pytest.mark.parametrize("wanted", [1, 2])
def test_an_equal_code_in_another_superblock_leaves_doubt(wanted):
    codes = torch.randn(1, 1200, 33)
    codes[0, 1100] = codes[0, 700] = codes[0, 300] = codes[0, 7]  # k + 1 of them are candidates of a row that is code 7
    ids, redone = fused(codes[:, 7:8], codes, wanted, plan=MAXIMA)
    assert redone.tolist() == [[1]]
    assert ids.tolist() == [[[7, 300][:wanted]]]


@pytest.mark.parametrize(("k", "plan"), [(1, ONE_PASS), (3, MAXIMA)])
def test_rows_that_cannot_be_proven_are_redone(k, plan):
    codes = torch.randn(1, 40, 33).repeat(1, 8, 1)  # every code eight times, in different blocks
    x = torch.randn(9, 1, 33)
    ids, redone = fused(x, codes, k, plan=plan)
    assert redone.tolist() == [[9]]
    assert torch.equal(ids, defined(x, codes, k))


@pytest.mark.parametrize("path", ["fused", "chunk"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "codes", [torch.ones(1, 200, 17), torch.zeros(1, 200, 17), torch.eye(17).repeat(12, 1).unsqueeze(0)], ids=["equal", "zero", "repeated"]
)
def test_codebooks_full_of_equal_codes(codes, k, similarity, path):
    x = torch.randint(-2, 3, (3, 1, 17)).float()
    _, ids = gpu.snap(x, codes, k, similarity, "nearest", None, path=path)
    assert torch.equal(ids, defined(x, codes, k, similarity))


def test_a_zero_code_scores_zero():
    x, codes = -torch.ones(2, 1, 16), torch.ones(1, 50, 16)
    codes[0, 37] = 0
    for path in ("fused", "chunk"):
        assert gpu.snap(x, codes, 1, "inner_product", "nearest", None, path=path)[1].unique().tolist() == [37]


@pytest.mark.parametrize("path", ["fused", "chunk"])
@pytest.mark.parametrize(("k", "similarity"), [(1, "euclidean"), (2, "inner_product"), (2, "euclidean")])
def test_disabled_codes_are_never_chosen(k, similarity, path):
    x, codes = whole_numbers(5, 2, 100, 20)
    disabled = torch.rand(1, 2, 100) < 0.5
    disabled[0, 1] = True
    disabled[0, 1, 50:52] = False  # only two are left, in one block
    _, ids = gpu.snap(x, codes, k, similarity, "nearest", None, disabled, path=path)
    assert torch.equal(ids, defined(x, codes, k, similarity, disabled=disabled))


@pytest.mark.parametrize("selection", ["nearest", "residual"])
@pytest.mark.parametrize("groups_alike", [False, True])
def test_codes_disabled_row_by_row(selection, groups_alike):
    x, codes = whole_numbers(4, 2, 90, 20)
    disabled = (torch.rand(4, 1 if groups_alike else 2, 90) < 0.7).expand(4, 2, 90)
    _, ids = gpu.snap(x, codes, 3, "euclidean", selection, None, disabled)
    assert torch.equal(ids, defined(x, codes, 3, "euclidean", selection, disabled))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("k", "path", "plan"), [(1, "fused", ONE_PASS), (1, "fused", MAXIMA), (3, "fused", MAXIMA), (3, "chunk", None)])
def test_numbers_that_are_not_finite_give_ids_in_range_and_spoil_no_other_row(k, path, plan, bad):
    x, codes = whole_numbers(4, 1, 75, 20)
    expected = defined(x, codes, k)
    x[1, 0, 3] = bad
    x[2] = bad
    ids = fused(x, codes, k, plan=plan)[0] if path == "fused" else gpu.snap(x, codes, k, "euclidean", "nearest", None, path=path)[1]
    assert ((ids >= 0) & (ids < 75)).all()
    assert torch.equal(ids[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("path", ["fused", "chunk"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_selection_subtracts_what_was_chosen(dtype, similarity, path):
    x, codes = whole_numbers(5, 2, 150, 24, dtype, largest=1)
    out, ids = gpu.snap(x * 3, codes, 4, similarity, "residual", "sum", path=path)
    assert torch.equal(ids, defined(x * 3, codes, 4, similarity, "residual"))
    assert torch.equal(out, gpu.decode(ids, codes, "sum"))
    assert torch.equal(out, definition.decode(ids, codes, "sum"))


@pytest.mark.parametrize("plan", [ONE_PASS, MAXIMA])
def test_residual_selection_far_from_zero(plan):
    x, codes = torch.randn(5, 2, 32) + 20, torch.randn(2, 100, 32) + 20
    ids, _ = fused(x, codes, 3, "euclidean", "residual", plan=plan)
    assert torch.equal(ids, defined(x.double(), codes.double(), 3, "euclidean", "residual"))


@pytest.mark.parametrize(("path", "dtype"), [("fused", torch.float32), ("fused", torch.bfloat16), ("chunk", torch.float32)])
def test_strides_do_not_matter(path, dtype):
    wide, codes = torch.randn(6, 40, 4).to(dtype), torch.randn(25, 2, 70).to(dtype)
    x, codes = wide.transpose(1, 2)[:, 1:3, 3:28], codes.permute(1, 2, 0)
    expected = gpu.snap(x.contiguous(), codes.contiguous(), 2, "euclidean", "nearest", "sum", path=path)
    actual = gpu.snap(x, codes, 2, "euclidean", "nearest", "sum", path=path)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(("k", "selection", "plan"), [(1, "nearest", ONE_PASS), (3, "nearest", MAXIMA), (2, "residual", ONE_PASS)])
def test_slabs_and_repetition_change_no_bit(k, selection, plan):
    x, codes = torch.randn(11, 2, 18), torch.randn(2, 70, 18)
    ids, redone = fused(x, codes, k, "euclidean", selection, plan=plan)
    again, _ = fused(x, codes, k, "euclidean", selection, plan=plan)
    in_slabs, redone_in_slabs = fused(x, codes, k, "euclidean", selection, plan=plan, workspace=1500)
    assert len(redone_in_slabs) > len(redone)
    assert torch.equal(ids, again)
    assert torch.equal(ids, in_slabs)


def test_mixed_dtypes():
    x, codes = torch.randn(5, 1, 24), torch.randn(1, 80, 24).bfloat16()
    for path in ("fused", "chunk"):
        out, ids = gpu.snap(x, codes, 2, "euclidean", "nearest", "sum", path=path)
        assert out.dtype == torch.bfloat16
        assert_ranked(x, codes, ids, "euclidean")


@pytest.mark.parametrize(("n_codes", "k"), [(5, 5), (9, 3), (1, 1), (33, 16), (100, 2)])
def test_few_codes(n_codes, k):
    x, codes = whole_numbers(3, 2, n_codes, 5)
    for path in ("fused", "chunk"):
        _, ids = gpu.snap(x, codes, k, "euclidean", "nearest", None, path=path)
        assert torch.equal(ids, defined(x, codes, k))


def test_no_rows():
    out, ids = gpu.snap(torch.empty(0, 2, 8), torch.ones(2, 9, 8), 3, "euclidean", "nearest", "sum")
    assert (out.shape, ids.shape) == ((0, 2, 8), (0, 2, 3))


def test_fp64_takes_the_definition():
    x, codes = torch.randn(3, 2, 8).double(), torch.randn(2, 9, 8).double()
    out, ids = gpu.snap(x, codes, 3, "euclidean", "residual", "mean")
    assert torch.equal(ids, defined(x, codes, 3, "euclidean", "residual"))
    torch.testing.assert_close(out, definition.decode(ids, codes, "mean"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(("n_slots", "d"), [(1, 7), (6, 530)])
def test_decode_counts_empty_slots_but_not_missing_ones(n_slots, d, reduce, dtype):
    codes = torch.randint(-4, 5, (3, 20, d)).to(dtype)
    ids = torch.randint(-2, 20, (5, 3, n_slots))
    ids[0, 0] = -1
    ids[1, 1] = -2
    out = gpu.decode(ids, codes, reduce)
    expected = definition.decode(ids, codes.float(), reduce)
    assert out.dtype == dtype
    if reduce == "sum":
        assert torch.equal(out.float(), expected)
    else:
        torch.testing.assert_close(out.float(), expected, rtol={torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6), atol=0)


@pytest.mark.parametrize("n_codes", [50, 1024, 2500])
@pytest.mark.parametrize("largest", [1, 10**6])
def test_row_select_ranks_a_table(n_codes, largest):
    """A largest of 1 makes so many equal scores that the first bound lets too many through."""
    table = torch.randint(-largest, largest + 1, (3, n_codes)).float()
    table[1] = -torch.inf
    table[2, ::3] = -0.0
    bias, mask = torch.randint(-1, 2, (n_codes,)).float(), torch.rand(3, n_codes) < 0.1
    ids = torch.empty(3, 40, dtype=torch.long)
    triton_select.select_scores(table, 40, torch.full((n_codes,), 2.0), bias, mask, ids)
    assert torch.equal(ids, definition.top_codes((table / 2 + bias).masked_fill(mask, -torch.inf), 40))
