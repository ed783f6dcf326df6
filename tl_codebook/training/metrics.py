"""The figures of a codebook model, each defined in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_codebook.codebook import Codebook
from tl_codebook.names import Address
from tl_codebook.usage import Usage

__all__ = ["site_figures", "summarise_codes", "summarise_sums"]


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
    totals = list(_totals(usages, summed).values())
    if not any(int(total.n_vectors) for total in totals):
        return {}
    dead = sum(int((total.counts == 0).sum()) for total in totals)
    codes = sum(total.counts.numel() for total in totals)
    return {
        "dead_codes": dead / max(codes, 1),
        "code_perplexity": float(torch.cat([total.perplexity for total in totals]).mean()),
        "unexplained_variance": float(torch.cat([total.unexplained for total in totals]).mean()),
    }


@torch.no_grad()
def site_figures(
    usages: Mapping[str, Usage], books: Mapping[str, Codebook], summed: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, dict[str, float]]:
    """Return the figures that the original library logs, for each site by its label and for ``all``.

    ==================  ============================================================================================
    figure              meaning; vectors are those of a group, inputs after the LayerNorm where there is one
    ==================  ============================================================================================
    ``dead_codes``      share of codes that have not fired, 0 to 1
    ``mse``             squared distance of output and input (summed over dimensions), mean over positions and groups
    ``input_norm``      length of the inputs, mean over positions and groups
    ``output_norm``     length of the outputs, likewise
    ``mean_code_norm``  length of the codes as they are now, mean
    ``max_code_norm``   length of the longest code
    ==================  ============================================================================================

    ``all`` is the share of all codes, the longest of all, and for the others the mean over the sites. Sites where nothing was counted
    (codebooks bypassed) are left out; empty where there is no other.

    Args:
        usages: What was counted, by hook name (`count_usage`).
        books: The codebooks, by hook name (`attach` returns them).
        summed: Adds a tensor up over processes.

    Source: codebook-features 0.1.2, ``CodebookTrainer.log``, by layer there.

    >>> from tl_codebook import attach, count_usage
    >>> books = attach(model, "mlp_out", n_codes=16, k=2)
    >>> with count_usage(model) as usages:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> list(site_figures(usages, books))
    ['L0.mlp_out', 'L1.mlp_out', 'all']
    """
    totals = {name: total for name, total in _totals(usages, summed).items() if int(total.n_vectors)}
    figures: dict[str, dict[str, float]] = {}
    for name, total in totals.items():
        norms = books[name].codes.float().norm(dim=-1)
        figures[str(Address.parse(name))] = {
            "dead_codes": total.dead_fraction,
            "mse": float((total.error / total.n_vectors).mean()),
            "input_norm": float((total.input_norms / total.n_vectors).mean()),
            "output_norm": float((total.output_norms / total.n_vectors).mean()),
            "mean_code_norm": float(norms.mean()),
            "max_code_norm": float(norms.max()),
        }
    if not figures:
        return {}
    every = {key: sum(site[key] for site in figures.values()) / len(figures) for key in next(iter(figures.values()))}
    dead = sum(int((total.counts == 0).sum()) for total in totals.values())
    every["dead_codes"] = dead / sum(total.counts.numel() for total in totals.values())
    every["max_code_norm"] = max(site["max_code_norm"] for site in figures.values())
    return figures | {"all": every}


def _totals(usages: Mapping[str, Usage], summed: Callable[[Tensor], Tensor]) -> dict[str, Usage]:
    """Add up what the processes counted."""
    totals: dict[str, Usage] = {}
    for site, usage in usages.items():
        n_groups, d_group = usage.total.shape
        totals[site] = Usage(n_groups, usage.counts.shape[1], d_group)
        for name, tensor in usage.tensors().items():
            setattr(totals[site], name, summed(tensor))
    return totals
