"""Decoding with gradients, and the straight-through estimator.

Forward the snap gives exactly the decoded codes; backward the gradient goes to the codes that were chosen and, unchanged, to the input
(van den Oord et al. 2017, section 3.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["decode_bag", "straight_through"]


def decode_bag(
    ids: Int[Tensor, "*lead group k"], codes: Float[Tensor, "group code d_group"], reduce: str
) -> Float[Tensor, "*lead group d_group"]:
    """Equal `definition.decode` without ever holding ``[..., k, d_group]``, forward or backward."""
    n_groups, n_codes, d_group = codes.shape
    n_slots = ids.shape[-1]
    offsets = torch.arange(n_groups, device=ids.device).unsqueeze(-1) * n_codes
    rows = (ids.clamp(min=0) + offsets).reshape(-1, n_slots)
    table = codes.flatten(0, 1)
    if codes.dtype != torch.float64:
        table = table.float()  # gradients of half precision would stop adding up at 256 (bf16) or 2048 (fp16)
    weights = (ids >= 0).to(table.dtype)
    if reduce == "mean":
        weights = weights / (ids > -2).sum(-1, keepdim=True).clamp(min=1)
    bag = torch.nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.reshape(-1, n_slots))
    return bag.reshape(*ids.shape[:-1], d_group).to(codes.dtype)


def straight_through(y: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"], to_codes: bool = True) -> Float[Tensor, "*shape"]:
    """Return `q` with the gradient passed on to `y`, and to `q` itself where `to_codes` is true."""
    if not torch.is_grad_enabled():
        return q
    return (q if to_codes else q.detach()) + (y - y.detach())
