"""A machine read back from sequences of labels (codes, for example), and held against the true one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.machine import TokFSM, check_range

__all__ = ["EdgeScores", "majority_states", "read_automaton", "score_edges"]


class EdgeScores(NamedTuple):
    """How well the edges that were read are those of the machine; all 0 to 1."""

    precision: float
    """Of the edges that were read, the share that the machine has; 0 where none was read."""
    recall: float
    """Of the edges of the machine, the share that was read."""
    f1: float
    """Harmonic mean of the two; 0 where both are 0."""


def check_values(word: str, values: Tensor, n_values: int) -> None:
    """Raise unless there are values (labels, states) of a kind, and each is one of them or, below 0, none.

    Raises:
        ConfigError: fewer than one value.
        DataError: a value that is not one of them.

    >>> check_values("label", torch.tensor([0, -1, 1]), 2)
    """
    check_range(f"n_{word}s", n_values, 1, None, f"a {word} is one of them")
    wrong = values[values >= n_values]
    if wrong.numel():
        raise DataError(f"{word} {int(wrong[0])} was given, but there are {n_values} {word}s. Give 0 to {n_values - 1}, or -1 for none.")


def _count_pairs(first: Tensor, second: Tensor, n_first: int, n_second: int) -> Int[Tensor, "first second"]:
    """Count the pairs of two tensors of one shape, where neither is below 0."""
    first, second = first.cpu().long(), second.cpu().long()
    seen = (first >= 0) & (second >= 0)
    return torch.bincount(first[seen] * n_second + second[seen], minlength=n_first * n_second).unflatten(0, (n_first, n_second))


def read_automaton(labels: Int[Tensor, "sequence step"], n_labels: int) -> Int[Tensor, "label next"]:
    """Count how often each label follows each, one step later in the same sequence.

    Args:
        labels: 0 to ``n_labels - 1``; where there is none (below 0), neither the step before nor the step after is counted.
        n_labels: Labels, >= 1.

    Raises:
        ConfigError: fewer than one label.
        DataError: a label that is not one of them.

    >>> read_automaton(torch.tensor([[0, 1, 1], [1, 0, -1]]), n_labels=2).tolist()
    [[0, 1], [1, 1]]
    """
    check_values("label", labels, n_labels)
    return _count_pairs(labels[:, :-1], labels[:, 1:], n_labels, n_labels)


def majority_states(
    labels: Int[Tensor, "sequence step"], states: Int[Tensor, "_ _"], n_labels: int, n_states: int
) -> Int[Tensor, " label"]:
    """Return the state at which each label stands most often; the lowest of equals, and -1 for a label that never occurs.

    Args:
        labels: 0 to ``n_labels - 1``, below 0 for none.
        states: The true states [sequence step] at the same steps, 0 to ``n_states - 1``, below 0 where there is none.
        n_labels, n_states: How many there are, >= 1.

    Raises:
        ConfigError: fewer than one label or state.
        DataError: a label or state that is not one of them.
        ShapeError: labels and states of different shapes.

    >>> majority_states(torch.tensor([[0, 0, 0, 2]]), torch.tensor([[1, 1, 0, 0]]), n_labels=3, n_states=2).tolist()
    [1, -1, 0]
    """
    check_values("label", labels, n_labels)
    check_values("state", states, n_states)
    if labels.shape != states.shape:
        raise ShapeError(f"labels {list(labels.shape)} and states {list(states.shape)} were given. Give a state for each label.")
    counts = _count_pairs(labels, states, n_labels, n_states)
    # argmax may return any of equals, so ties are settled before it.
    best = (counts == counts.amax(1, keepdim=True)).int().argmax(1)
    return best.masked_fill(counts.sum(1) == 0, -1)


def score_edges(
    machine: TokFSM, counts: Int[Tensor, "label next"], states_of_labels: Int[Tensor, " _"], min_share: float = 0.0
) -> EdgeScores:
    """Score the edges of an automaton of labels against those of the machine, each label standing for its state.

    Counts of labels of one state are added up. An edge is read where it was seen, and in more than `min_share` of what left the state.

    Args:
        machine: The true machine.
        counts: How often each label follows each (`read_automaton`).
        states_of_labels: The state of each label [label] (`majority_states`); labels of -1 are left out.
        min_share: 0 (every transition ever seen) to below 1; above 0, a few wrong labels among many right ones add no edge.

    Raises:
        ConfigError: `min_share` out of range.
        DataError: a state that the machine does not have.
        ShapeError: counts that are not square, or another number of labels in the map.

    >>> machine = TokFSM(torch.tensor([[False, True], [True, True]]), base=2)
    >>> score_edges(machine, torch.tensor([[1, 9], [5, 0]]), torch.tensor([0, 1]))  # reads 0 -> 0 wrongly and misses 1 -> 1
    EdgeScores(precision=0.666..., recall=0.666..., f1=0.666...)
    >>> score_edges(machine, torch.tensor([[1, 9], [5, 0]]), torch.tensor([0, 1]), min_share=0.2)
    EdgeScores(precision=1.0, recall=0.666..., f1=0.8)
    """
    if not 0 <= min_share < 1:
        raise ConfigError(f"min_share={min_share} was asked for, but it is a share of the transitions of a state. Give 0 to below 1.")
    n_labels = len(states_of_labels)
    if counts.shape != (n_labels, n_labels):
        raise ShapeError(f"counts {list(counts.shape)} were given for the states of {n_labels} labels. Give [label next], both over them.")
    known = states_of_labels.cpu() >= 0
    states = states_of_labels.cpu().long()[known]
    machine.check_states(states)
    n_states = machine.n_states
    rows = torch.zeros(n_states, int(known.sum()), dtype=torch.long).index_add_(0, states, counts.cpu().long()[known][:, known])
    by_state = torch.zeros(n_states, n_states, dtype=torch.long).index_add_(1, states, rows)
    read = (by_state > 0) & (by_state > min_share * by_state.sum(1, keepdim=True).double())
    right = int((read & machine.adjacency).sum())
    precision, recall = right / max(int(read.sum()), 1), right / machine.n_edges
    return EdgeScores(precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0)
