"""The k best of each row of a table, exactly, without looking at most of it.

The k best scores of a row lie in the k blocks with the best maxima, whatever the blocks are. Maxima are nearly free (they vectorise);
what is left to sort is a few hundred numbers. On top of the blocks of a row sit blocks of blocks: a pyramid, walked down with k nodes a level.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.snap import definition
from tl_codebook.snap.workers import scratch

__all__ = ["best", "factors_for", "first_best", "padded"]

_BLOCK = 64  # of `first_best`
_LAST = 0x7FFFFFFF


def factors_for(n_codes: int, k: int) -> tuple[int, ...]:
    """Return how many nodes make one node of the next level of the pyramid; few candidates in all, measured on shapes of the README."""
    factors: list[int] = []
    nodes, step = n_codes, 8 if k < 32 else 4
    while len(factors) < 4 and nodes // step >= max(2 * k, 48):
        factors.append(step)
        nodes //= step
    return tuple(factors)


def padded(n_codes: int, k: int) -> int:
    """Return the width of a table of scores whose rows divide into blocks; what is beyond `n_codes` has to be -inf."""
    multiple = _BLOCK if k == 1 else int(np.prod(factors_for(n_codes, k), initial=1))
    return -(-n_codes // multiple) * multiple


def first_best(scores: Float[Tensor, "row width"]) -> Int[Tensor, " row"]:
    """Return the place of the highest score of each row, the first of equals."""
    n_rows, width = scores.shape
    if width <= _BLOCK:
        return scores.argmax(1)
    blocks = scores.view(n_rows, width // _BLOCK, _BLOCK)
    block = blocks.amax(2).argmax(1)
    rows = torch.arange(n_rows, device=scores.device) * (width // _BLOCK)
    return block * _BLOCK + blocks.flatten(0, 1).index_select(0, block + rows).argmax(1)


def _keys(values: Float[Tensor, "row node"], inverted: Int[Tensor, "*row node"], name: str) -> np.ndarray:
    """Pack scores and places into int64s that sort by score, then by lowest place (numpy sorts those with SIMD, torch does not)."""
    keys = scratch(name, (*values.shape, 2), torch.int32)
    bits = values.add_(0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score; the values are scratch themselves
    # As integers floats sort by size where they are positive, and backwards where they are negative.
    torch.bitwise_xor(bits, (bits >> 31).bitwise_and_(_LAST), out=keys[..., 1])
    keys[..., 0] = inverted
    return keys.numpy().view(np.int64)[..., 0]


def best(scores: Float[Tensor, "row width"], n_codes: int, k: int) -> Int[Tensor, "row k"]:
    """Return the places of the k highest scores of each row: highest first, equal scores by lowest place.

    The table is `padded` with -inf beyond `n_codes`. Equal scores at the edge of what a level keeps are rare; such rows are done again.
    """
    if scores.shape[0] == 0:
        return torch.empty(0, k, dtype=torch.long)
    n_rows, factors = scores.shape[0], factors_for(n_codes, k)
    levels = [scores]
    for i, factor in enumerate(factors):
        below = levels[-1]
        above = scratch(f"level{i}", (n_rows, below.shape[1] // factor), scores.dtype)
        # Blocks of places that are far apart, {j, j + n, j + 2n ...}: the maximum then runs along contiguous memory.
        levels.append(torch.amax(below.view(n_rows, factor, -1), 1, out=above))
    nodes = levels[-1].shape[1]
    values = levels[-1] if factors else scratch("values", (n_rows, nodes), scores.dtype).copy_(scores)
    inverted: Tensor = _LAST - torch.arange(nodes, dtype=torch.int32)
    starts = torch.arange(n_rows).unsqueeze(1)
    edge = np.full(n_rows, np.iinfo(np.int64).min)
    for level in range(len(factors), -1, -1):
        keys = _keys(values, inverted, "keys")
        if keys.shape[1] > k:
            keys.partition(keys.shape[1] - k - 1, axis=1)
            np.maximum(edge, keys[:, -k - 1], out=edge)
            keys = keys[:, -k:]
        if level == 0:
            break
        chosen = torch.from_numpy(np.ascontiguousarray(keys.view(np.int32)[:, ::2]))
        nodes, factor, below = levels[level].shape[1], factors[level - 1], levels[level - 1]
        steps = torch.arange(factor, dtype=torch.int32) * nodes
        inverted = (chosen.unsqueeze(2) - steps).flatten(1)
        places = (starts * below.shape[1] + _LAST) - inverted
        values = torch.take(below, places, out=scratch("values", tuple(places.shape), scores.dtype))
    keys = np.sort(keys, axis=1)[:, ::-1]
    # A node that was dropped and equals the k-th best score may hold a lower place.
    tied = torch.from_numpy((edge >> 32) >= (keys[:, -1] >> 32)) if len(factors) else None
    ids = torch.from_numpy(_LAST - (keys & 0xFFFFFFFF)).clamp_(max=n_codes - 1)  # beyond lies -inf, above which only NaN does not sort
    if tied is not None and tied.any():
        rows = tied.nonzero().squeeze(1)
        ids[rows] = definition.top_codes(scores[:, :n_codes].index_select(0, rows), k)
    return ids
