"""The snap on a GPU: which path serves which sizes, and the paths that need no kernel of their own.

* ``fused``: scores never reach memory (`tl_codebook.snap.triton_fused`).
* ``chunk``: a matrix product fills a table of fixed size with the scores of some rows, and a kernel (or, without Triton or above k = 128,
  `definition.top_codes`) chooses from it.
* ``definition``: `tl_codebook.snap.definition` itself, some rows at a time; for fp64.

Without Triton, or on a card without bf16 tensor cores, everything is ``chunk`` or ``definition``. Nothing here waits for the GPU.

Axes: ``row group slot code k d_group``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap import definition
from tl_codebook.snap.centre import centre

__all__ = ["WORKSPACE", "decode", "path_for", "snap"]

WORKSPACE = 128 * 2**20  # bytes held at once beside inputs, outputs and copies of the codebook

# Modelled for an H200, not measured.
_FUSED_LARGEST_D = 256  # above, the fused kernels lose to a library matrix product
_FUSED_LARGEST_K = 16  # above, scoring the candidate blocks again costs as much as finding them
_FUSED_LARGEST_CODES = 16384  # for k > 1: block maxima of a row that one program holds in registers
_SELECT_LARGEST_K = 128  # what the row-select kernel ranks
_DEFINITION_BYTES = 48  # a score, its int64 key and what sorting them takes


class _Kernels(NamedTuple):
    fused: ModuleType
    select: ModuleType
    decode: ModuleType


def _kernels(x: Tensor) -> _Kernels | None:
    """Import the kernels that can run where x is; None where there are none."""
    if x.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return None
    try:
        from tl_codebook.snap import triton_common, triton_decode, triton_fused, triton_select
    except ImportError:
        return None
    return _Kernels(triton_fused, triton_select, triton_decode) if x.is_cuda or triton_common.interpreted() else None


def path_for(n_codes: int, d_group: int, k: int, dtype: torch.dtype, selection: str, per_row: bool, kernels: bool) -> str:
    """Name the path that serves these sizes: fused, chunk or definition.

    Args:
        per_row: Codes are disabled row by row.
        kernels: Triton can run.

    >>> path_for(10_000, 64, 8, torch.bfloat16, "nearest", per_row=False, kernels=True)
    'fused'
    >>> path_for(10_000, 768, 100, torch.bfloat16, "nearest", per_row=False, kernels=True)
    'chunk'
    """
    if dtype == torch.float64:
        return "definition"
    if not kernels or per_row or d_group > _FUSED_LARGEST_D:
        return "chunk"
    if k == 1 or selection == "residual":
        return "fused"
    return "fused" if k <= _FUSED_LARGEST_K and n_codes <= _FUSED_LARGEST_CODES else "chunk"


@torch.no_grad()
def snap(
    x: Float[Tensor, "row group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    selection: str,
    reduce: str | None,
    disabled: Bool[Tensor, "#row group code"] | None = None,
    path: str | None = None,
) -> tuple[Float[Tensor, "row group d_group"] | None, Int[Tensor, "row group k"]]:
    """Choose k codes for every row and, unless `reduce` is None, decode them.

    Args:
        disabled: Codes never chosen, for all rows (one row) or row by row; at least k must be left.
        path: A path by name, instead of `path_for`.

    >>> snap(torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), 1, "euclidean", "nearest", "sum")
    (tensor([[[2., 2.]]]), tensor([[[1]]]))
    """
    kernels = _kernels(x)
    n_rows, n_codes = x.shape[0], codes.shape[1]
    per_row = disabled is not None and disabled.shape[0] != 1
    dtype = torch.promote_types(x.dtype, codes.dtype)
    path = path or path_for(n_codes, x.shape[-1], k, dtype, selection, per_row, kernels is not None)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(), torch.autocast(x.device.type, enabled=False):
        if n_rows == 0:
            ids = torch.empty(0, codes.shape[0], k, dtype=torch.long, device=x.device)
        elif path == "fused" and kernels is not None:
            everywhere = None if disabled is None else disabled[0]
            ids = kernels.fused.select(x, codes, k, similarity, selection, everywhere, WORKSPACE)[0]
        elif path == "chunk":
            ids = _chunk(x, codes, k, similarity, selection, disabled, kernels)
        else:
            ids = definition.choose_in_parts(x, codes, k, similarity, selection, disabled, WORKSPACE // _DEFINITION_BYTES)
        return None if reduce is None else decode(ids, codes, reduce), ids


@torch.no_grad()
def decode(
    ids: Int[Tensor, "row group slot"], codes: Float[Tensor, "group code d_group"], reduce: str
) -> Float[Tensor, "row group d_group"]:
    """Sum or average the codes of the ids in the order of the slots, in fp32; -1 is an empty slot, -2 no slot at all.

    >>> decode(torch.tensor([[[1, -1]]]), torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), "mean")
    tensor([[[1., 1.]]])
    """
    kernels = _kernels(codes)
    if kernels is not None and codes.dtype != torch.float64:
        with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():
            out: Tensor = kernels.decode.decode(ids, codes, reduce)
            return out
    total = torch.zeros(*ids.shape[:2], codes.shape[-1], dtype=_fp32_or_64(codes.dtype), device=codes.device)
    group = torch.arange(codes.shape[0], device=codes.device)
    for slot in ids.unbind(-1):
        total += torch.where((slot >= 0).unsqueeze(-1), codes[group, slot.clamp(min=0)], 0)
    if reduce == "mean":
        total /= (ids > -2).sum(-1, keepdim=True).clamp(min=1)
    return total.to(codes.dtype)


def _fp32_or_64(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(n_rows: int, bytes_per_row: int) -> Iterator[slice]:
    at_once = max(1, WORKSPACE // bytes_per_row)
    return (slice(i, min(i + at_once, n_rows)) for i in range(0, n_rows, at_once))


def _chunk(
    x: Float[Tensor, "row group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    selection: str,
    disabled: Bool[Tensor, "#row group code"] | None,
    kernels: _Kernels | None,
) -> Int[Tensor, "row group k"]:
    """Choose from score tables of a fixed size, group after group."""
    n_rows, n_groups, d = x.shape
    n_codes = codes.shape[1]
    residual = selection == "residual" and k > 1
    n_best = 1 if residual else k
    if n_best > _SELECT_LARGEST_K:
        kernels = None
    ids = torch.empty(n_rows, n_groups, k, dtype=torch.long, device=x.device)
    bytes_per_row = (4 if kernels else _DEFINITION_BYTES) * n_codes + 4 * d * (1 + residual) + 8 * 256
    table = torch.empty(0, device=x.device)
    with _without_tf32():
        for group in range(n_groups):
            scorer = _Scorer(x.dtype, codes[group], similarity, residual)
            for rows in _slices(n_rows, bytes_per_row):
                out, rest = ids[rows, group], x[rows, group]
                if not len(table):
                    table = torch.empty(rows.stop - rows.start, n_codes, dtype=torch.float32, device=x.device)
                mask = None if disabled is None else disabled[rows if len(disabled) > 1 else slice(None), group].expand(len(rest), n_codes)
                for choice in range(k if residual else 1):
                    if choice:
                        rest = rest.float() - codes[group][out[:, choice - 1]]
                    scores = scorer.products(rest, table[: len(rest)])
                    if kernels is not None:
                        kernels.select.select_scores(scores, n_best, scorer.divisor, scorer.bias, mask, out[:, choice : choice + n_best])
                        continue
                    if scorer.divisor is not None:
                        scores.div_(scorer.divisor)
                    if scorer.bias is not None:
                        scores.add_(scorer.bias)
                    if mask is not None:
                        scores.masked_fill_(mask, -torch.inf)
                    out[:, choice : choice + n_best] = definition.top_codes(scores, n_best)
    return ids


class _Scorer:
    """Products of rows with the codes of one group; ``products / divisor + bias`` are scores.

    fp32 scores of distant points are computed from a centre near them. Not so for bf16: its 8 bits do not hold what that would save.
    """

    def __init__(self, dtype: torch.dtype, codes: Float[Tensor, "code d_group"], similarity: str, residual: bool) -> None:
        euclidean = similarity == "euclidean"
        half = torch.bfloat16 if euclidean else dtype
        self.direct = codes.is_cuda and not residual and dtype == codes.dtype == half and half != torch.float32 and _OUT_DTYPE
        self.middle = centre(codes.unsqueeze(0))[0] if euclidean and not self.direct else None
        self.codes = codes if self.direct else codes.float() if self.middle is None else codes.float() - self.middle
        self.divisor = self.bias = None
        if euclidean:
            self.bias = torch.linalg.vecdot(self.codes.float(), self.codes.float()) / -2
        else:
            norm = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float32)
            self.divisor = torch.where(norm > 0, norm, 1.0)

    def products(self, x: Float[Tensor, "row d_group"], out: Float[Tensor, "row code"]) -> Float[Tensor, "row code"]:
        if self.direct:
            return torch.mm(x, self.codes.T, out_dtype=torch.float32, out=out)  # a bf16 result would have 8 bits
        x = x.float() if self.middle is None else x.float() - self.middle
        return torch.mm(x, self.codes.T, out=out)


_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32: TF32 (a process-wide setting) would choose other codes in one row of a thousand."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the setting was made through the newer interface, and the older one refuses to speak of it
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
