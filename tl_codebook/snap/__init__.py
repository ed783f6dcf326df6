"""Snap vectors to codes. The callers of this package use `snap`, `select` and `decode` and do not know which path serves them.

`definition` says what is right, `cpu` and `gpu` are fast, `ops` makes operators of them. Axes: ``batch pos group code k d_in d_group layer
head``; ``*lead`` stands for any leading axes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_codebook.errors import ConfigError, InvalidCodeError, ShapeError
from tl_codebook.snap.gradients import straight_through, through
from tl_codebook.snap.ops import choose_and_decode, choose_ids, decode_ids

__all__ = ["decode", "select", "snap", "straight_through", "through"]

_CHOICES = {"similarity": ("euclidean", "inner_product"), "selection": ("residual", "nearest"), "reduce": ("sum", "mean")}


def _check_dense(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
        raise ShapeError(f"{name} is a {tensor.dtype} {tensor.layout} tensor on {tensor.device}. Give dense floating-point values.")


def _check(x: Tensor, codes: Tensor, k: int, disabled: Tensor | None, **choices: str) -> None:
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            raise ConfigError(f"{name}={value!r} is not known. Choose one of {list(_CHOICES[name])}.")
    _check_dense("x", x)
    _check_dense("codes", codes)
    if codes.ndim != 3 or x.ndim < 2 or x.shape[-2:] != (codes.shape[0], codes.shape[2]):
        raise ShapeError(
            f"x is {tuple(x.shape)} and codes are {tuple(codes.shape)}. Give x [..., group d_group] and codes [group code d_group] with "
            "the same group and d_group."
        )
    if x.device != codes.device:
        raise ShapeError(f"x is on {x.device}, the codes are on {codes.device}. Bring them to one device.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= codes.shape[1]:
        raise ConfigError(f"k={k!r} codes of {codes.shape[1]} were asked for. Give a whole number, 1 <= k <= {codes.shape[1]}.")
    if disabled is not None and (disabled.dtype != torch.bool or disabled.device != x.device):
        raise ShapeError(f"disabled is {disabled.dtype} on {disabled.device}. Give bools on {x.device}.")


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])  # -1 would be ambiguous where an axis is empty


def _rows(x: Tensor, codes: Tensor, disabled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows = _flat(x)
    if disabled is None:
        return rows, None
    shape = (*x.shape[:-1], codes.shape[1])
    try:
        spread = disabled.expand(shape)
    except RuntimeError as error:
        raise ShapeError(f"disabled is {tuple(disabled.shape)}. Give what spreads to {shape}: [..., group code].") from error
    if all(size == 1 for size in disabled.shape[:-2]):  # the same codes everywhere: one row says it
        return rows, _flat(spread[(slice(1),) * (x.ndim - 2)])
    return rows, _flat(spread)


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

    Scores are fp32 (fp64 for fp64 input) even under autocast; equal scores go to the lowest id, a zero code scores 0. Codes that are
    `disabled` are never chosen: where fewer than k are left, the last slots are -1, and so are all slots of a vector with NaN or Inf.

    Raises:
        ShapeError: for tensors that do not fit each other.
        ConfigError: for k or a choice that cannot be.

    >>> codes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    >>> select(torch.tensor([[2.0, 3.0]]), codes, 2)
    tensor([[2, 1]])
    """
    _check(x, codes, k, disabled, similarity=similarity, selection=selection)
    rows, disabled = _rows(x, codes, disabled)
    return choose_ids(rows, codes, k, similarity, selection, disabled).reshape(*x.shape[:-1], k)


def decode(
    ids: Int[Tensor, "*lead group slot"], codes: Float[Tensor, "group code d_group"], reduce: str = "sum"
) -> Float[Tensor, "*lead group d_group"]:
    """Turn ids back into vectors: the sum or the mean of their codes.

    An id of -1 is an empty slot: it contributes zero, and a mean still counts it. An id of -2 is no slot: a mean does not count it.
    Ids are trusted to be below the number of codes (`attach` checks what hooks return).

    >>> codes = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
    >>> decode(torch.tensor([[2, 1]]), codes)
    tensor([[2., 3.]])
    """
    if reduce not in _CHOICES["reduce"]:
        raise ConfigError(f"reduce={reduce!r} is not known. Choose one of {list(_CHOICES['reduce'])}.")
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise InvalidCodeError(f"ids are {ids.dtype}. Give integers.")
    _check_dense("codes", codes)
    if codes.ndim != 3 or ids.ndim < 2 or ids.shape[-2] != codes.shape[0] or ids.device != codes.device:
        raise ShapeError(
            f"ids are {tuple(ids.shape)} on {ids.device} and codes {tuple(codes.shape)} on {codes.device}. Give ids [..., group slot] and "
            "codes [group code d_group] on one device."
        )
    return decode_ids(_flat(ids.long()), codes, reduce).reshape(*ids.shape[:-1], codes.shape[-1])


def snap(
    x: Float[Tensor, "*lead group d_group"],
    codes: Float[Tensor, "group code d_group"],
    k: int,
    *,
    similarity: str = "euclidean",
    selection: str = "residual",
    reduce: str = "sum",
    through: bool = True,
) -> tuple[Float[Tensor, "*lead group d_group"], Int[Tensor, "*lead group k"]]:
    """Choose codes and decode them in one go; returns vectors (in the dtype of the codes) and ids.

    The vectors equal `decode` of the ids bit for bit. Their gradient goes to the codes and, with `through`, unchanged to `x` as well. A
    vector with NaN or Inf comes back as NaN, with ids of -1. Raises as `select` does.

    >>> x = torch.tensor([[2.0, 3.0]], requires_grad=True)
    >>> out, ids = snap(x, torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), 1)
    >>> out.tolist(), ids.tolist()
    ([[2.0, 2.0]], [[1]])
    """
    _check(x, codes, k, None, similarity=similarity, selection=selection, reduce=reduce)
    rows = _flat(x)
    out, ids = choose_and_decode(rows.detach(), codes, k, similarity, selection, reduce, None)
    out, ids = out.reshape(x.shape), ids.reshape(*x.shape[:-1], k)
    return (straight_through(x.to(codes.dtype), out) if through else out), ids
