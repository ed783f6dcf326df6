"""Candidates in bf16 with a proof per row, against float64 and against the product in fp32; without the hardware bf16 is emulated."""

import pytest
import torch

from tests.unit.test_snap import BOTH, SIMILARITIES, normal
from tests.unit.test_snap_contract import assert_chosen
from tl_codebook.snap import cpu, definition, halves, snap

EACH_K = pytest.mark.parametrize("k", [1, 8, 16])


@pytest.fixture
def fp32(monkeypatch):
    """Leave the limits to the test: shapes below them are fast, and prove as much."""
    monkeypatch.setattr(halves, "supported", lambda: False)
    monkeypatch.setattr(halves, "worth_it", lambda n_rows, n_codes, d_group, k, selection: selection == "nearest" or k == 1)

    def ids(*args):
        return cpu.snap(*args, "nearest", None)[1]

    return ids


@pytest.fixture
def bf16(fp32, monkeypatch):
    """Return ids by way of bf16, and how many rows had to be done again."""

    def ids(*args, give_up=False):
        done_again, original = [], cpu._proven
        with monkeypatch.context() as patch:
            patch.setattr(halves, "supported", lambda: True)
            patch.setattr(cpu, "_proven", lambda *args: done_again.append(original(*args)))
            if not give_up:
                patch.setattr(cpu, "_MOST_UNPROVEN", 1.0)
            result = cpu.snap(*args, "nearest", None)[1]
        return result, sum(done_again) if done_again else None

    return ids


def clustered(n_rows=80, d_group=32, n_codes=1003, spread=1e-3):
    """Rows next to 300 codes that bf16 cannot tell apart, among others that keep the mean away."""
    codes = normal(1, n_codes, d_group, seed=1)
    codes[:, 500:800] = normal(d_group, seed=2) * 2 + spread * normal(300, d_group, seed=3)
    return codes[:, 600:601].transpose(0, 1) + 0.5 * normal(n_rows, 1, d_group, seed=4), codes


def offset(n_rows=80, d_group=32, n_codes=1003):
    shift = 100 * normal(d_group, seed=5)
    return normal(n_rows, 1, d_group) + shift, normal(1, n_codes, d_group, seed=1) + shift


def outlier(n_rows=80, d_group=32, n_codes=1003):
    x, codes = normal(n_rows, 1, d_group), normal(1, n_codes, d_group, seed=1)
    x[..., 3], codes[..., 3] = 1000 + x[..., 3], 1000 * (1 + 1e-3 * codes[..., 3])
    return x, codes


HARD = {"below the resolution": clustered, "common offset": offset, "outlier": outlier}


@BOTH
@EACH_K
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_are_those_of_fp32_and_most_rows_are_proven(bf16, fp32, k, similarity, dtype):
    x, codes = normal(150, 2, 64, dtype=dtype), normal(2, 1003, 64, seed=1, dtype=dtype)
    ids, done_again = bf16(x, codes, k, similarity)
    assert done_again is not None
    assert done_again < 0.1 * 300
    assert torch.equal(ids, fp32(x, codes, k, similarity))
    assert_chosen(x, codes, ids, similarity, "nearest")


@BOTH
def test_at_the_size_from_which_it_is_used(monkeypatch, similarity):
    x, codes = normal(512, 1, 256), normal(1, 4096, 256, seed=1)
    slow = snap(x, codes, 8, similarity=similarity, selection="nearest")
    used, original = [], cpu._proven
    monkeypatch.setattr(halves, "supported", lambda: True)
    monkeypatch.setattr(cpu, "_proven", lambda *args: used.append(original(*args)))
    out, ids = snap(x, codes, 8, similarity=similarity, selection="nearest")
    assert used
    assert sum(used) < 26
    assert torch.equal(ids, slow[1])
    assert torch.equal(out, slow[0])


@BOTH
@EACH_K
@pytest.mark.parametrize("kind", HARD)
def test_rows_that_bf16_cannot_tell_are_done_again(bf16, k, similarity, kind):
    x, codes = HARD[kind]()
    ids, done_again = bf16(x, codes, k, similarity)
    assert_chosen(x, codes, ids, similarity, "nearest")
    if kind == "below the resolution":
        assert done_again == len(x)


@BOTH
def test_without_the_proof_they_would_be_wrong(bf16, monkeypatch, similarity):
    x, codes = clustered()
    monkeypatch.setattr(halves, "_highest_outside", lambda x, *_: torch.full((len(x),), -torch.inf))
    ids, done_again = bf16(x, codes, 8, similarity)
    assert done_again == 0
    with pytest.raises(AssertionError):
        assert_chosen(x, codes, ids, similarity, "nearest")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e18, 1e30])
def test_no_code_outside_exceeds_the_bound(with_bias, scale):
    """Whatever the lowest candidate: for each code taken as that one, all codes that score no more in bf16 stay below."""
    codes, x = normal(300, 40, seed=1), normal(20, 40) * scale
    sizes, bias = normal(300, seed=2).abs() + 0.5, 10 * normal(300, seed=3) if with_bias else None
    halved = halves.halve(codes, sizes, bias)
    x_half = torch.ones(20, halved.codes.shape[1], dtype=torch.bfloat16)
    x_half[:, :40] = x
    scores = (x_half @ halved.codes.t())[:, :300].float()
    truth = x.double() @ codes.double().t() * sizes.double() - (0 if bias is None else bias.double())
    order = scores.argsort(1)
    highest = truth.gather(1, order).cummax(1).values  # of the codes up to this one
    for place in range(0, 300, 7):
        lowest = scores.gather(1, order[:, place : place + 1]).squeeze(1)
        bound = halves._highest_outside(x, x_half, halved, lowest)
        assert ((bound.double() >= highest[:, place]) | (lowest <= 0)).all()


@BOTH
@EACH_K
def test_equal_codes_go_to_the_lowest_id(bf16, fp32, k, similarity):
    codes = normal(1, 1003, 32, seed=1)
    codes[:, 700:1000] = codes[:, :300].flip(1)
    codes[:, 300:340] = codes[:, 3:4]  # more than there are candidates
    x = normal(80, 1, 32)
    x[:20] = codes[0, 3] + 0.1 * x[:20]
    ids, done_again = bf16(x, codes, k, similarity)
    assert 0 < done_again < 80
    assert torch.equal(ids, fp32(x, codes, k, similarity))
    assert torch.equal(ids[:20, 0, 0], torch.full((20,), 3))


def test_equal_codes_get_equal_products_wherever_they_stand():
    matrix, x = normal(1, 257).repeat(500, 1), normal(40, 257, seed=1)
    ids = torch.stack([torch.randperm(500, generator=torch.Generator().manual_seed(i))[:13].sort().values for i in range(40)])
    scores = halves._products(x, matrix, ids)
    assert (scores == scores[:, :1]).all()
    assert torch.allclose(scores.double(), (x.double() @ matrix.double().t())[:, :13], atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [1, 10, 40])
def test_the_candidates_are_the_highest_where_these_are_positive(n, sign):
    scores = normal(30, 1008).bfloat16()
    scores[:5] = scores[:5].abs() * sign
    scores[5, 100:] = -1.0
    ids, lowest = halves._candidates(scores.view(torch.int16), n)
    assert ((ids >= 0) & (ids < 1008)).all()
    assert (ids.diff(dim=1) > 0).all()
    edge = torch.from_numpy(lowest.astype("int16")).view(torch.bfloat16)
    positive = edge > 0
    assert positive[6:].all()
    assert positive[0] == (sign == 1)
    wanted = scores.float().topk(n, 1).values
    found = scores.float().gather(1, ids).sort(1, descending=True).values
    assert torch.equal(found[positive], wanted[positive])
    assert torch.equal(edge.float()[positive], wanted[positive][:, -1])


@BOTH
def test_where_few_rows_are_proven_all_go_by_fp32(bf16, fp32, similarity):
    x, codes = clustered()
    ids, done_again = bf16(x, codes, 8, similarity, give_up=True)
    assert done_again is None
    assert torch.equal(ids, fp32(x, codes, 8, similarity))


@BOTH
@EACH_K
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1e15, 1e30])
def test_zeros_and_extreme_sizes(bf16, fp32, k, similarity, scale):
    x, codes = normal(80, 1, 32) * scale, normal(1, 1003, 32, seed=1)
    assert torch.equal(bf16(x, codes, k, similarity)[0], fp32(x, codes, k, similarity))


@BOTH
@EACH_K
def test_rows_without_an_order_leave_the_others_alone(bf16, fp32, k, similarity):
    x, codes = normal(80, 1, 32), normal(1, 1003, 32, seed=1)
    expected = fp32(x, codes, k, similarity)
    x[0], x[1, 0, 5], x[2, 0, 5], x[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    ids, _ = bf16(x, codes, k, similarity)
    assert ((ids >= 0) & (ids < 1003)).all()
    assert torch.equal(ids[4:], expected[4:])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_codes_without_an_order_do_not_crash(bf16, similarity):
    x, codes = normal(80, 1, 32), normal(1, 1003, 32, seed=1)
    codes[:, 7], codes[:, 8] = torch.nan, torch.inf
    ids, _ = bf16(x, codes, 8, similarity)
    assert ((ids >= 0) & (ids < 1003)).all()


def test_disabled_codes_and_several_residual_codes_go_by_fp32(bf16, monkeypatch):
    monkeypatch.setattr(halves, "supported", lambda: True)
    monkeypatch.setattr(halves, "nearest", lambda *_: pytest.fail("went by bf16"))
    x, codes = normal(80, 1, 32), normal(1, 1003, 32, seed=1)
    disabled = torch.zeros(1, 1, 1003, dtype=torch.bool)
    cpu.snap(x, codes, 2, "euclidean", "nearest", None, disabled)
    cpu.snap(x, codes, 2, "euclidean", "residual", None)


def test_the_limits():
    assert halves.worth_it(1536, 10_000, 768, 8, "nearest")
    assert halves.worth_it(1536, 10_000, 768, 1, "residual")
    for worse in [
        (1535, 10_000, 768, 8, "nearest"),
        (1536, 1000, 768, 8, "nearest"),
        (1536, 2**21, 768, 8, "nearest"),
        (1536, 10_000, 64, 8, "nearest"),
        (1536, 10_000, 768, 17, "nearest"),
        (1536, 10_000, 768, 2, "residual"),
    ]:
        assert not halves.worth_it(*worse)


def test_torch_without_the_private_questions(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not halves.supported()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert halves.supported() == torch.backends.mkldnn.is_available()


def test_in_inference_mode_and_in_threads(bf16):
    x, codes = normal(600, 1, 32), normal(1, 4096, 32, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            ids, done_again = bf16(x, codes, 8, "euclidean")
            assert torch.equal(bf16(x, codes, 8, "euclidean")[0], ids)
    finally:
        torch.set_num_threads(before)
    assert done_again is not None
    assert torch.equal(ids, definition.nearest_codes(x.double(), codes.double(), 8, "euclidean"))


def assert_bounded(x, code):
    """The code scores 2 in bf16 and more in truth; the other one keeps the mean at zero."""
    halved = halves.halve(torch.stack([code, -code]), None, None)
    x_half = x.bfloat16().unsqueeze(0)
    assert (x_half @ halved.codes.t())[0, 0] == 2
    bound = halves._highest_outside(x.unsqueeze(0), x_half, halved, torch.tensor([2.0]))
    assert 2.05 < (x.double() @ code.double()).item() <= bound.item() < 2.2


def test_the_bound_holds_what_bf16_took_from_rows_and_from_codes():
    shrunk = torch.cat([torch.full((17,), 1.0038), torch.full((15,), 0.9982)])  # all of these are 1 in bf16
    signs = torch.cat([torch.ones(17), -torch.ones(15)])
    assert_bounded(shrunk, signs)
    assert_bounded(signs, shrunk)


def test_a_candidate_that_is_not_positive_proves_nothing():
    """The bits of negative numbers run backwards: the 24 candidates are the 9 above zero and those furthest below, without the best 8th."""
    codes = torch.zeros(1003, 3)
    codes[:6, 0], codes[6:22, 0] = 100, -37.5
    codes[22, 2] = 0.01
    codes[23] = torch.tensor([-20, 20, -0.03])  # -0.03 in bf16, 0.03 in truth
    codes[24] = -codes[23]
    codes[25:1001, 2] = -0.001
    codes[1001, 2] = 0.976
    codes = torch.cat([codes[:1001].flip(0), codes[1001:]])
    x = torch.tensor([[1.0, 1.003, 1.0]])
    ids, left = halves.nearest(x, codes, None, None, halves.halve(codes, None, None), 8)
    assert set((x @ codes.t()).topk(8).indices[0].tolist()) != set(ids[0].tolist())
    assert left.tolist() == [0]


def test_no_score_is_read_beyond_the_codes(monkeypatch):
    asked, original = [], halves._products
    monkeypatch.setattr(halves, "_products", lambda x, matrix, ids: asked.append(ids.max()) or original(x, matrix, ids))
    matrix = normal(1003, 32, seed=1)
    halved = halves.halve(matrix, None, None)
    for x in (torch.zeros(40, 32), torch.full((40, 32), torch.nan), 1e-30 * normal(40, 32)):
        ids, left = halves.nearest(x, matrix, None, None, halved, 8)
        assert len(left) == 40
        assert ((ids >= 0) & (ids < 1003)).all()
    assert max(asked) < 1003
