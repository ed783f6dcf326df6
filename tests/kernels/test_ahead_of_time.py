"""Compile the launches of real sizes for an H200 and read the machine code: tensor cores in use, no register spilled. Needs no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.ahead_of_time import compiled, recorded
from tl_codebook.snap import gpu, triton_common, triton_decode, triton_fused, triton_select

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_common.interpreted(), reason="the kernels are interpreted in this process"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE, SMALL = 227 * 1024, 99 * 1024  # bytes of shared memory for a program: H100 and H200; RTX 3090 and 4090
CASES = [
    # rows, groups, codes, d_group, k, dtype, similarity, selection
    (16384, 12, 10000, 64, 8, BF16, "inner_product", "nearest"),
    (16384, 16, 1000, 64, 1, BF16, "euclidean", "nearest"),
    (16384, 32, 8192, 128, 1, BF16, "inner_product", "nearest"),
    (16384, 1, 8192, 256, 16, BF16, "euclidean", "nearest"),
    (16384, 12, 8191, 65, 3, FP16, "inner_product", "nearest"),
    (16384, 12, 10000, 64, 8, FP32, "inner_product", "nearest"),
    (16384, 12, 10000, 64, 8, FP32, "euclidean", "nearest"),
    (16384, 16, 1000, 64, 1, FP32, "euclidean", "nearest"),
    (16384, 1, 16384, 256, 16, FP32, "euclidean", "nearest"),
    (16384, 12, 1001, 63, 4, FP32, "euclidean", "residual"),
    (16384, 12, 1000, 64, 4, BF16, "inner_product", "residual"),
    (16, 12, 10000, 64, 1, BF16, "inner_product", "nearest"),
    (16, 12, 10000, 64, 8, FP32, "euclidean", "nearest"),
    (16, 1, 50000, 64, 1, FP32, "euclidean", "nearest"),
    (16, 1, 50000, 96, 1, BF16, "euclidean", "nearest"),
]
OLDER = [case for case in CASES if case[3:5] in ((64, 1), (64, 8))]


def name_of(case):
    return "-".join(str(part).removeprefix("torch.") for part in case)


def launches_of(case):
    n, groups, n_codes, d, k, dtype, similarity, selection = case
    x, codes = torch.empty(n, groups, d, dtype=dtype, device="meta"), torch.empty(groups, n_codes, d, dtype=dtype, device="meta")
    with recorded() as launches:
        ids, _ = triton_fused.select(x, codes, k, similarity, selection, None, gpu.WORKSPACE)
        triton_decode.decode(ids, codes, "mean")
    first = {}
    for launch in launches:  # slabs and choices repeat the same kernels
        first.setdefault((launch.name, *(launch.kwargs.get(name) for name in ("PRECISION", "LISTED", "SUBTRACT", "SPLIT"))), launch)
    return list(first.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_launched_compiles_to_good_code(case):
    for launch in launches_of(case):
        made = compiled(launch)
        allowed = 16 if launch.kwargs.get("PRECISION") == "exact" else 0  # rare rows only; Triton 3.6 puts 8 bytes on the stack there
        assert made.stack <= allowed, f"{made} spills registers"
        assert made.shared <= LARGE, made
        if launch.kwargs.get("PRECISION") in ("direct", "split"):
            assert made.tensor_core > 0, f"{made} does not use the tensor cores"
            assert made.shuffles <= 64, f"{made} exchanges scores between threads"


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("case", OLDER, ids=name_of)
def test_cards_with_less_shared_memory_get_smaller_tiles(case, capability, monkeypatch):
    monkeypatch.setattr(triton_fused, "_shared_memory", lambda device: SMALL)
    for launch in launches_of(case):
        if "PRECISION" in launch.kwargs and not launch.kwargs["LISTED"]:
            made = compiled(launch, capability)
            assert made.stack == 0, f"{made} spills registers"
            assert made.shared <= SMALL, made


@pytest.mark.parametrize(("n_codes", "k"), [(10000, 100), (65536, 64), (1000, 128), (300, 1)])
@pytest.mark.parametrize("euclidean", [False, True])
def test_row_select_compiles_without_spilling(n_codes, k, euclidean):
    table = torch.empty(1024, n_codes, device="meta")
    per_code, ids = torch.empty(n_codes, device="meta"), torch.empty(1024, k, dtype=torch.long, device="meta")
    with recorded() as launches:
        triton_select.select_scores(table, k, None if euclidean else per_code, per_code if euclidean else None, None, ids)
    assert [compiled(launch).stack for launch in launches] == [0]
