"""The control of the paper: the best neuron at the recall of a code.

A neuron fires where its activation reaches a threshold, one for each concept, set so that the neuron finds as much of the concept as the
code does. What it finds besides is its precision.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.automaton import check_values
from tl_codebook.experiments.tokfsm.concepts import LabelScores

__all__ = ["NeuronChoice", "best_neurons", "score_neurons"]

_VALUES_AT_ONCE = 2**24  # activations held in sorted order at a time


class NeuronChoice(NamedTuple):
    """A neuron for each label, -1 where none was asked for, with its figures on the data it was chosen on."""

    neuron: Int[Tensor, " label"]
    threshold: Float[Tensor, " label"]
    """It fires at or above this; infinite where there is no neuron."""
    precision: Float[Tensor, " label"]
    recall: Float[Tensor, " label"]


def _check(activations: Tensor, labels: Tensor, n_labels: int) -> None:
    if n_labels < 1 or not activations.numel():
        raise DataError(
            f"activations {list(activations.shape)} and {n_labels} labels were given. Give one position, one neuron and one label or more."
        )
    if len(labels) != len(activations):
        raise ShapeError(f"{len(labels)} labels of {len(activations)} positions were given. Give one for each, -1 where nothing holds.")
    check_values("label", labels, n_labels)
    if bool(activations.isnan().any()):
        raise DataError("an activation is NaN, which is neither above nor below a threshold. Give numbers.")


def _needed(recalls: Tensor, occurrences: Tensor) -> Tensor:
    """Return the fewest hits that reach the recalls; the subtraction undoes what rounding adds to hits / n * n."""
    slack = 4 * torch.finfo(recalls.dtype).eps * occurrences
    return (recalls.cpu().double() * occurrences - slack).ceil().long().clamp(min=0)


def best_neurons(
    activations: Float[Tensor, "position neuron"], labels: Int[Tensor, " _"], recalls: Float[Tensor, " label"]
) -> NeuronChoice:
    """Choose, for each label, the neuron of the greatest precision at (at least) a given recall.

    The threshold of a neuron is the highest at which it reaches the recall. Of equal precisions, the neuron of the greater recall, then
    the lowest. Only high activations count as firing, as in the paper; for low ones as well, append the negated activations.

    Args:
        activations: Of all neurons that may be chosen; each is sorted once, some at a time.
        labels: What holds at each position, 0 to ``len(recalls) - 1``, below 0 for nothing.
        recalls: The recall asked for each label (that of its code), 0 to 1. For 0, and for a label that never holds, no neuron is chosen.

    Raises:
        ConfigError: a recall out of range.
        DataError: nothing to choose from, a label that is not one of them, or NaN.
        ShapeError: another number of labels than of positions.

    Source: Tamkin et al. 2023, section 3 (a neuron's threshold is set so that its recall equals that of the code).

    >>> activations = torch.tensor([[3.0, 1.0], [2.0, 5.0], [1.0, 4.0], [2.5, 0.0]])
    >>> best_neurons(activations, torch.tensor([0, 0, 0, -1]), torch.tensor([1.0]))  # at 1.0, the second fires at the three alone
    NeuronChoice(neuron=tensor([1]), threshold=tensor([1.], dtype=torch.float64), precision=tensor([1.], ...), recall=tensor([1.], ...))
    """
    wrong = recalls[~((recalls >= 0) & (recalls <= 1))]
    if wrong.numel():
        raise ConfigError(f"a recall of {float(wrong[0])} was asked for, but it is a share. Give 0 to 1.")
    n_labels = len(recalls)
    _check(activations, labels, n_labels)
    labels = labels.cpu().long()
    n_positions, n_neurons = activations.shape
    positions = [(labels == label).nonzero().flatten().numpy() for label in range(n_labels)]
    occurrences = torch.tensor([len(places) for places in positions])
    needed = _needed(recalls, occurrences)
    asked = [label for label in range(n_labels) if needed[label] > 0]
    threshold = torch.full((n_labels,), torch.inf, dtype=torch.double)
    neuron, figures = torch.full((n_labels,), -1), torch.zeros(2, n_labels, dtype=torch.double)
    width = max(1, _VALUES_AT_ONCE // n_positions)
    for start in range(0, n_neurons if asked else 0, width):
        chunk = activations[:, start : start + width].T.detach().cpu()
        values = np.ascontiguousarray((chunk if chunk.dtype == torch.double else chunk.float()).numpy())
        thresholds = torch.zeros(len(values), n_labels, dtype=torch.from_numpy(values).dtype)
        hits = torch.zeros(len(values), n_labels, dtype=torch.long)
        for label in asked:
            own = torch.from_numpy(np.sort(values[:, positions[label]], axis=1))
            thresholds[:, label] = own[:, own.shape[1] - int(needed[label])]
            hits[:, label] = (own >= thresholds[:, label, None]).sum(1)
        everywhere = torch.from_numpy(np.sort(values, axis=1))  # numpy sorts without indices, ten times as fast
        fired = n_positions - torch.searchsorted(everywhere, thresholds)
        precision, recall = hits / fired.clamp(min=1).double(), hits / occurrences.clamp(min=1).double()
        best = precision.amax(0)
        ties = precision == best
        best_recall = recall.masked_fill(~ties, -1).amax(0)
        ties &= recall == best_recall
        here = torch.arange(len(values))[:, None].expand_as(ties).masked_fill(~ties, len(values)).amin(0)
        better = (best > figures[0]) | ((best == figures[0]) & (best_recall > figures[1]))  # hits > 0, so what was asked beats the zeros
        figures = torch.stack([best, best_recall]).where(better, figures)
        neuron = (here + start).where(better, neuron)
        threshold = thresholds.gather(0, here[None])[0].double().where(better, threshold)
    return NeuronChoice(neuron, threshold, figures[0], figures[1])


def score_neurons(choice: NeuronChoice, activations: Float[Tensor, "position neuron"], labels: Int[Tensor, " _"]) -> LabelScores:
    """Score chosen neurons on other data, at their thresholds. A label without a neuron, or that never occurs there, scores 0.

    Args:
        choice: What `best_neurons` chose.
        activations: Of the same neurons, in the same order.
        labels: What holds at each position, below 0 for nothing.

    Raises:
        DataError: no position, a neuron that is not there, a label that is not one of them, or NaN.
        ShapeError: another number of labels than of positions.

    >>> choice = best_neurons(torch.tensor([[1.0], [0.0]]), torch.tensor([0, -1]), torch.tensor([1.0]))
    >>> score_neurons(choice, torch.tensor([[1.5], [0.5], [2.0], [1.0]]), torch.tensor([0, 0, -1, -1])).summary()
    ConceptSummary(precision=0.333..., recall=0.5, covered=1.0)
    """
    n_labels = len(choice.neuron)
    _check(activations, labels, n_labels)
    if int(choice.neuron.max()) >= activations.shape[1]:
        raise DataError(
            f"neuron {int(choice.neuron.max())} was chosen, but there are activations of {activations.shape[1]}. "
            "Give those of the same neurons."
        )
    found = choice.neuron >= 0
    fires = activations.detach().cpu()[:, choice.neuron.clamp(min=0)].double() >= choice.threshold
    fires &= found
    holds = labels.cpu()[:, None] == torch.arange(n_labels)
    hits = (fires & holds).sum(0).double()
    return LabelScores(hits / fires.sum(0).clamp(min=1), hits / holds.sum(0).clamp(min=1), found)
