"""Kernels that decide among candidates: fp32 scores of whole blocks in one fixed order of summation, and a proof that nothing was missed.

Where candidates were found with operands split into two bf16 each, a score is off by at most ``slack``: with x = h + l + r (high, low,
lost) and likewise c, the three products leave out l.l', r.c and (x - r).r', so by Cauchy-Schwarz
``slack = |l| max|l'| + |r| max|c| + |x| max|r'|`` (lengths of the codes after scaling), plus what fp32 sums themselves round away. A row is
proven when its k-th score is above the best score outside its candidates by more than that; the others go to a list, for an exact pass.

Axes: ``row group code k d_group``; blocks are 8 codes.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from tl_codebook.snap.triton_common import BLOCK, NO_KEY, first_best, key_of, score_of

__all__ = ["LARGEST_SPAN", "best_code_kernel", "best_codes_kernel"]

SUPER = tl.constexpr(16)  # blocks of a superblock: the best blocks lie in the best superblocks, as the best codes do in the best blocks
LARGEST_SPAN = 2048  # blocks of a row that one program holds in registers
_BOUND_ROUNDING = tl.constexpr(1.01)  # the bound itself is computed in fp32
_SUM_ROUNDING = tl.constexpr(2.0**-20)  # 16 units in the last place of |x| max|c|: measured errors of such sums stay below 2


@triton.jit
@no_type_check
def _slack(squares, limits, number, group, mask):
    """Bound the error of a candidate's score: rows [row group 3] of squared lengths, limits [group 4] of the codes."""
    length = tl.sqrt(tl.load(squares + number * 3, mask=mask, other=0.0))
    low = tl.sqrt(tl.load(squares + number * 3 + 1, mask=mask, other=0.0))
    lost = tl.sqrt(tl.load(squares + number * 3 + 2, mask=mask, other=0.0))
    largest = tl.load(limits + group * 4)
    largest_low = tl.load(limits + group * 4 + 1)
    largest_lost = tl.load(limits + group * 4 + 2)
    largest_bias = tl.load(limits + group * 4 + 3)
    split = low * largest_low + lost * largest + length * largest_lost
    return split * _BOUND_ROUNDING + (length * largest + largest_bias) * _SUM_ROUNDING


@triton.jit
@no_type_check
def best_code_kernel(
    x, codes, centre, divisor, bias, block, second, squares, limits, listed, n_listed, ids,
    n_rows, n_codes, d, n_groups, ids_step, x_row, x_group, x_step, code_group, code_code, code_step,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, HAS_CENTRE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PROVE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write the best code of each row's block (of equals the lowest), and list the rows where another block might hold a better one."""
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if LISTED:
        n_here = tl.load(n_listed + group)
        if tl.program_id(0) * ROWS >= n_here:
            return
        here = rows < n_here
        rows = tl.load(listed + group * n_rows + rows, mask=here, other=0)
    else:
        here = rows < n_rows
        rows = tl.minimum(rows, n_rows - 1)
    row = rows.to(tl.int64)
    number = row * n_groups + group
    code = tl.load(block + number)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = code < n_codes
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    code_at = tl.where(inside, code, 0).to(tl.int64) * code_code + group * code_group
    x_at = row * x_row + group * x_group
    for start in range(0, d, DEPTH):
        at = start + tl.arange(0, DEPTH)
        a = tl.load(x + x_at[:, None] + at[None, :] * x_step, mask=(at < d)[None, :], other=0.0).to(tl.float32)
        c_at = code_at[:, :, None] + at[None, None, :] * code_step
        b = tl.load(codes + c_at, mask=(at < d)[None, None, :], other=0.0).to(tl.float32)
        if HAS_CENTRE:
            middle = tl.load(centre + group * d + at, mask=at < d, other=0.0)
            a = a - middle[None, :]
            b = b - middle[None, None, :]
        total += tl.sum(a[:, None, :] * b, 2)
    per_code = group * n_codes + tl.where(inside, code, 0)
    if HAS_SCALE:
        total = tl.div_rn(total, tl.load(divisor + per_code))
    if HAS_BIAS:
        total = total + tl.load(bias + per_code)
    best, winner = first_best(tl.where(inside, key_of(total), NO_KEY), code, 1)
    tl.store(ids + number * ids_step, winner.to(tl.int64), mask=here)
    if PROVE:
        outside = tl.load(second + number, mask=here, other=0.0)
        proven = score_of(best) > outside + _slack(squares, limits, number, group, here)
        slot = tl.atomic_add(n_listed + group + tl.zeros((ROWS,), tl.int32), 1, mask=here & (proven == 0))
        tl.store(listed + group * n_rows + slot, rows, mask=here & (proven == 0))


@triton.jit
@no_type_check
def best_codes_kernel(
    x, codes, centre, divisor, bias, maxima, squares, limits, listed, n_listed, ids,
    n_rows, n_codes, d, n_groups, n_blocks, maxima_step, ids_step, x_row, x_group, x_step, code_group, code_code, code_step,
    K: tl.constexpr, N_BEST: tl.constexpr, N_SUPER: tl.constexpr, SUPERS: tl.constexpr, WIDE_BLOCKS: tl.constexpr, WIDE: tl.constexpr,
    DEPTH: tl.constexpr, HAS_CENTRE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PROVE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Write a row's K best codes, best first, found in its N_BEST best blocks; list the row if others might hold a better one.

    Only N_SUPER superblocks are looked into for those blocks, by the same argument.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    if LISTED:
        if row >= tl.load(n_listed + group):
            return
        row = tl.load(listed + group * n_rows + row)
    number = row.to(tl.int64) * n_groups + group
    # the best superblocks
    many = tl.arange(0, SUPERS)[:, None] * SUPER + tl.arange(0, SUPER)[None, :]
    above = tl.max(tl.load(maxima + number * maxima_step + many, mask=many < n_blocks, other=float("-inf")), 1)
    position = tl.arange(0, SUPERS)
    keys = tl.where(position * SUPER < n_blocks, key_of(above), NO_KEY)
    wide = tl.arange(0, WIDE_BLOCKS)
    chosen = tl.zeros((WIDE_BLOCKS,), tl.int32)
    for j in tl.static_range(N_SUPER):
        best, first = first_best(keys, position, 0)
        keys = tl.where(position == first, NO_KEY, keys)
        chosen = tl.where(wide // SUPER == j, first, chosen)
    outside = tl.max(keys, 0)
    # their best blocks
    position = chosen * SUPER + wide % SUPER
    valid = (wide < N_SUPER * SUPER) & (position < n_blocks)
    above = tl.load(maxima + number * maxima_step + position, mask=valid, other=float("-inf"))
    keys = tl.where(valid, key_of(above), NO_KEY)
    wide = tl.arange(0, WIDE)
    chosen = tl.zeros((WIDE,), tl.int32)
    for j in tl.static_range(N_BEST):
        best, first = first_best(keys, position, 0)
        keys = tl.where(position == first, NO_KEY, keys)
        chosen = tl.where(wide // BLOCK == j, first, chosen)
    outside = tl.maximum(outside, tl.max(keys, 0))
    # their codes
    code = chosen * BLOCK + wide % BLOCK
    valid = (wide < N_BEST * BLOCK) & (code < n_codes)
    code = tl.where(valid, code, 0)
    code_at = code.to(tl.int64) * code_code + group * code_group
    x_at = row.to(tl.int64) * x_row + group * x_group
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, d, DEPTH):
        at = start + tl.arange(0, DEPTH)
        a = tl.load(x + x_at + at * x_step, mask=at < d, other=0.0).to(tl.float32)
        mask = valid[:, None] & (at < d)[None, :]
        b = tl.load(codes + code_at[:, None] + at[None, :] * code_step, mask=mask, other=0.0).to(tl.float32)
        if HAS_CENTRE:
            middle = tl.load(centre + group * d + at, mask=at < d, other=0.0)
            a = a - middle
            b = b - middle[None, :]
        total += tl.sum(a[None, :] * b, 1)
    per_code = group * n_codes + code
    if HAS_SCALE:
        total = tl.div_rn(total, tl.load(divisor + per_code))
    if HAS_BIAS:
        total = total + tl.load(bias + per_code)
    keys = tl.where(valid, key_of(total), NO_KEY)
    best = tl.max(keys, 0)  # in the end that of the last code
    for j in tl.static_range(K):
        best, first = first_best(keys, code, 0)
        keys = tl.where(code == first, NO_KEY, keys)
        tl.store(ids + number * ids_step + j, first.to(tl.int64))
    if PROVE:
        known = outside != NO_KEY  # otherwise every code was a candidate
        limit = score_of(outside) + _slack(squares, limits, number, group, True)
        if known & ((score_of(best) > limit) == 0):
            slot = tl.atomic_add(n_listed + group, 1)
            tl.store(listed + group * n_rows + slot, row)
