"""The kernel that turns ids back into vectors.

Axes: ``row group slot code d_group``.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.snap.triton_common import at_least

__all__ = ["decode", "decode_kernel"]

_ELEMENTS = 1024  # of one program's tile
_WIDEST = 512


@triton.jit
@no_type_check
def decode_kernel(
    ids, codes, out, n_rows, n_groups, n_slots, d, code_group, code_code, code_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Add the codes of each row's slots in the order of the slots, in fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < n_rows
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    codes += ((row % n_groups) * code_group)[:, None] + at[None, :] * code_step
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    counted = tl.zeros((ROWS,), tl.int32)
    for slot in range(0, n_slots):
        code = tl.load(ids + row * n_slots + slot, mask=here, other=-2)
        mask = (code >= 0)[:, None] & (at < d)[None, :]
        total += tl.load(codes + code[:, None] * code_code, mask=mask, other=0.0).to(tl.float32)
        counted += (code > -2).to(tl.int32)
    if MEAN:
        total = tl.div_rn(total, tl.maximum(counted, 1).to(tl.float32)[:, None] + tl.zeros((1, WIDTH), tl.float32))
    tl.store(out + row[:, None] * d + at[None, :], total, mask=here[:, None] & (at < d)[None, :])


def decode(
    ids: Int[Tensor, "row group slot"], codes: Float[Tensor, "group code d_group"], reduce: str
) -> Float[Tensor, "row group d_group"]:
    """Sum or average the codes of the ids; -1 is an empty slot, -2 no slot at all."""
    n_rows, n_groups, n_slots = ids.shape
    d = codes.shape[-1]
    out = torch.empty(n_rows, n_groups, d, dtype=codes.dtype, device=codes.device)
    width = min(_WIDEST, max(16, at_least(d)))
    rows = _ELEMENTS // width
    grid = (triton.cdiv(n_rows * n_groups, rows), triton.cdiv(d, width))
    if out.numel():
        decode_kernel[grid](
            ids.contiguous(), codes, out, n_rows * n_groups, n_groups, n_slots, d, *codes.stride(),
            ROWS=rows, WIDTH=width, MEAN=reduce == "mean", enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
    return out
