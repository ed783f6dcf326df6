"""The figures of a codebook model, each defined in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_codebook.codebook import Usage

__all__ = ["summarise_codes", "summarise_sums"]


def summarise_sums(prediction: Any) -> dict[str, float]:
    """Turn sums per sequence (loss, tokens, correct) into the loss in nats per token and the accuracy, 0 to 1.

    >>> from types import SimpleNamespace
    >>> summarise_sums(SimpleNamespace(predictions=torch.tensor([[6.0, 3, 1], [2.0, 1, 1]])))
    {'loss': 2.0, 'accuracy': 0.5, 'tokens': 4.0}
    """
    loss, tokens, correct = torch.as_tensor(prediction.predictions).double().sum(0).tolist()
    return {"loss": loss / max(tokens, 1), "accuracy": correct / max(tokens, 1), "tokens": tokens}


def summarise_codes(usages: Mapping[str, Usage], summed: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
    """Return the share of dead codes, the mean perplexity of a group and the mean fraction of variance unexplained, over all codebooks.

    Empty where nothing was counted (codebooks bypassed): a share of nothing is no figure.

    Args:
        usages: What was counted, by hook name (`count_usage`).
        summed: Adds a tensor up over processes.
    """
    totals: list[Usage] = []
    for usage in usages.values():
        n_groups, d_group = usage.total.shape
        total = Usage(n_groups, usage.counts.shape[1], d_group)
        for name, tensor in usage.tensors().items():
            setattr(total, name, summed(tensor))
        totals.append(total)
    if not any(int(total.n_vectors) for total in totals):
        return {}
    dead = sum(int((total.counts == 0).sum()) for total in totals)
    codes = sum(total.counts.numel() for total in totals)
    return {
        "dead_codes": dead / max(codes, 1),
        "code_perplexity": float(torch.cat([total.perplexity for total in totals]).mean()),
        "unexplained_variance": float(torch.cat([total.unexplained for total in totals]).mean()),
    }
