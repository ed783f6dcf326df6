"""Which path serves what, and the paths that need no kernel: they run on any machine."""

import subprocess
import sys

import pytest
import torch

from tl_codebook.snap import definition, gpu

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("n_codes", "d_group", "k", "dtype", "selection", "expected"),
    [
        (10_000, 64, 8, BF16, "nearest", "fused"),
        (10_000, 64, 8, FP32, "nearest", "fused"),
        (1_000_000, 256, 1, FP32, "nearest", "fused"),
        (16_384, 256, 16, FP32, "nearest", "fused"),
        (16_385, 64, 2, FP32, "nearest", "chunk"),
        (10_000, 64, 17, FP32, "nearest", "chunk"),
        (1_000_000, 64, 100, FP32, "residual", "fused"),
        (10_000, 257, 1, BF16, "nearest", "chunk"),
        (10_000, 768, 100, BF16, "nearest", "chunk"),
        (10_000, 64, 10_000, FP32, "nearest", "chunk"),
        (10_000, 64, 1, FP64, "nearest", "definition"),
    ],
)
def test_sizes_choose_the_path(n_codes, d_group, k, dtype, selection, expected):
    assert gpu.path_for(n_codes, d_group, k, dtype, selection, per_row=False, kernels=True) == expected
    without = "definition" if dtype == FP64 else "chunk"
    assert gpu.path_for(n_codes, d_group, k, dtype, selection, per_row=False, kernels=False) == without
    assert gpu.path_for(n_codes, d_group, k, dtype, selection, per_row=True, kernels=True) == without


@pytest.mark.parametrize("path", ["chunk", "definition"])
@pytest.mark.parametrize("selection", ["nearest", "residual"])
@pytest.mark.parametrize("similarity", ["euclidean", "inner_product"])
@pytest.mark.parametrize("workspace", [gpu.WORKSPACE, 20_000])
def test_the_paths_without_kernels_equal_the_definition(path, selection, similarity, workspace, monkeypatch):
    monkeypatch.setattr(gpu, "WORKSPACE", workspace)
    x, codes = torch.randint(-1, 2, (30, 2, 24)).float() * 3, torch.randint(-1, 2, (2, 90, 24)).float()
    for disabled in (None, torch.rand(1, 2, 90) < 0.5, torch.rand(30, 2, 90) < 0.5):
        out, ids = gpu.snap(x, codes, 4, similarity, selection, "mean", disabled, path=path)
        choose = definition.residual_codes if selection == "residual" else definition.nearest_codes
        assert torch.equal(ids, choose(x, codes, 4, similarity, disabled))
        torch.testing.assert_close(out, definition.decode(ids, codes, "mean"))


@pytest.mark.parametrize("k", [1, 130, 200])
def test_any_k(k):
    x, codes = torch.randint(-2, 3, (4, 2, 24)).float(), torch.randint(-2, 3, (2, 200, 24)).float()
    _, ids = gpu.snap(x, codes, k, "euclidean", "nearest", None)
    assert torch.equal(ids, definition.nearest_codes(x, codes, k, "euclidean"))


def test_a_common_offset_costs_no_digits_on_the_chunk_path():
    x, codes = torch.randn(20, 2, 48) + 300, torch.randn(2, 200, 48) + 300
    _, ids = gpu.snap(x, codes, 4, "euclidean", "nearest", None, path="chunk")
    assert torch.equal(ids, definition.nearest_codes(x.double(), codes.double(), 4, "euclidean"))


def test_tf32_is_off_during_the_products_and_back_after():
    torch.set_float32_matmul_precision("high")
    try:
        with gpu._without_tf32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_decode_counts_empty_slots_but_not_missing_ones(reduce):
    codes, ids = torch.randn(3, 20, 9), torch.randint(-2, 20, (5, 3, 6))
    ids[0, 0], ids[1, 1] = -1, -2
    torch.testing.assert_close(gpu.decode(ids, codes, reduce), definition.decode(ids, codes, reduce))


def test_triton_is_not_imported_for_the_cpu_and_not_needed():
    """Nothing but the kernels needs triton: with none to import, the chunk path runs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from tl_codebook.snap import gpu\n"
        "print(gpu.snap(torch.ones(1, 1, 2), torch.eye(2)[None], 2, 'euclidean', 'nearest', 'sum')[1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[[0, 1]]]", done.stderr
