"""The snap as operators of torch: what torch.compile, FakeTensor, autocast and inference mode need to know about it.

Each works on ``[row group ...]`` tensors that `tl_codebook.snap` has checked, picks the path for the device, and computes scores in fp32
(fp64 for fp64) whatever autocast says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_codebook.snap import cpu, definition, gradients

__all__ = ["choose_and_decode", "choose_ids", "decode_ids"]

_SCORES_AT_ONCE = 2**22  # of the definition, which holds them several times over


def _by_definition(
    x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, reduce: str | None, disabled: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    ids = definition.choose_in_parts(x, codes, k, similarity, selection, disabled, _SCORES_AT_ONCE)
    return (None if reduce is None else gradients.decode_groups(ids, codes, reduce)), ids


def _run(
    x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, reduce: str | None, disabled: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    path: Any
    if torch.float64 in (x.dtype, codes.dtype):
        path = _by_definition
    elif x.is_cuda:
        from tl_codebook.snap import gpu

        path = gpu.snap
    else:
        path = cpu.snap if x.device.type == "cpu" else _by_definition
    with torch.autocast(device_type=x.device.type, enabled=False):
        if disabled is None:
            out, ids = path(x.detach(), codes.detach(), k, similarity, selection, reduce, None)
        else:
            ids = path(x.detach(), codes.detach(), k, similarity, selection, None, disabled)[1]
            ids = ids.masked_fill(
                disabled.expand(x.shape[0], -1, -1).gather(-1, ids), -1
            )  # fewer enabled codes than slots: the rest stays empty
            out = None if reduce is None else _decode(ids, codes.detach(), reduce)
        # NaN and Inf have no order: such a row must not come out as a valid code. A finite sum has finite terms.
        if x.is_cuda or not torch.isfinite(x.sum()):
            wrong = ~torch.isfinite(x).all(-1, keepdim=True)
            ids = ids.masked_fill(wrong, -1)
            out = None if out is None else out.masked_fill(wrong, torch.nan)
    return out, ids


def _decode(ids: Tensor, codes: Tensor, reduce: str) -> Tensor:
    if codes.is_cuda and codes.dtype != torch.float64:
        from tl_codebook.snap import gpu

        return gpu.decode(ids, codes, reduce)
    return gradients.decode_groups(ids, codes, reduce)


# Schemas are written out: torch cannot infer them from functions that a runtime type checker has wrapped.
@torch.library.custom_op(
    "tl_codebook::choose",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, int k, str similarity, str selection, Tensor? disabled) -> Tensor",
)
def choose_ids(x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, disabled: Tensor | None) -> Tensor:
    """Return the ids of the k codes of every row and group."""
    return _run(x, codes, k, similarity, selection, None, disabled)[1]


@choose_ids.register_fake
def _(x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, disabled: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], k, dtype=torch.long)


@torch.library.custom_op(
    "tl_codebook::snap",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, int k, str similarity, str selection, str reduce, Tensor? disabled) -> (Tensor, Tensor)",
)
def choose_and_decode(
    x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, reduce: str, disabled: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the decoded vectors, in the dtype of the codes, and the ids; the gradient goes to the codes alone."""
    out, ids = _run(x, codes, k, similarity, selection, reduce, disabled)
    assert out is not None
    return out, ids


@choose_and_decode.register_fake
def _(x: Tensor, codes: Tensor, k: int, similarity: str, selection: str, reduce: str, disabled: Tensor | None) -> tuple[Tensor, Tensor]:
    return codes.new_empty(x.shape), x.new_empty(*x.shape[:2], k, dtype=torch.long)


@torch.library.custom_op("tl_codebook::decode", mutates_args=(), schema="(Tensor ids, Tensor codes, str reduce) -> Tensor")
def decode_ids(ids: Tensor, codes: Tensor, reduce: str) -> Tensor:
    """Return the sum or mean of the codes of the ids."""
    with torch.autocast(device_type=codes.device.type, enabled=False):
        return _decode(ids, codes.detach(), reduce)


@decode_ids.register_fake
def _(ids: Tensor, codes: Tensor, reduce: str) -> Tensor:
    return codes.new_empty(*ids.shape[:2], codes.shape[-1])


@torch.library.custom_op(
    "tl_codebook::decode_backward", mutates_args=(), schema="(Tensor grad, Tensor ids, int n_codes, str reduce) -> Tensor"
)
def _codes_gradient(grad: Tensor, ids: Tensor, n_codes: int, reduce: str) -> Tensor:
    with torch.autocast(device_type=grad.device.type, enabled=False):
        return gradients.codes_gradient(grad, ids, n_codes, reduce)


@_codes_gradient.register_fake
def _(grad: Tensor, ids: Tensor, n_codes: int, reduce: str) -> Tensor:
    return grad.new_empty(grad.shape[1], n_codes, grad.shape[2])


def _keep_for_snap(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.n_codes, ctx.reduce = inputs[1].shape[1], inputs[5]


def _keep_for_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.n_codes, ctx.reduce = inputs[1].shape[1], inputs[2]


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.reduce = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> Tensor | None:
    (ids,) = ctx.saved_tensors
    return _codes_gradient(grad, ids, ctx.n_codes, ctx.reduce) if ctx.needs_input_grad[1] else None


choose_and_decode.register_autograd(
    lambda ctx, grad, _: (None, _backward(ctx, grad), None, None, None, None, None), setup_context=_keep_for_snap
)
decode_ids.register_autograd(lambda ctx, grad: (None, _backward(ctx, grad), None), setup_context=_keep_for_decode)
# Decoding is linear in the codes: the gradient of its gradient is decoding again.
_codes_gradient.register_autograd(
    lambda ctx, grad: (decode_ids(ctx.saved_tensors[0], grad, ctx.reduce), None, None, None), setup_context=_keep_for_gradient
)
