"""The snap at real sizes on a GPU: against float64, twice for equal bits, within its workspace."""

import pytest
import torch

from tl_codebook.snap import definition, gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CASES = [
    # rows, groups, codes, d_group, k, dtype, selection
    (4096, 12, 10000, 64, 8, torch.bfloat16, "nearest"),
    (4096, 12, 10000, 64, 8, torch.float32, "nearest"),
    (4096, 16, 1000, 64, 1, torch.float32, "nearest"),
    (4096, 2, 40000, 128, 1, torch.bfloat16, "nearest"),
    (4096, 4, 1001, 63, 4, torch.float32, "residual"),
    (4096, 1, 10000, 768, 100, torch.bfloat16, "nearest"),
    (4096, 1, 10000, 768, 100, torch.float32, "nearest"),
    (1000, 1, 65536, 1024, 64, torch.bfloat16, "nearest"),
    (300, 1, 16384, 512, 200, torch.float32, "nearest"),
    (7, 12, 10000, 64, 1, torch.bfloat16, "nearest"),
    (7, 3, 999, 50, 16, torch.float16, "nearest"),
]


def data(case, offset=0.0):
    n, groups, n_codes, d, _, dtype, _ = case
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, groups, d, device="cuda", generator=generator) + offset
    codes = torch.randn(groups, n_codes, d, device="cuda", generator=generator) + offset
    return x.to(dtype), codes.to(dtype)


def share_of_wrong_ids(x, codes, ids, similarity):
    """Compare some rows with float64; scores closer than fp32 rounding may come in either order."""
    rows = slice(0, 200)
    table = definition.scores(x[rows].double(), codes.double(), similarity)
    expected = definition.top_codes(table, ids.shape[-1])
    gap = (table.gather(-1, ids[rows]) - table.gather(-1, expected)).abs()
    length = codes.double().norm(dim=-1).amax(-1) if similarity == "euclidean" else torch.ones(codes.shape[0], device="cuda")
    return (gap > 1e-6 * (x[rows].double().norm(dim=-1) * length).unsqueeze(-1)).double().mean().item()


@pytest.mark.parametrize("similarity", ["euclidean", "inner_product"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_rank_as_float64_and_repeat_bit_for_bit(case, similarity):
    k, selection = case[4], case[6]
    x, codes = data(case)
    out, ids = gpu.snap(x, codes, k, similarity, selection, "mean")
    if selection == "nearest":
        assert share_of_wrong_ids(x, codes, ids, similarity) == 0
    else:
        expected = definition.residual_codes(x[:200].double(), codes.double(), k, similarity)
        assert (ids[:200] == expected).double().mean() > 0.999
    torch.testing.assert_close(out[:50].float(), definition.decode(ids[:50], codes.float(), "mean"), rtol=2**-7, atol=1e-5)
    again = gpu.snap(x, codes, k, similarity, selection, "mean")
    assert torch.equal(out, again[0])
    assert torch.equal(ids, again[1])
    assert torch.equal(out, gpu.decode(ids, codes, "mean"))


@pytest.mark.parametrize("case", [case for case in CASES if case[5] == torch.float32 and case[6] == "nearest"], ids=str)
def test_a_common_offset_costs_no_digits(case):
    x, codes = data(case, offset=300.0)
    _, ids = gpu.snap(x, codes, case[4], "euclidean", "nearest", None)
    centre = codes.double().mean(1)
    assert share_of_wrong_ids(x.double() - centre, codes.double() - centre.unsqueeze(1), ids, "euclidean") == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_stays_within_the_workspace(case):
    x, codes = data(case)
    run = lambda: gpu.snap(x, codes, case[4], "euclidean", case[6], "mean")  # noqa: E731
    out, ids = run()
    kept = out.nbytes + ids.nbytes
    del out, ids
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    used = torch.cuda.max_memory_allocated() - before - kept
    copies = 3 * codes.numel() * 4  # of the codebook: fp32, shifted, split
    assert used <= gpu.WORKSPACE * 1.05 + copies, f"{used / 2**20:.0f} MiB"
    del result


def test_the_fused_path_waits_for_nothing():
    """A CUDA graph cannot hold anything that waits for the GPU."""
    x, codes = data(CASES[1])
    expected = gpu.snap(x, codes, 8, "euclidean", "nearest", None)[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, ids = gpu.snap(x, codes, 8, "euclidean", "nearest", None)
    graph.replay()
    assert torch.equal(ids, expected)


def test_tf32_does_not_reach_the_scores():
    case = CASES[6]
    x, codes = data(case)
    expected = gpu.snap(x, codes, case[4], "inner_product", "nearest", None)[1]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(gpu.snap(x, codes, case[4], "inner_product", "nearest", None)[1], expected)
    finally:
        torch.set_float32_matmul_precision(before)
