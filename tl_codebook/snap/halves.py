"""Nearest codes through a product in bf16, proven row by row: for processors that multiply bf16 several times as fast as fp32.

The product in bf16 names candidates; fp32 orders them. A row counts only with a proof that no other code can belong to its best: the last
code it keeps scores more than the highest score that any code outside the candidates may have, given what rounding can have taken from it.
The caller computes the other rows in fp32.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int, Int16
from torch import Tensor

from tl_codebook.snap import definition
from tl_codebook.snap.workers import scratch

__all__ = ["Halved", "halve", "nearest", "supported", "worth_it"]

_BLOCK = 16  # codes of which only the highest score is looked at first
_COLUMNS = 32  # the width of the product is a multiple of this
_PARTS = 3  # bf16 numbers that make up one fp32 number
_HALF_ULP = 2.0**-8  # of bf16, relative to the number
_SUM = 1.01 * 2.0**-24  # of fp32, and a little for what is rounded twice
_MOST_CODES = _BLOCK * 2**16  # places of blocks have 16 bits
_MOST = 1e37  # scores beyond this could meet infinity on the way


class Halved(NamedTuple):
    """The codes of a group in bf16, measured from their mean, and how far they and their products can be from the truth."""

    codes: BFloat16[Tensor, "padded width"]
    mean: Float[Tensor, " d_group"]
    mean_bias: float
    length: float  # of the longest code in bf16
    lost: float  # of the code that bf16 moved furthest
    span: float  # a row's length times this, plus what follows, is as large as the sums of its products can be
    bias_span: float
    bias_lost: float


def supported() -> bool:
    """Return whether this processor multiplies bf16 in hardware, and torch uses it."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # private: may vanish
    return torch.backends.mkldnn.is_available() and any(check is not None and check() for check in checks)


def worth_it(n_rows: int, n_codes: int, d_group: int, k: int, selection: str) -> bool:
    """Return whether a product in bf16 and its proof take less time than one in fp32."""
    if selection == "residual" and k > 1:
        return False
    # Limits from a prototype measured on a CPU with AVX512-BF16. Below 2 * d_group rows a copy of the codes does not pay.
    return k <= 16 and 4096 <= n_codes <= _MOST_CODES and d_group >= 256 and n_rows >= 2 * d_group


def _lengths(vectors: Float[Tensor, "vector width"]) -> Float[Tensor, " vector"]:
    """Return a bound of each length from above: more than the rounding of the sum, and than squares and numbers that vanish below fp32."""
    return torch.linalg.vector_norm(vectors, dim=1) * 1.001 + math.sqrt(vectors.shape[1]) * 2.0**-60


@cache
def _quiet() -> None:
    """Make torch say now, unheard, what it says once in a process about CSR tensors."""
    with catch_warnings():
        simplefilter("ignore")
        _products(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))


def halve(codes: Float[Tensor, "code d_group"], scale: Float[Tensor, " code"] | None, bias: Float[Tensor, " code"] | None) -> Halved:
    """Return codes in bf16 with their scale built in, and minus their bias in parts as further columns.

    A vector taken from every code changes no ranking. Without their mean codes are shorter, and bf16 loses less of them.
    """
    _quiet()
    n_codes, d_group = codes.shape
    width = d_group + (0 if bias is None else _PARTS)
    half = torch.zeros(-(-n_codes // _BLOCK) * _BLOCK, -(-width // _COLUMNS) * _COLUMNS, dtype=torch.bfloat16)
    mean = codes.mean(0) if scale is None else torch.mv(codes.t(), scale) / n_codes
    longest = length = lost = mean_bias = bias_span = bias_lost = 0.0
    at_once = max(1, 2**18 // d_group)  # no second copy in fp32
    for start in range(0, n_codes, at_once):
        here = slice(start, min(start + at_once, n_codes))
        scaled = codes[here] if scale is None else codes[here] * scale[here].unsqueeze(1)
        centred = scaled - mean
        own = half[here, :d_group].copy_(centred)
        longest = max(longest, _lengths(scaled).max().item())
        length = max(length, _lengths(own.float()).max().item())
        lost = max(lost, _lengths(centred - own).max().item())
    if bias is not None:
        mean_bias = bias.mean().item()
        rest = mean_bias - bias
        for column in range(d_group, width):
            half[:n_codes, column] = rest
            rest -= half[:n_codes, column]
        bias_span = 2 * bias.abs().max().item() + half[:, d_group:width].float().abs().sum(1).max().item()
        bias_lost = rest.abs().max().item()
    # Three sums are rounded: the product, the score again in fp32, and the score of the mean.
    return Halved(half, mean, mean_bias, length, lost, 2 * longest + length, bias_span, bias_lost)


def _highest(bits: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the n highest integers of each row, in no order, and the lowest of these integers."""
    keys = scratch("keys", bits.shape, torch.int32).numpy()
    np.multiply(bits, 2**16, out=keys, dtype=np.int32)
    keys |= np.arange(bits.shape[1], dtype=np.int32)  # no two are equal: as scores in bf16 often are
    keys.partition(bits.shape[1] - n, axis=1)
    best = keys[:, -n:]
    return best & 0xFFFF, best[:, 0] >> 16


def _candidates(bits: Int16[Tensor, "row padded"], n: int) -> tuple[Int[Tensor, "row candidate"], Int[np.ndarray, " row"]]:
    """Return the places of the n highest integers of each row, rising, and the lowest of these integers.

    Integers, because maxima of them vectorise. The bits of bf16 numbers are in the order of the numbers where these are positive, and all
    below these where they are negative: where the lowest of the n is positive, the n are the highest numbers too.
    """
    n_rows, n_blocks = bits.shape[0], bits.shape[1] // _BLOCK
    maxima = torch.amax(bits.view(n_rows, _BLOCK, n_blocks), 1, out=scratch("maxima", (n_rows, n_blocks), torch.int16))
    blocks = torch.from_numpy(_highest(maxima.numpy(), n)[0]).unsqueeze(1)
    members = (blocks + torch.arange(0, bits.shape[1], n_blocks).unsqueeze(1)).view(n_rows, -1)
    places, lowest = _highest(bits.gather(1, members).numpy(), n)
    return members.gather(1, torch.from_numpy(places).long()).sort(1).values, lowest


def _products(
    x: Float[Tensor, "row d_group"], codes: Float[Tensor, "code d_group"], ids: Int[Tensor, "row candidate"]
) -> Float[Tensor, "row candidate"]:
    """Return products in fp32 with a few codes per row, without ``[row candidate d_group]``.

    Each is one sum, made in the same order wherever its code stands: equal codes get equal products.
    """
    n_rows, n = ids.shape
    wanted = torch.sparse_csr_tensor(
        torch.arange(0, n_rows * n + 1, n), ids.reshape(-1), x.new_zeros(n_rows * n), (n_rows, codes.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(wanted, x, codes.t(), beta=0.0).values().view(n_rows, n)


def _highest_outside(
    x: Float[Tensor, "row d_group"], x_half: BFloat16[Tensor, "row width"], halved: Halved, lowest: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Return a score that no code exceeds whose score in bf16 is `lowest`, a positive number, or less; inf where there is no telling.

    With ^ for bf16, x m - ^x ^m = (x - ^x) ^m + x (m - ^m), and no product of vectors exceeds that of their lengths. Added up in fp32, in
    whatever order, n numbers are off by less than n half ulps of the sum of their sizes. Then bf16 rounds the result.
    """
    length = _lengths(x)
    moved = torch.sub(x, x_half[:, : x.shape[1]], out=scratch("moved", tuple(x.shape), torch.float32))
    reach = length * halved.span + halved.bias_span
    error = _lengths(moved) * halved.length + length * halved.lost + halved.bias_lost + reach * ((x_half.shape[1] + 16) * _SUM)
    return torch.where(reach < _MOST, torch.mv(x, halved.mean) - halved.mean_bias + lowest * (1 + _HALF_ULP) + error, torch.inf)


def nearest(
    x: Float[Tensor, "row d_group"],
    codes: Float[Tensor, "code d_group"],
    scale: Float[Tensor, " code"] | None,
    bias: Float[Tensor, " code"] | None,
    halved: Halved,
    k: int,
) -> tuple[Int[Tensor, "row k"], Int[Tensor, " unproven"]]:
    """Return the k codes of each row with the best ``x @ codes^T * scale - bias``, equals by lowest id; and the rows without a proof."""
    n_rows, d_group = x.shape
    padded, width = halved.codes.shape
    x_half = scratch("half x", (n_rows, width), torch.bfloat16)
    x_half[:, :d_group] = x
    x_half[:, d_group:] = 1.0  # for the parts of the bias; beyond them the codes are zero
    scores = torch.mm(x_half, halved.codes.t(), out=scratch("half scores", (n_rows, padded), torch.bfloat16))
    ids, lowest = _candidates(scores.view(torch.int16), 2 * k + 8)
    ids.clamp_(max=codes.shape[0] - 1)  # beyond lie zeros, which are not positive
    exact = _products(x, codes, ids)
    if scale is not None:
        exact *= scale[ids]
    if bias is not None:
        exact -= bias[ids]
    places = definition.top_codes(exact, k)
    last = exact.gather(1, places[:, -1:]).squeeze(1)
    edge = torch.from_numpy(lowest.astype(np.int16)).view(torch.bfloat16).float()
    proven = (last > _highest_outside(x, x_half, halved, edge)) & (edge > 0)  # NaN proves nothing
    return ids.gather(1, places), (~proven).nonzero().squeeze(1)
