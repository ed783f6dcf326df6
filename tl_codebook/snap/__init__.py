"""Snap vectors to codes. The callers of this package use `snap` and `decode` and do not know which path serves them.

Axes: ``batch pos group code k d_in d_group layer head``; ``*lead`` stands for any leading axes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.snap import definition
from tl_codebook.snap.gradients import decode_bag, straight_through

__all__ = ["decode", "select", "snap", "straight_through"]

_SCORES_AT_ONCE = 2**20  # 4 MiB of fp32: the scores of all rows together would not fit a cache, nor always the memory


@torch.no_grad()
def select(
    x: Float[Tensor, "*lead group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    *,
    similarity: str = "euclidean",
    selection: str = "residual",
    disabled: Bool[Tensor, "*#lead group code"] | None = None,
) -> Int[Tensor, "*lead group k"]:
    """Choose k codes for every vector, most similar first.

    Scores are fp32 (fp64 for fp64 input) even under autocast; equal scores go to the lowest id. Codes that are `disabled` are never chosen.
    The input must be finite: NaN has no order, and callers answer for it (`Codebook` does).

    >>> codes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    >>> select(torch.tensor([[2.0, 3.0]]), codes, 2)
    tensor([[2, 1]])
    """
    choose = definition.residual_codes if selection == "residual" else definition.nearest_codes
    rows = x.reshape(-1, *x.shape[-2:])
    if disabled is not None:
        disabled = disabled.expand(*x.shape[:-1], codes.shape[1]).reshape(-1, *codes.shape[:2])
    n = max(1, _SCORES_AT_ONCE // (codes.shape[0] * codes.shape[1]))
    with torch.autocast(device_type=x.device.type, enabled=False):
        ids = [
            choose(rows[i : i + n], codes, k, similarity, None if disabled is None else disabled[i : i + n])
            for i in range(0, rows.shape[0], n)
        ]
    return torch.cat(ids).reshape(*x.shape[:-1], k) if ids else rows.new_empty(*x.shape[:-1], k, dtype=torch.long)


def decode(
    ids: Int[Tensor, "*lead group k"], codes: Float[Tensor, "group code d_group"], reduce: str = "sum"
) -> Float[Tensor, "*lead group d_group"]:
    """Turn ids back into vectors: the sum or the mean of their codes.

    An id of -1 is an empty slot: it contributes zero, and a mean still counts it. An id of -2 is no slot: a mean does not count it.

    >>> codes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    >>> decode(torch.tensor([[2, 1]]), codes)
    tensor([[2., 3.]])
    """
    return decode_bag(ids, codes, reduce)


def snap(
    x: Float[Tensor, "*lead group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    *,
    similarity: str = "euclidean",
    selection: str = "residual",
    reduce: str = "sum",
) -> tuple[Float[Tensor, "*lead group d_group"], Int[Tensor, "*lead group k"]]:
    """Choose codes and decode them, with a straight-through gradient to `x`; returns vectors (in the dtype of the codes) and ids.

    >>> x = torch.tensor([[2.0, 3.0]], requires_grad=True)
    >>> out, ids = snap(x, torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), 1)
    >>> out.tolist(), ids.tolist()
    ([[2.0, 2.0]], [[1]])
    """
    ids = select(x, codes, k, similarity=similarity, selection=selection)
    return straight_through(x.to(codes.dtype), decode(ids, codes, reduce)), ids
