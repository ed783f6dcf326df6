"""Decoding, its gradient, and the estimators of the gradient of a snap.

Forward the snap gives exactly the decoded codes; backward the gradient goes to the codes that were chosen and, unchanged
(van den Oord et al. 2017, section 3.2) or rotated (Fifty et al. 2024, section 4), to the input. Neither direction of decoding holds
``[row k d_group]``, and neither adds floats in an order that can change.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from tl_codebook.errors import ConfigError

__all__ = ["ESTIMATORS", "codes_gradient", "decode_groups", "decode_rows", "straight_through", "through"]

ESTIMATORS = ("straight_through", "rotation")
"""How the gradient of a snap reaches its input: as it is, or turned and stretched as the snap turned and stretched the vector."""

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


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(y, q)
        return q.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        y, q = ctx.saved_tensors
        # The rotation is a constant, in a second derivative too.
        return (_rotated_back(grad, y.detach(), q.detach()) if ctx.needs_input_grad[0] else None), grad


def _rotated_back(
    grad: Float[Tensor, "*lead d_group"], y: Float[Tensor, "*lead d_group"], q: Float[Tensor, "*lead d_group"]
) -> Float[Tensor, "*lead d_group"]:
    """Return the gradient at y of y -> (|q| / |y|) R y, where R rotates the direction of y to that of q in their plane.

    R = I - 2 r r^T + 2 q' y'^T with y' and q' the directions and r that of y' + q', so its transpose needs two inner products.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    y, q, exact = y.to(dtype), q.to(dtype), grad.to(dtype)
    y_norm, q_norm = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) for vector in (y, q))
    y_unit, q_unit = y / y_norm, q / q_norm
    middle = y_unit + q_unit
    middle_norm = torch.linalg.vector_norm(middle, dim=-1, keepdim=True)
    limits = torch.finfo(dtype)
    # No direction (y or q is zero, too short to be squared, or NaN), no single plane (q points away from y), or a stretch beyond what the
    # dtype resolves: there the gradient passes straight through, which is finite. Comparisons with NaN are false.
    known = (torch.minimum(y_norm, q_norm) > limits.tiny**0.5) & (torch.maximum(y_norm, q_norm) < limits.max)
    known &= (y_norm > limits.eps * q_norm) & (middle_norm > limits.eps**0.5)
    r, y_unit, q_unit = (torch.where(known, vector, 0.0) for vector in (middle / middle_norm, y_unit, q_unit))
    stretch = torch.where(known, q_norm / y_norm, 1.0)
    along_r, along_q = ((vector * exact).sum(-1, keepdim=True) for vector in (r, q_unit))
    return (stretch * (exact - 2 * r * along_r + 2 * y_unit * along_q)).to(grad.dtype)


def straight_through(y: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"], to_codes: bool = True) -> Float[Tensor, "*shape"]:
    """Return `q` with the gradient passed on to `y`, and to `q` itself where `to_codes` is true."""
    return through(y, q, to_codes=to_codes)


def through(
    y: Float[Tensor, "*lead d_group"],
    q: Float[Tensor, "*lead d_group"],
    *,
    to_codes: bool = True,
    estimator: str = "straight_through",
    strength: float = 1.0,
) -> Float[Tensor, "*lead d_group"]:
    """Return `q`, or y + strength * (q - y), with a gradient for `y`.

    Args:
        y: What was snapped.
        q: What it was snapped to.
        to_codes: Pass the gradient on to `q` as well; it is the one that comes in, whatever the estimator.
        estimator: Pass the gradient on to `y` as it is (``straight_through``), or as that of y -> (|q| / |y|) R y (``rotation``), where
            the constant rotation R takes the direction of `y` to that of `q`; straight through where there is no such rotation.
        strength: How far from `y` to `q` the output lies, 0 to 1; at 1 it is `q` bit for bit.

    Source: Fifty et al. 2024 (arXiv 2410.06424), section 4.

    >>> y = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> through(y, torch.tensor([[0.0, 2.0]]), estimator="rotation").backward(torch.tensor([[1.0, 0.0]]))
    >>> [round(value) for value in y.grad[0].tolist()]  # a quarter of a turn back, and twice as long
    [0, -2]
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator={estimator!r} is not known. Choose one of {list(ESTIMATORS)}.")
    out = q if to_codes else q.detach()
    if torch.is_grad_enabled() and (y.requires_grad or out.requires_grad):
        out = (_Rotation if estimator == "rotation" else _StraightThrough).apply(y, out)
    return out if strength == 1 else torch.lerp(y, out, strength)
