"""Decoding, its gradient, and the straight-through estimator.

Forward the snap gives exactly the decoded codes; backward the gradient goes to the codes that were chosen and, unchanged, to the input
(van den Oord et al. 2017, section 3.2). Neither direction holds ``[row k d_group]``, and neither adds floats in an order that can change.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["codes_gradient", "decode_groups", "decode_rows", "straight_through"]

_RUN = 256  # rows that one bag adds up on a GPU; a code that fires everywhere must not wait for one block of threads


def _counted(ids: Int[Tensor, "*row slot"]) -> Int[Tensor, "*row 1"]:
    return (ids > -2).sum(-1, keepdim=True).clamp(min=1)


def decode_rows(
    ids: Int[Tensor, "row slot"], codes: Float[Tensor, "code d_group"], reduce: str, *, filled: bool = False
) -> Float[Tensor, "row d_group"]:
    """Sum or average the codes of each row in fp32 or fp64, slot after slot; `filled` says that no id is negative."""
    if not filled:
        filled = ids.numel() == 0 or bool(ids.min() >= 0)
    if ids.shape[1] == 0:
        return codes.new_zeros(ids.shape[0], codes.shape[1])
    if filled and ids.shape[1] == 1:
        return codes.index_select(0, ids[:, 0])
    # A mean is a sum divided at the end, not a sum of weighted codes: rounding must not depend on whether a slot is empty.
    weights = None if filled else (ids >= 0).to(codes.dtype)
    total: Tensor = embedding_bag(ids if filled else ids.clamp(min=0), codes, mode="sum", per_sample_weights=weights)
    if reduce == "sum":
        return total
    return total.div_(ids.shape[1] if filled else _counted(ids))


def decode_groups(
    ids: Int[Tensor, "row group slot"], codes: Float[Tensor, "group code d_group"], reduce: str
) -> Float[Tensor, "row group d_group"]:
    """Equal `definition.decode` (in the dtype of the codes, added up in fp32 or more) without ``[row group slot d_group]``."""
    n_groups, n_codes, d_group = codes.shape
    table = codes if codes.dtype == torch.float64 else codes.float()  # half precision would stop adding up at 256 (bf16) or 2048 (fp16)
    offsets = torch.arange(n_groups, device=ids.device).unsqueeze(-1) * n_codes
    flat = torch.where(ids >= 0, ids + offsets, ids) if n_groups > 1 else ids
    return decode_rows(flat.flatten(0, 1), table.flatten(0, 1), reduce).view(*ids.shape[:-1], d_group).to(codes.dtype)


def codes_gradient(
    grad: Float[Tensor, "row group d_group"], ids: Int[Tensor, "row group slot"], n_codes: int, reduce: str
) -> Float[Tensor, "group code d_group"]:
    """Return the gradient of the codes from that of the decoded vectors, in the dtype of `grad`.

    Slots are sorted by code; each code then adds up the gradient rows that its slots point to, in the order of the rows.
    """
    _, n_groups, d_group = grad.shape
    n_slots, n_bags = ids.shape[-1], n_groups * n_codes
    if ids.numel() == 0:
        return grad.new_zeros(n_groups, n_codes, d_group)
    exact = grad if grad.dtype == torch.float64 else grad.float()
    if reduce == "mean" and n_slots > 1:  # of one slot the mean is the slot
        exact = exact / _counted(ids)
    exact = exact.reshape(-1, d_group)
    offsets = torch.arange(n_groups, device=ids.device).unsqueeze(-1) * n_codes
    flat = torch.where(ids >= 0, ids + offsets, n_bags).flatten()  # empty slots go to one bag beyond the last
    places = flat.to(torch.int32) if n_bags < 2**31 - 1 else flat
    order = torch.sort(places, stable=True).indices
    ends = torch.bincount(flat, minlength=n_bags + 1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    sources = order // n_slots
    if not grad.is_cuda:
        total = embedding_bag(sources[: int(starts[-1])], exact, starts[:-1], mode="sum")
    else:
        total = _in_runs(sources, exact, starts)
    return total.view(n_groups, n_codes, d_group).to(grad.dtype)


def _in_runs(
    sources: Int[Tensor, " slot"], rows: Float[Tensor, "row d_group"], starts: Int[Tensor, " bag"]
) -> Float[Tensor, "code d_group"]:
    """Add up bags in runs of at most `_RUN` slots, then the runs of each bag: the same every time, and no bag takes long.

    Every shape is known beforehand, so nothing waits for the device.
    """
    cuts = torch.cat([starts, torch.arange(0, max(1, len(sources)), _RUN, device=starts.device)]).sort().values
    runs = embedding_bag(sources, rows, cuts, mode="sum")
    first = torch.searchsorted(cuts, starts)
    return embedding_bag(torch.arange(len(cuts), device=cuts.device), runs, first, mode="sum")[:-1]


class _StraightThrough(torch.autograd.Function):
    # y + (q - y) would round, and q + (y - y) pass over memory three times.
    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor) -> Tensor:
        return q.clone()  # a view could not be edited in place, which hooks do

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def straight_through(y: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"], to_codes: bool = True) -> Float[Tensor, "*shape"]:
    """Return `q` with the gradient passed on to `y`, and to `q` itself where `to_codes` is true."""
    q = q if to_codes else q.detach()
    if not torch.is_grad_enabled() or not (y.requires_grad or q.requires_grad):
        return q
    out: Tensor = _StraightThrough.apply(y, q)
    return out
