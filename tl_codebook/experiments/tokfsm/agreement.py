"""Whether two labellings of the same positions are the same up to names: the codes found from two seeds, for example."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.errors import DataError, ShapeError

__all__ = ["adjusted_mutual_information", "matched_agreement"]


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of labels that occur [pair 2], numbered from 0 on either side, and how often; then the sizes of the labels."""
    if a.shape != b.shape:
        raise ShapeError(f"labels of {len(a)} and of {len(b)} positions were given. Give both over the same positions.")
    if not len(a):
        raise DataError("labels of no position were given, which neither agree nor differ. Give one position or more.")
    first, second = (torch.unique(labels.cpu().long(), return_inverse=True)[1] for labels in (a, b))
    n_second = int(second.max()) + 1
    flat, counts = torch.unique(first * n_second + second, return_counts=True)
    return torch.stack([flat // n_second, flat % n_second], dim=1), counts, torch.stack([first, second])


def _entropy(sizes: Tensor) -> Tensor:
    share = sizes.double() / sizes.sum()
    return -(share * share.log()).sum()


def _expected_information(rows: Int[Tensor, " _"], columns: Int[Tensor, " _"]) -> Float[Tensor, ""]:
    """Return the mean mutual information, in nats, of two labellings of these sizes, over all ways to deal one of them out.

    The count of a pair of labels is hypergeometric, and depends on their two sizes alone: each pair of distinct sizes is computed once.
    The terms of one row size are laid out one after the other, at most as many as there are positions.
    """
    n = int(rows.sum())
    log_factorial = torch.lgamma(torch.arange(n + 1, dtype=torch.double) + 1)
    logs = torch.arange(n + 1, dtype=torch.double).clamp(min=1).log()
    column, n_columns = torch.unique(columns, return_counts=True)
    total = torch.zeros((), dtype=torch.double)
    for row, n_rows in zip(*(values.tolist() for values in torch.unique(rows, return_counts=True)), strict=True):
        least, most = (column + row - n).clamp(min=1), column.clamp(max=row)
        terms = (most - least + 1).clamp(min=0)
        size, weight = column.repeat_interleave(terms), n_columns.repeat_interleave(terms)
        together = torch.arange(int(terms.sum())) - (terms.cumsum(0) - terms - least).repeat_interleave(terms)
        chance = log_factorial[row] + log_factorial[n - row] - log_factorial[n] + log_factorial[size] + log_factorial[n - size]
        for part in (together, row - together, size - together, n - row - size + together):
            chance = chance - log_factorial[part]
        information = together.double() / n * (logs[together] + logs[n] - logs[row] - logs[size])
        total += n_rows * (weight * information * chance.exp()).sum()
    return total


def adjusted_mutual_information(a: Int[Tensor, " n"], b: Int[Tensor, " _"]) -> float:
    """Return the mutual information of two labellings, less what chance gives, as a share of what it can be at most.

    It is 1 for labellings that are the same up to names, about 0 for independent ones, and may be below 0. What chance gives is exact
    (labels of the same sizes, dealt out at random); what it can be at most is taken as the arithmetic mean of the two entropies.

    Args:
        a, b: The labels of the same positions: any integers. One below 0 is a label like any other; leave out first what is not to count.

    Raises:
        DataError: no position.
        ShapeError: different numbers of positions.

    Source: Vinh, Epps and Bailey 2010, "Information Theoretic Measures for Clusterings Comparison", section 4 (AMI_sum).

    >>> adjusted_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 3, 3]))
    1.0
    >>> round(adjusted_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])), 6)
    -0.5
    """
    pairs, counts, labels = _pairs(a, b)
    rows, columns = (torch.bincount(side) for side in labels)
    if len(counts) == len(rows) == len(columns):  # the same partition, where the quotient may be 0 / 0 (all in one, or each alone)
        return 1.0
    sizes = rows[pairs[:, 0]].double(), columns[pairs[:, 1]].double()
    joint = counts.double() / len(a)
    information = (joint * (joint.log() + 2 * math.log(len(a)) - sizes[0].log() - sizes[1].log())).sum()
    expected = _expected_information(rows, columns)
    most = (_entropy(rows) + _entropy(columns)) / 2
    return float((information - expected) / (most - expected))


def matched_agreement(a: Int[Tensor, " n"], b: Int[Tensor, " _"]) -> float:
    """Return the share of positions, 0 to 1, that agree once the labels of one side are renamed, one to one, in the best way.

    A label of the larger side that is left without a partner agrees nowhere.

    Args:
        a, b: The labels of the same positions: any integers, as in `adjusted_mutual_information`.

    Raises:
        DataError: no position.
        ShapeError: different numbers of positions.

    >>> matched_agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 3, 7]))
    0.75
    """
    import networkx

    pairs, counts, _ = _pairs(a, b)
    graph = networkx.Graph()
    for (first, second), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        graph.add_edge(("a", first), ("b", second), weight=count)
    matching = networkx.max_weight_matching(graph)
    return sum(graph.edges[edge]["weight"] for edge in matching) / len(a)
