"""What all Triton kernels of the snap share: the order of scores as integers, the order of codes in registers, tile sizes.

The `triton_*` files are the only ones that import triton; `tl_codebook.snap.gpu` imports them when a tensor on a GPU (or Triton's
interpreter) asks for them. Kernels carry `no_type_check`: their arguments are pointers and compile-time constants, not Python values.

Axes: ``row group code k d_group``. A *block* is 8 consecutive codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import triton
import triton.language as tl

__all__ = [
    "BLOCK",
    "NO_KEY",
    "Tiles",
    "at_least",
    "block_maxima",
    "codes_in_register_order",
    "first_best",
    "interpreted",
    "key_of",
    "score_of",
]

BLOCK = tl.constexpr(8)  # codes whose maximum one thread finds without asking its neighbours
NO_KEY = tl.constexpr(-(2**31))  # below the key of every score


@dataclass(frozen=True)
class Tiles:
    """The shape of one program's work, and the hardware it gets.

    Args:
        rows: Rows of a tile, at least 16.
        codes: Codes of a tile, a multiple of 32.
        depth: Components multiplied in one step, at least 16.
    """

    rows: int
    codes: int
    depth: int
    warps: int
    stages: int


def at_least(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def interpreted() -> bool:
    """Tell whether the kernels run in Triton's interpreter (decided by TRITON_INTERPRET when triton was first imported)."""
    return not isinstance(key_of, triton.runtime.JITFunction)


@triton.jit
@no_type_check
def key_of(score):
    """Turn fp32 scores into int32 in the same order; both zeros are one score and NaN is above all."""
    score = score + 0.0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
@no_type_check
def score_of(key):
    """Undo `key_of`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def first_best(keys, ids, AXIS: tl.constexpr):
    """Return the highest key and, of the ids that have it, the lowest.

    Two reductions of int32, each one instruction for a warp, are much cheaper than one of int64.
    """
    best = tl.max(keys, AXIS)
    holds = keys == (best if AXIS == 0 else tl.expand_dims(best, AXIS))
    return best, tl.min(tl.where(holds, ids, 0x7FFFFFFF), AXIS)


@triton.jit
@no_type_check
def codes_in_register_order(CODES: tl.constexpr):
    """Order the codes of a tile so that each thread ends up with blocks of 8 consecutive ids.

    Of every 8 columns of an accumulator of the tensor cores, a thread holds two neighbours (columns 2t and 2t + 1 of thread t of 4), and
    the same two of the next 8. Four such pairs make a block, so the maximum of a block needs no exchange between threads.
    """
    column = tl.arange(0, CODES)
    return (column // (4 * BLOCK)) * (4 * BLOCK) + ((column // 2) % 4) * BLOCK + ((column // 8) % (BLOCK // 2)) * 2 + (column % 2)


@triton.jit
@no_type_check
def block_maxima(scores, ROWS: tl.constexpr, CODES: tl.constexpr):
    """Reduce [ROWS, CODES] in register order to the maxima [ROWS, CODES / 8] of its blocks, in the order of their ids."""
    pairs = tl.reshape(scores, (ROWS, CODES // (4 * BLOCK), BLOCK // 2, 4, 2))
    return tl.reshape(tl.max(tl.max(pairs, 4), 2), (ROWS, CODES // BLOCK))
