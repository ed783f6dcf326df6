"""Whether a fast answer is right: chosen codes against scores in float64, and gradients against a sum in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.benchmarks.cases import Case
from tl_codebook.snap import definition

__all__ = ["CHECKED_ROWS", "gradient_error", "wrong_rows"]

CHECKED_ROWS = 64
"""Rows looked at, evenly spread; each counts once per group."""
_NEAR = 1e-6
"""Two scores closer than this, in units of the largest score there could be, are a tie: fp32 cannot tell them apart."""


def wrong_rows(
    case: Case, x: Float[Tensor, "row group d_group"], codes: Float[Tensor, "group code d_group"], ids: Int[Tensor, "row group k"]
) -> tuple[float, int]:
    """Return the share of rows with a code that float64 would not have chosen, near-ties apart, and how many rows were looked at.

    Greedy pursuit is checked step by step from the codes that were chosen before, so that a tie does not count against what follows it.
    """
    rows = torch.linspace(0, x.shape[0] - 1, min(CHECKED_ROWS, x.shape[0]), device=x.device).round().long()
    x, ids = x[rows].double(), ids.to(x.device)[rows]
    wrong = torch.zeros(ids.shape[:2], dtype=torch.bool, device=x.device)
    for g in range(codes.shape[0]):  # one group at a time: all scores in float64 are large
        wrong[:, g] = _wrong(case, x[:, g : g + 1], codes[g : g + 1].double(), ids[:, g : g + 1]).squeeze(1)
    return float(wrong.double().mean()), wrong.numel()


def _wrong(case: Case, x: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    inside = (ids >= 0) & (ids < codes.shape[1])
    ids = torch.where(inside, ids, 0)
    norms = codes.norm(dim=-1).amax()
    near = _NEAR * x.norm(dim=-1) * (1.0 if case.similarity == "inner_product" else norms)
    if case.similarity == "euclidean":
        near = near + _NEAR * norms.square() / 2
    bad = ~inside.all(-1)
    if case.selection == "nearest":
        table = definition.scores(x, codes, case.similarity)
        least = table.topk(case.shape.k, dim=-1).values[..., -1]
        repeated = (ids.sort(-1).values.diff(dim=-1) == 0).any(-1)
        return bad | repeated | (table.gather(-1, ids).amin(-1) < least - near)
    rest = x
    for slot in range(ids.shape[-1]):
        table = definition.scores(rest, codes, case.similarity)
        chosen = ids[..., slot : slot + 1]
        bad = bad | (table.gather(-1, chosen).squeeze(-1) < table.amax(-1) - near)
        rest = rest - definition.decode(chosen, codes, "sum")
    return bad


def gradient_error(
    case: Case,
    gradient: Float[Tensor, "group code d_group"],
    upstream: Float[Tensor, "row group d_group"],
    ids: Int[Tensor, "row group k"],
) -> float:
    """Return the largest error of the gradient of the codes, over the largest entry of the one summed up in float64."""
    exact = torch.zeros_like(gradient, dtype=torch.float64)
    weight = 1.0 / case.shape.k if case.reduce == "mean" else 1.0
    for g in range(gradient.shape[0]):
        for slot in range(ids.shape[-1]):
            exact[g].index_add_(0, ids[:, g, slot].to(exact.device), upstream[:, g].double() * weight)
    return float((gradient.double() - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
