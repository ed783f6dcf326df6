"""How often each code fires, and how well the codes fit."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Usage"]


class Usage:
    """Running totals over the activations that a codebook has snapped: how often each code fired, and how well it fitted.

    Plain tensors rather than buffers: casting a model to bf16 must not round them and DDP must not overwrite them.
    """

    FIELDS = ("counts", "n_vectors", "error", "total", "square", "input_norms", "output_norms")

    def __init__(self, n_groups: int, n_codes: int, d_group: int, device: torch.device | str | None = None):
        self.counts: Int[Tensor, "group code"] = torch.zeros(n_groups, n_codes, dtype=torch.long, device=device)
        self.n_vectors: Int[Tensor, ""] = torch.zeros((), dtype=torch.long, device=device)
        self.error: Float[Tensor, " group"] = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.total: Float[Tensor, "group d_group"] = torch.zeros(n_groups, d_group, dtype=torch.float64, device=device)
        self.square: Float[Tensor, " group"] = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.input_norms: Float[Tensor, " group"] = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.output_norms: Float[Tensor, " group"] = torch.zeros(n_groups, dtype=torch.float64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the totals by name."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def reset(self) -> None:
        """Start again from zero."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def to(self, device: torch.device) -> None:
        """Move the totals; done by the codebook when the activations come from another device."""
        if self.counts.device != device:
            with torch.inference_mode(False):
                for name, tensor in self.tensors().items():
                    setattr(self, name, tensor.to(device))

    def add(
        self,
        y: Float[Tensor, "*lead group d_group"],
        q: Float[Tensor, "*lead group d_group"],
        ids: Int[Tensor, "*lead group k"],
        mask: Bool[Tensor, "*lead"] | None,
    ) -> None:
        """Count the ids and errors of the positions where `mask` is true; ids below zero are no activation."""
        self.to(y.device)
        n_groups, n_codes = self.counts.shape
        y, q, ids = y.flatten(0, -3).double(), q.flatten(0, -3).double(), ids.flatten(0, -3)
        keep = torch.ones(y.shape[0], dtype=torch.bool, device=y.device) if mask is None else mask.reshape(-1)
        keep = keep & torch.isfinite(y).all(-1).all(-1)
        y, q = y.masked_fill(~keep[:, None, None], 0.0), q.masked_fill(~keep[:, None, None], 0.0)
        fired = (ids >= 0) & keep[:, None, None]
        rows = ids.clamp(min=0) + torch.arange(n_groups, device=ids.device)[:, None] * n_codes
        self.counts.view(-1).index_add_(0, rows.reshape(-1), fired.reshape(-1).long())
        self.n_vectors += keep.sum()
        self.error += (q - y).square().sum((0, -1))
        self.total += y.sum(0)
        self.square += y.square().sum((0, -1))
        self.input_norms += torch.linalg.vector_norm(y, dim=-1).sum(0)
        self.output_norms += torch.linalg.vector_norm(q, dim=-1).sum(0)

    @property
    def dead_fraction(self) -> float:
        """Share of codes that have not fired, 0 to 1."""
        return float((self.counts == 0).double().mean())

    @property
    def perplexity(self) -> Float[Tensor, " group"]:
        """Return exp(entropy) of the codes per group: the number of codes in equal use, 1 to n_codes."""
        share = self.counts.double() / self.counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.exp(-torch.xlogy(share, share).sum(-1))

    @property
    def unexplained(self) -> Float[Tensor, " group"]:
        """Return the fraction of variance unexplained per group: squared error over squared distance to the mean input."""
        n = self.n_vectors.clamp(min=1)
        variance = self.square - self.total.square().sum(-1) / n
        return self.error / variance.clamp(min=torch.finfo(torch.float64).tiny)
