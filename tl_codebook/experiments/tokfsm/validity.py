"""How much of what a model wrote, or expects, the machine could have done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.errors import DataError, ShapeError
from tl_codebook.experiments.tokfsm.machine import TokFSM

__all__ = ["TransitionValidity", "successor_match", "transition_validity"]


class TransitionValidity(NamedTuple):
    """Shares, 0 to 1, of the transitions that are edges, and what they are shares of."""

    share: float
    """Of all transitions."""
    first_share: float
    """Of the first transition of each sequence."""
    n_transitions: int
    n_sequences: int


def transition_validity(machine: TokFSM, states: Int[Tensor, "sequence state"] | Sequence[Sequence[int]]) -> TransitionValidity:
    """Return the share of transitions that are edges of the machine, over all, and over the first of each sequence.

    A transition from or to a number that is no state (`read_states` writes -1) is counted, and is not valid.

    Args:
        machine: The machine.
        states: Two states or more a sequence; a list of sequences may hold different lengths.

    Raises:
        DataError: no sequence, or one without a transition.

    Source: Tamkin et al. 2023, section 3 (transition accuracy); codebook-features 0.1.2, ``FSM.transition_accuracy``.

    >>> machine = TokFSM(torch.tensor([[False, True], [True, True]]), base=2)
    >>> transition_validity(machine, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    TransitionValidity(share=0.75, first_share=0.5, n_transitions=4, n_sequences=2)
    """
    sequences = list(states) if isinstance(states, Tensor) else [torch.tensor(sequence, dtype=torch.long) for sequence in states]
    short = [index for index, sequence in enumerate(sequences) if len(sequence) < 2]
    if short or not sequences:
        raise DataError(
            f"{'no sequence' if not sequences else f'sequence {short[0]} of {len(sequences[short[0]])} states'} was given, "
            f"which holds no transition. Give sequences of two states or more."
        )
    before = torch.cat([sequence[:-1] for sequence in sequences]).cpu().long()
    after = torch.cat([sequence[1:] for sequence in sequences]).cpu().long()
    known = (before >= 0) & (before < machine.n_states) & (after >= 0) & (after < machine.n_states)
    valid = machine.adjacency[before.masked_fill(~known, 0), after.masked_fill(~known, 0)] & known
    lengths = torch.tensor([len(sequence) - 1 for sequence in sequences])
    first = lengths.cumsum(0) - lengths
    return TransitionValidity(int(valid.sum()) / len(valid), int(valid[first].sum()) / len(first), len(valid), len(first))


def successor_match(machine: TokFSM, probabilities: Float[Tensor, "state next"]) -> Float[Tensor, " state"]:
    """Return, for each state, the share of its successors, 0 to 1, among the equally many most probable next states.

    The mean over states is the original's accuracy of the first transition; the share of ones, its exact top-10 sets.

    Args:
        machine: The machine.
        probabilities: What a predictor gives each next state after each state; scores of any scale will do.

    Raises:
        ShapeError: another number of states than the machine has.

    Source: codebook-features 0.1.2, ``correct_next_state_probs``.

    >>> machine = TokFSM(torch.tensor([[True, True, False], [False, False, True], [True, True, True]]))
    >>> successor_match(machine, torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])).tolist()
    [0.5, 1.0, 1.0]
    """
    if probabilities.shape != machine.adjacency.shape:
        raise ShapeError(
            f"probabilities of the shape {list(probabilities.shape)} were given, but the machine has {machine.n_states} states. "
            f"Give [state next] over all of them."
        )
    order = probabilities.cpu().argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(machine.n_states).expand_as(order)
    hits = machine.adjacency.gather(1, order) & (rank < machine.n_successors[:, None])
    return hits.sum(1).double() / machine.n_successors
