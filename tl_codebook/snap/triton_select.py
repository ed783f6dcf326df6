"""The exact choice of the k highest scores from a score table in memory, for codebooks or k too large for the fused kernels.

One program per row. It reads the row twice (the second time from a cache): first the maxima of ``SPAN`` interleaved parts, whose k-th
highest is a lower bound of the k-th highest score, then the few scores at or above that bound, which it ranks. Equal scores go to the
lowest id. If too many scores pass (a table with many equal scores), the bound is found exactly first.

Axes: ``row code k``.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap.triton_common import NO_KEY, at_least, key_of

__all__ = ["row_select_kernel", "select_scores"]

_SPAN = 1024
_RANKED_AT_ONCE = tl.constexpr(8)
_BOUND_BITS = tl.constexpr(20)  # of the first bound: sign, exponent and 11 bits of the score let few scores more through than all 32
_LARGEST_ID = tl.constexpr(0x7FFFFFFF)  # x ^ this is this - x


@triton.jit
@no_type_check
def _row_keys(table, divisor, bias, disabled, code, n_codes, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DISABLED: tl.constexpr):
    """Keys of some scores of a row; below every score outside of the table."""
    inside = code < n_codes
    score = tl.load(table + code, mask=inside, other=0.0)
    if HAS_SCALE:
        score = tl.div_rn(score, tl.load(divisor + code, mask=inside, other=1.0))
    if HAS_BIAS:
        score = score + tl.load(bias + code, mask=inside, other=0.0)
    if HAS_DISABLED:
        score = tl.where(tl.load(disabled + code, mask=inside, other=0) != 0, float("-inf"), score)
    return tl.where(inside, key_of(score), NO_KEY)


@triton.jit
@no_type_check
def _packed(key, code):
    """Join a key and a code id to one int64: larger is a higher score, then a lower id."""
    return (key.to(tl.int64) << 32) | (code ^ _LARGEST_ID).to(tl.int64)


@triton.jit
@no_type_check
def row_select_kernel(
    table, divisor, bias, disabled, ids, survivors, n_codes, k, table_row, disabled_row, ids_row,
    SPAN: tl.constexpr, ROOM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DISABLED: tl.constexpr,
):  # fmt: skip
    """Write the ids of the k highest of ``table / divisor + bias``, best first; `survivors` holds ROOM packed keys a row."""
    row = tl.program_id(0).to(tl.int64)
    table += row * table_row
    disabled += row * disabled_row
    survivors += row * ROOM
    part = tl.arange(0, SPAN)
    maxima = tl.full((SPAN,), NO_KEY, tl.int32)
    for start in range(0, n_codes, SPAN):
        maxima = tl.maximum(maxima, _row_keys(table, divisor, bias, disabled, start + part, n_codes, HAS_SCALE, HAS_BIAS, HAS_DISABLED))
    bound = tl.full((), NO_KEY, tl.int32)  # at least k keys are not below it; found bit by bit, the sign bit first
    for i in range(0, _BOUND_BITS):
        trial = bound ^ (tl.full((), 1, tl.int64) << (31 - i)).to(tl.int32)
        bound = tl.where(tl.sum((maxima >= trial).to(tl.int32), 0) >= k, trial, bound)
    n = tl.full((), 0, tl.int32)
    for start in range(0, n_codes, SPAN):
        key = _row_keys(table, divisor, bias, disabled, start + part, n_codes, HAS_SCALE, HAS_BIAS, HAS_DISABLED)
        hit = ((key >= bound) & (start + part < n_codes)).to(tl.int32)
        at = n + tl.cumsum(hit, 0) - 1
        tl.store(survivors + at, _packed(key, start + part), mask=(hit > 0) & (at < ROOM))
        n += tl.sum(hit, 0)
    if n > ROOM:
        bound = tl.full((), NO_KEY, tl.int32)
        for i in range(0, 32):
            trial = bound ^ (tl.full((), 1, tl.int64) << (31 - i)).to(tl.int32)
            count = tl.full((), 0, tl.int32)
            for start in range(0, n_codes, SPAN):
                key = _row_keys(table, divisor, bias, disabled, start + part, n_codes, HAS_SCALE, HAS_BIAS, HAS_DISABLED)
                count += tl.sum(((key >= trial) & (start + part < n_codes)).to(tl.int32), 0)
            bound = tl.where(count >= k, trial, bound)
        above = tl.full((), 0, tl.int32)
        for start in range(0, n_codes, SPAN):
            key = _row_keys(table, divisor, bias, disabled, start + part, n_codes, HAS_SCALE, HAS_BIAS, HAS_DISABLED)
            above += tl.sum((key > bound).to(tl.int32), 0)
        n = tl.full((), 0, tl.int32)
        ties = tl.full((), 0, tl.int32)
        for start in range(0, n_codes, SPAN):
            key = _row_keys(table, divisor, bias, disabled, start + part, n_codes, HAS_SCALE, HAS_BIAS, HAS_DISABLED)
            tie = ((key == bound) & (start + part < n_codes)).to(tl.int32)
            let_in = (tie > 0) & (ties + tl.cumsum(tie, 0) <= k - above)  # of equal scores the lowest ids
            hit = ((key > bound) | let_in).to(tl.int32)
            at = n + tl.cumsum(hit, 0) - 1
            tl.store(survivors + at, _packed(key, start + part), mask=(hit > 0) & (at < ROOM))
            ties += tl.sum(tie, 0)
            n += tl.sum(hit, 0)
    tl.debug_barrier()  # the survivors were written by other threads of this program
    mine = tl.arange(0, ROOM)
    key = tl.load(survivors + mine, mask=mine < n, other=-(2**63))
    rank = tl.zeros((ROOM,), tl.int32)
    for start in range(0, n, _RANKED_AT_ONCE):
        other = start + tl.arange(0, _RANKED_AT_ONCE)
        others = tl.load(survivors + other, mask=other < n, other=-(2**63))
        rank += tl.sum((others[None, :] > key[:, None]).to(tl.int32), 1)
    tl.store(ids + row * ids_row + rank, (key & _LARGEST_ID) ^ _LARGEST_ID, mask=(mine < n) & (rank < k))


def select_scores(
    table: Float[Tensor, "row code"],
    k: int,
    divisor: Float[Tensor, " code"] | None,
    bias: Float[Tensor, " code"] | None,
    disabled: Bool[Tensor, "row code"] | None,
    ids: Int[Tensor, "row k"],
) -> None:
    """Write into `ids` the k highest of ``table / divisor + bias`` of every row, k at most 128; ids are contiguous along k."""
    n_rows, n_codes = table.shape
    span = min(_SPAN, max(at_least(n_codes), at_least(k)))
    room = max(64, at_least(k + k // 2 + 32))
    survivors = torch.empty(n_rows, room, dtype=torch.long, device=table.device)
    row_select_kernel[(n_rows,)](
        table, table if divisor is None else divisor, table if bias is None else bias,
        table if disabled is None else disabled.view(torch.uint8), ids, survivors, n_codes, k, table.stride(0),
        0 if disabled is None else disabled.stride(0), ids.stride(0),
        SPAN=span, ROOM=room, HAS_SCALE=divisor is not None, HAS_BIAS=bias is not None, HAS_DISABLED=disabled is not None,
        enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
