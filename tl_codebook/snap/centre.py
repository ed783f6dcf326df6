"""A point near the codes to measure from, so that Euclidean scores keep their digits where activations have a large common offset."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["centre"]

_SIGNIFICANT_BITS = 6


def centre(codes: Float[Tensor, "group code d_group"]) -> Float[Tensor, "group 1 d_group"]:
    """Return the mean code of each group, rounded to a coarse grid, in fp32 (fp64 for fp64 codes).

    Shifting inputs and codes by the same vector leaves every Euclidean ranking as it was. The grid (six bits of the largest component)
    keeps sums of small integers exact in fp32, so that codes which tie before the shift tie after it.

    >>> centre(torch.tensor([[[300.3, 0.01], [301.1, 0.02]]])).tolist()
    [[[304.0, 0.0]]]
    """
    mean = (codes if codes.dtype == torch.float64 else codes.float()).mean(1, keepdim=True)
    largest = mean.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)
    grid = torch.ldexp(torch.ones_like(largest), exponent - _SIGNIFICANT_BITS)
    return torch.where(largest > 0, (mean / grid).round() * grid, 0.0)
