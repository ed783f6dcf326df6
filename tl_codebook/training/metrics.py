"""The figures of a codebook model, each defined in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_codebook.codebook import Codebook, Usage

__all__ = ["summarise_codes", "summarise_sums"]


def summarise_sums(prediction: Any) -> dict[str, float]:
    """Turn sums per sequence (loss, tokens, correct) into the loss in nats per token and the accuracy, 0 to 1.

    >>> from types import SimpleNamespace
    >>> summarise_sums(SimpleNamespace(predictions=torch.tensor([[6.0, 3, 1], [2.0, 1, 1]])))
    {'loss': 2.0, 'accuracy': 0.5, 'tokens': 4.0}
    """
    loss, tokens, correct = torch.as_tensor(prediction.predictions).double().sum(0).tolist()
    return {"loss": loss / max(tokens, 1), "accuracy": correct / max(tokens, 1), "tokens": tokens}


def summarise_codes(books: Mapping[str, Codebook], summed: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
    """Return the share of dead codes, the mean perplexity of a group and the mean fraction of variance unexplained, over all codebooks.

    Args:
        books: Codebooks whose usage has been counted.
        summed: Adds a tensor up over processes.
    """
    totals: list[Usage] = []
    for book in books.values():
        total = Usage(book.n_groups, book.n_codes, book.d_group, book.codes.device)
        for name, tensor in book.usage.tensors().items():
            setattr(total, name, summed(tensor))
        totals.append(total)
    dead = sum(int((total.counts == 0).sum()) for total in totals)
    codes = sum(total.counts.numel() for total in totals)
    return {
        "dead_codes": dead / max(codes, 1),
        "code_perplexity": float(torch.cat([total.perplexity for total in totals]).mean()),
        "unexplained_variance": float(torch.cat([total.unexplained for total in totals]).mean()),
    }
