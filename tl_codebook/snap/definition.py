"""The definition of the snap: full scores, any floating dtype. Every faster path is tested against this file.

Axes: ``batch pos group code k d_in d_group layer head``; ``*lead`` stands for any leading axes.

* Scores are computed in fp32 (fp64 stays fp64), whatever the dtype of the model.
* Order of ids: score, highest first; equal scores by lowest id.
* ``inner_product``: ``x . c / |c|``, the ranking of the cosine (Tamkin et al. 2023, section 2); a zero code scores 0.
* ``euclidean``: ``x . c - |c|^2 / 2``, the ranking of minus the distance; a zero code scores 0.
* ``nearest`` takes the k best codes. ``residual`` takes the best code k times over, each time for what the codes before it left over.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["choose_in_parts", "decode", "nearest_codes", "residual_codes", "scores", "top_codes"]


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def scores(
    x: Float[Tensor, "*lead group d_group"], codes: Float[Tensor, "group code d_group"], similarity: str
) -> Float[Tensor, "*lead group code"]:
    """Score every code for every vector."""
    x, codes = _exact(x), _exact(codes)
    products = torch.einsum("...gd,gcd->...gc", x, codes)
    if similarity == "inner_product":
        norms = codes.norm(dim=-1)
        return products / torch.where(norms > 0, norms, 1.0)
    return products - codes.square().sum(-1) / 2


def top_codes(scores: Float[Tensor, "*lead code"], k: int) -> Int[Tensor, "*lead k"]:
    """Return the ids of the k highest scores, ties by lowest id (`torch.topk` leaves ties open)."""
    if k == 1:
        return scores.argmax(-1, keepdim=True)  # documented to return the first of equal maxima
    if scores.dtype == torch.float64:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one score
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()  # integers in the order of the floats
    n_codes = scores.shape[-1]
    keys = (ordered << 32) + (n_codes - 1 - torch.arange(n_codes, device=scores.device))
    best = keys.topk(k, dim=-1).values
    return n_codes - 1 - (best & 0xFFFFFFFF)


def nearest_codes(
    x: Float[Tensor, "*lead group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    disabled: Bool[Tensor, "*#lead group code"] | None = None,
) -> Int[Tensor, "*lead group k"]:
    """Return the k most similar codes."""
    table = scores(x, codes, similarity)
    if disabled is not None:
        table = table.masked_fill(disabled, -torch.inf)
    return top_codes(table, k)


def residual_codes(
    x: Float[Tensor, "*lead group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    disabled: Bool[Tensor, "*#lead group code"] | None = None,
) -> Int[Tensor, "*lead group k"]:
    """Return k codes by greedy pursuit: each is the best for what the ones before it left over."""
    rest, chosen = _exact(x), []
    for _ in range(k):
        ids = nearest_codes(rest, codes, 1, similarity, disabled)
        chosen.append(ids)
        rest = rest - decode(ids, _exact(codes), "sum")
    return torch.cat(chosen, dim=-1)


def choose_in_parts(
    x: Float[Tensor, "row group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    similarity: str,
    selection: str,
    disabled: Bool[Tensor, "#row group code"] | None,
    scores_at_once: int,
) -> Int[Tensor, "row group k"]:
    """Return the ids of `nearest_codes` or `residual_codes`, holding the scores of some rows at a time."""
    choose = residual_codes if selection == "residual" else nearest_codes
    size = max(1, scores_at_once // (codes.shape[0] * codes.shape[1]))
    dtype = torch.promote_types(x.dtype, codes.dtype)
    x, codes = x.to(dtype), codes.to(dtype)
    ids = torch.empty(*x.shape[:2], k, dtype=torch.long, device=x.device)
    for i in range(0, x.shape[0], size):
        masked = disabled if disabled is None or disabled.shape[0] == 1 else disabled[i : i + size]
        ids[i : i + size] = choose(x[i : i + size], codes, k, similarity, masked)
    return ids


def decode(
    ids: Int[Tensor, "*lead group k"], codes: Float[Tensor, "group code d_group"], reduce: str
) -> Float[Tensor, "*lead group d_group"]:
    """Sum or average the vectors of the ids; -1 contributes zero, -2 is no slot at all (an average does not count it)."""
    n_groups, n_codes, _ = codes.shape
    table = codes.flatten(0, 1)
    offsets = torch.arange(n_groups, device=ids.device).unsqueeze(-1) * n_codes
    rows = torch.nn.functional.embedding(ids.clamp(min=0) + offsets, table)
    total = (rows * (ids >= 0).unsqueeze(-1)).sum(-2)
    if reduce == "sum":
        return total
    return total / (ids > -2).sum(-1, keepdim=True).clamp(min=1)
