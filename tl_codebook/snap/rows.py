"""The k best of each row of a table, exactly, without looking at most of it.

The k best scores of a row lie in the k blocks with the best maxima, whatever the blocks are. Maxima are nearly free (they vectorise);
what is left to sort is a few hundred numbers. On top of the blocks sit blocks of blocks: a pyramid, walked down with k nodes a level.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap import definition
from tl_codebook.snap.workers import scratch

__all__ = ["best", "factors_for", "first_best", "padded"]

_NODES = 32  # levels are multiples of this: the maxima of shorter runs do not vectorise
_LOW = 0x7FFFFFFF


def factors_for(n_codes: int, k: int) -> tuple[int, ...]:
    """Return how many nodes make one node of the next level of the pyramid: few enough candidates in all, and few levels."""
    factors: list[int] = []
    nodes = n_codes // 8
    while k > 1 and len(factors) < 2 and nodes >= max(4 * k, _NODES):
        factors.append(8)
        nodes //= 8
    return tuple(factors)


def padded(n_codes: int, k: int) -> int:
    """Return the width of a table of scores whose rows divide into blocks; what is beyond `n_codes` has to be -inf."""
    factors = factors_for(n_codes, k)
    multiple = math.prod(factors) * _NODES if factors else 1
    return -(-n_codes // multiple) * multiple


def first_best(scores: Float[Tensor, "row code"]) -> Int[Tensor, " row"]:
    """Return the place of the highest score of each row, the first of equals (numpy's argmax is ten times as fast as torch's)."""
    return torch.from_numpy(np.argmax(scores.numpy(), axis=1))


def _highest(values: np.ndarray, k: int, tied: Bool[np.ndarray, " row"]) -> np.ndarray:
    """Return the flat places of the k highest values of each row, in no order, and mark the rows where that is not one answer."""
    n_rows, width = values.shape
    if width == k:
        return np.arange(n_rows * k)
    work = scratch("work", values.shape, torch.float32).numpy()
    np.copyto(work, values)
    work.partition(width - k, axis=1)  # numpy selects with SIMD, torch.topk does not
    high = values >= work[:, width - k, None]
    places = np.flatnonzero(high)
    if len(places) != n_rows * k:
        several = high.sum(1) != k  # equal values at the edge; NaN compares with nothing
        tied |= several
        high[several] = np.arange(width) < k
        places = np.flatnonzero(high)
    return places


def best(scores: Float[Tensor, "row width"], n_codes: int, k: int) -> Int[Tensor, "row k"]:
    """Return the places of the k highest scores of each row: highest first, equal scores by lowest place.

    The table is `padded` with -inf beyond `n_codes`. Rows with equal scores at the edge of what a level keeps are rare, and done again by
    the definition.
    """
    n_rows, width = scores.shape
    if n_rows == 0:
        return torch.empty(0, k, dtype=torch.long)
    factors = factors_for(n_codes, k)
    levels = [scores]
    for i, factor in enumerate(factors):
        below = levels[-1]
        # A node stands for places that are far apart, {j, j + n, j + 2n ...}: its maximum then runs along contiguous memory.
        nodes = scratch(f"level{i}", (n_rows, below.shape[1] // factor), torch.float32)
        levels.append(torch.amax(below.view(n_rows, factor, -1), 1, out=nodes))
    tied = np.zeros(n_rows, dtype=bool)
    rows = np.repeat(np.arange(n_rows), k)
    values = levels[-1].numpy()
    places = _highest(values, k, tied)
    for level in range(len(factors) - 1, -1, -1):
        above, below, factor = levels[level + 1].shape[1], levels[level], factors[level]
        family = scratch("places", (n_rows, factor, k), torch.int64)
        first = torch.from_numpy((places + rows * (below.shape[1] - above)).reshape(n_rows, 1, k))
        torch.add(first, torch.arange(0, factor * above, above).unsqueeze(1), out=family)
        children = torch.take(below, family, out=scratch("values", (n_rows, factor, k), torch.float32))
        values = children.numpy().reshape(n_rows, factor * k)
        chosen = _highest(values, k, tied)
        places = family.numpy().reshape(-1)[chosen]
        values = values.reshape(-1)[chosen]
    if not factors:
        values = values.reshape(-1)[places]
    # Scores and places in one int64 that sorts by score, then by lowest place. As integers floats sort by size where they are positive, and
    # backwards where they are negative; + 0.0 makes -0.0 and 0.0 one score.
    bits = (values.reshape(n_rows, k) + np.float32(0.0)).view(np.int32)
    ordered = (bits ^ ((bits >> 31) & _LOW)).astype(np.int64)
    keys = (ordered << 32) | (_LOW - (places - rows * width).reshape(n_rows, k))
    keys.sort(axis=1)
    ids = torch.from_numpy(_LOW - (keys[:, ::-1] & 0xFFFFFFFF)).clamp_(max=n_codes - 1)  # beyond lies -inf: only NaN takes one there
    if tied.any():
        again = torch.from_numpy(np.flatnonzero(tied))
        ids[again] = definition.top_codes(scores[:, :n_codes].index_select(0, again), k)
    return ids
