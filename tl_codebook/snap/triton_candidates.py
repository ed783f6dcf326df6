"""Kernels that find the blocks of codes which can hold a row's best codes, without writing a score matrix.

The k best codes lie in the k blocks with the highest maxima (of equal maxima the lowest blocks): a code elsewhere has k better codes
above it, one in each of those blocks. So a tile of scores is born in registers, is reduced to maxima of blocks of 8, and dies there.

How the products are formed (``PRECISION``):

* ``direct``: both operands in bf16 or fp16; their products are exact in fp32.
* ``split``: fp32 operands as a sum of two bf16, prepared by `prepare_kernel`; three products, the fourth is too small to matter.
* ``exact``: fp32 throughout, off the tensor cores; for the rows of a list, those that ``split`` could not decide.

Axes: ``row group code k d_group``; blocks are 8 codes.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from tl_codebook.snap.triton_common import BLOCK, block_maxima, codes_in_register_order

__all__ = ["best_block_kernel", "block_maxima_kernel", "prepare_kernel"]


@triton.jit
@no_type_check
def prepare_kernel(
    source, centre, rest, chosen, codes, high, low, squares,
    n_rows, d, n_groups, chosen_step, source_row, source_group, source_step, code_group, code_code, code_step, out_row, out_group, width,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, HAS_CENTRE: tl.constexpr, SUBTRACT: tl.constexpr, KEEP_REST: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Shift vectors by the centre and split them into two bf16 each; first subtract the code chosen before, if there is one.

    Written: `rest` (fp32, before the shift), `high` and `low` (zero from `d` to `width`), and in `squares` the squared lengths of the
    shifted vector, of `low`, and of what the two together lose.
    """
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (rows < n_rows)[:, None]
    number = rows * out_row + group * out_group  # of the vector in what is written: x is [row group], a codebook [group code]
    length = tl.zeros((ROWS,), tl.float32)
    length_low = tl.zeros((ROWS,), tl.float32)
    length_lost = tl.zeros((ROWS,), tl.float32)
    if SUBTRACT:
        code = tl.load(chosen + (rows * n_groups + group) * chosen_step, mask=rows < n_rows, other=0)
    for start in range(0, width, DEPTH):
        at = start + tl.arange(0, DEPTH)
        mask = there & (at < d)[None, :]
        vector = tl.load(source + rows[:, None] * source_row + group * source_group + at[None, :] * source_step, mask=mask, other=0.0)
        vector = vector.to(tl.float32)
        if SUBTRACT:
            where = codes + group * code_group + code[:, None] * code_code + at[None, :] * code_step
            vector = vector - tl.load(where, mask=mask, other=0.0).to(tl.float32)
        if KEEP_REST:
            tl.store(rest + (rows[:, None] * n_groups + group) * d + at[None, :], vector, mask=mask)
        if HAS_CENTRE:
            vector = vector - tl.load(centre + group * d + at, mask=at < d, other=0.0)[None, :]
            vector = tl.where(mask, vector, 0.0)
        first = vector.to(tl.bfloat16)
        second = (vector - first.to(tl.float32)).to(tl.bfloat16)
        lost = vector - first.to(tl.float32) - second.to(tl.float32)
        length += tl.sum(vector * vector, 1)
        length_low += tl.sum(second.to(tl.float32) * second.to(tl.float32), 1)
        length_lost += tl.sum(lost * lost, 1)
        if SPLIT:
            tl.store(high + number[:, None] * width + at[None, :], first, mask=there)
            tl.store(low + number[:, None] * width + at[None, :], second, mask=there)
    tl.store(squares + number * 3, length, mask=rows < n_rows)
    tl.store(squares + number * 3 + 1, length_low, mask=rows < n_rows)
    tl.store(squares + number * 3 + 2, length_lost, mask=rows < n_rows)


@triton.jit
@no_type_check
def _tile_scores(
    x, x_low, codes, codes_low, centre, scale, bias, start, n_codes, d, x_step, code_code, code_step,
    TAIL: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    HAS_CENTRE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Score a tile [ROWS, CODES], codes in register order; `x` and `x_low` are pointers to rows, the others to the group."""
    code = start + codes_in_register_order(CODES)
    if TAIL:
        safe = tl.minimum(code, n_codes - 1)  # the last code again, instead of a mask on every load
    else:
        safe = code
    code_at = safe.to(tl.int64) * code_code
    total = tl.zeros((ROWS, CODES), dtype=tl.float32)
    for step in range(0, d, DEPTH):
        at = step + tl.arange(0, DEPTH)
        x_at = at[None, :] * x_step
        c_at = code_at[None, :] + at[:, None] * code_step
        if EVEN:
            a = tl.load(x + x_at)
            b = tl.load(codes + c_at)
        else:
            a = tl.load(x + x_at, mask=(at < d)[None, :], other=0.0)
            b = tl.load(codes + c_at, mask=(at < d)[:, None], other=0.0)
        if PRECISION == "exact":
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            if HAS_CENTRE:
                middle = tl.load(centre + at, mask=at < d, other=0.0)
                a = a - middle[None, :]
                b = b - middle[:, None]
            total = tl.dot(a, b, total, input_precision="ieee")
        else:
            if UPCAST:  # the interpreter multiplies the raw bits of bf16
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            if PRECISION == "split":
                a_low = tl.load(x_low + x_at)
                b_low = tl.load(codes_low + c_at)
                if UPCAST:
                    a_low = a_low.to(tl.float32)
                    b_low = b_low.to(tl.float32)
                total = tl.dot(a_low, b, total)
                total = tl.dot(a, b_low, total)
            total = tl.dot(a, b, total)
    if HAS_SCALE:
        total = total * tl.load(scale + safe)[None, :]
    if HAS_BIAS:
        total = total + tl.load(bias + safe)[None, :]
    if TAIL:
        total = tl.where((code < n_codes)[None, :], total, float("-inf"))
    return total


@triton.jit
@no_type_check
def best_block_kernel(
    x, x_low, codes, codes_low, centre, scale, bias, listed, n_listed, block, second,
    n_rows, n_codes, d, n_groups, n_blocks, x_row, x_group, x_step, code_group, code_code, code_step,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    HAS_CENTRE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write each row's best block (of equals the lowest) and the highest score outside it.

    Each position of a tile keeps its own best over all tiles, so nothing is exchanged between threads before the last code is seen.
    NaN never wins; a row of nothing else gets block 0.
    """
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
    rows = rows.to(tl.int64)
    at = rows[:, None] * x_row + group * x_group
    codes += group * code_group
    codes_low += group * code_group
    centre += group * d
    scale += group * n_codes
    bias += group * n_codes
    best = tl.full((ROWS, CODES // BLOCK), float("-inf"), tl.float32)
    runner_up = tl.full((ROWS, CODES // BLOCK), float("-inf"), tl.float32)
    tile = tl.zeros((ROWS, CODES // BLOCK), tl.int32)
    n_full = n_codes // CODES
    for i in range(0, n_full):
        scores = _tile_scores(
            x + at, x_low + at, codes, codes_low, centre, scale, bias, i * CODES, n_codes, d, x_step, code_code, code_step,
            False, ROWS, CODES, DEPTH, EVEN, PRECISION, HAS_CENTRE, HAS_SCALE, HAS_BIAS, UPCAST,
        )  # fmt: skip
        maxima = block_maxima(scores, ROWS, CODES)
        runner_up = tl.maximum(runner_up, tl.minimum(best, maxima))
        tile = tl.where(maxima > best, i, tile)
        best = tl.maximum(best, maxima)
    if n_full * CODES < n_codes:
        scores = _tile_scores(
            x + at, x_low + at, codes, codes_low, centre, scale, bias, n_full * CODES, n_codes, d, x_step, code_code, code_step,
            True, ROWS, CODES, DEPTH, EVEN, PRECISION, HAS_CENTRE, HAS_SCALE, HAS_BIAS, UPCAST,
        )  # fmt: skip
        maxima = block_maxima(scores, ROWS, CODES)
        runner_up = tl.maximum(runner_up, tl.minimum(best, maxima))
        tile = tl.where(maxima > best, n_full, tile)
        best = tl.maximum(best, maxima)
    top = tl.max(best, 1)
    number = tile * (CODES // BLOCK) + tl.arange(0, CODES // BLOCK)[None, :]
    winner = tl.min(tl.where(best == top[:, None], number, n_blocks), 1)
    winner = tl.where(winner < n_blocks, winner, 0)
    others = tl.max(tl.where(number == winner[:, None], float("-inf"), best), 1)
    tl.store(block + rows * n_groups + group, winner, mask=here)
    tl.store(second + rows * n_groups + group, tl.maximum(others, tl.max(runner_up, 1)), mask=here)


@triton.jit
@no_type_check
def block_maxima_kernel(
    x, x_low, codes, codes_low, centre, scale, bias, listed, n_listed, maxima,
    n_rows, n_codes, d, n_groups, n_blocks, maxima_step, tiles_per_split, x_row, x_group, x_step, code_group, code_code, code_step,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    HAS_CENTRE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write the maxima of all blocks, [row group block]; the third grid axis shares the codes among programs."""
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
    rows = rows.to(tl.int64)
    at = rows[:, None] * x_row + group * x_group
    out = maxima + (rows * n_groups + group)[:, None] * maxima_step
    codes += group * code_group
    codes_low += group * code_group
    centre += group * d
    scale += group * n_codes
    bias += group * n_codes
    n_full = n_codes // CODES
    first = tl.program_id(2) * tiles_per_split
    last = first + tiles_per_split
    for i in range(first, tl.minimum(last, n_full)):
        scores = _tile_scores(
            x + at, x_low + at, codes, codes_low, centre, scale, bias, i * CODES, n_codes, d, x_step, code_code, code_step,
            False, ROWS, CODES, DEPTH, EVEN, PRECISION, HAS_CENTRE, HAS_SCALE, HAS_BIAS, UPCAST,
        )  # fmt: skip
        number = i * (CODES // BLOCK) + tl.arange(0, CODES // BLOCK)
        tl.store(out + number[None, :], block_maxima(scores, ROWS, CODES), mask=here[:, None])
    if (n_full * CODES < n_codes) & (first <= n_full) & (n_full < last):
        scores = _tile_scores(
            x + at, x_low + at, codes, codes_low, centre, scale, bias, n_full * CODES, n_codes, d, x_step, code_code, code_step,
            True, ROWS, CODES, DEPTH, EVEN, PRECISION, HAS_CENTRE, HAS_SCALE, HAS_BIAS, UPCAST,
        )  # fmt: skip
        number = n_full * (CODES // BLOCK) + tl.arange(0, CODES // BLOCK)
        tl.store(out + number[None, :], block_maxima(scores, ROWS, CODES), mask=here[:, None] & (number < n_blocks)[None, :])
