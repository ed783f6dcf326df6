"""The best that any predictor of the next token can do: exact, by the forward algorithm.

The digits of a state name it, so after a complete state nothing earlier matters, and the belief that the forward algorithm keeps is over
the states that the digits written since then leave open. It has few values: one for each (last state or start, digits since), which is why
the expectations below are sums over a small table instead of averages over samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_codebook.errors import DataError
from tl_codebook.experiments.tokfsm.machine import TokFSM
from tl_codebook.experiments.tokfsm.tokens import NO_STATE, check_tokens, read_states

__all__ = ["PositionFigures", "bayes_accuracy", "bayes_by_position", "bayes_loss", "bayes_predictions"]


class PositionFigures(NamedTuple):
    """The least expected loss, in nats, and the greatest expected accuracy, 0 to 1, at each predicted token: those after BOS, in order."""

    loss: Float[Tensor, " pos"]
    accuracy: Float[Tensor, " pos"]


def _digit_tables(machine: TokFSM) -> list[Float[Tensor, "context prefix digit"]]:
    """Return, for each digit of a state, the probability of `prefix` and then `digit` given the last state.

    Context 0 is the start, context s + 1 the state s; `prefix` is the number that the digits before this one write.
    """
    n_states, base, n_digits = machine.n_states, machine.base, machine.n_digits
    start = torch.full((1, n_states), 1 / n_states, dtype=torch.float64)
    belief = torch.cat([start, machine.transition])
    written = torch.zeros(n_states + 1, base**n_digits, dtype=torch.float64)
    written[:, :n_states] = belief
    return [written.unflatten(1, (base**digit, base, -1)).sum(-1) for digit in range(n_digits)]


def bayes_predictions(machine: TokFSM, tokens: Int[Tensor, "sequence pos"]) -> Float[Tensor, "sequence pos vocabulary"]:
    """Return the probability of each next token, given the tokens up to and with a position.

    The last state counts whichever way it was reached, so that text with impossible transitions can be read too.

    Args:
        machine: The machine.
        tokens: Rows that begin with BOS, each then the digits of states; the last state may be incomplete.

    Returns:
        Float64 probabilities; those of BOS are 0, as it never comes again.

    Raises:
        DataError: rows without BOS in front, tokens outside the vocabulary, digits that are no state, or digits that begin no successor.

    Source: the forward algorithm (Rabiner 1989, section III A) on the machine of Tamkin et al. 2023, section 3.

    >>> machine = TokFSM(torch.tensor([[True, True], [True, False]]), base=2)
    >>> bayes_predictions(machine, torch.tensor([[2, 0, 1]])).tolist()  # any state; 0 or 1 after 0; 0 after 1
    [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]
    """
    check_tokens(machine, tokens)
    tokens = tokens.cpu().long()
    n_sequences, n_tokens = tokens.shape
    inside = (tokens[:, 1:] == machine.bos).nonzero()
    if len(inside):
        sequence, index = inside[0].tolist()
        raise DataError(
            f"sequence {sequence} has BOS at position {index + 1}, but BOS comes first and never again. Give one rollout a row."
        )
    states = read_states(machine, tokens)
    if bool((states == NO_STATE).any()):
        sequence, index = (states == NO_STATE).nonzero()[0].tolist()
        raise DataError(
            f"the digits of state {index} of sequence {sequence} are those of no state, after which nothing can follow. "
            f"Give text of this machine ({machine.n_states} states)."
        )
    contexts = torch.cat([torch.zeros(n_sequences, 1, dtype=torch.long), states + 1], dim=1)
    predictions = torch.zeros(n_sequences, n_tokens, machine.n_vocabulary, dtype=torch.float64)
    for digit, table in enumerate(_digit_tables(machine)):
        here = range(digit, n_tokens, machine.n_digits)  # positions after which this digit of a state comes
        prefix = torch.zeros(n_sequences, len(here), dtype=torch.long)
        for before in range(digit):
            prefix = prefix * machine.base + tokens[:, [pos - digit + 1 + before for pos in here]]
        joint = table[contexts[:, : len(here)], prefix]
        total = joint.sum(-1, keepdim=True)
        if bool((total == 0).any()):
            sequence, index, _ = (total == 0).nonzero()[0].tolist()
            raise DataError(
                f"the digits of sequence {sequence} up to position {here[index]} begin no state that can follow, so nothing comes next. "
                f"Give text of this machine."
            )
        predictions[:, digit :: machine.n_digits, : machine.base] = joint / total
    return predictions


def bayes_by_position(machine: TokFSM, n_tokens: int = 128) -> PositionFigures:
    """Return the exact expected loss and accuracy of the best predictor at each of the ``n_tokens - 1`` tokens after BOS.

    The distribution over states is carried forward step by step; given it, what a digit costs is a finite sum.

    Args:
        machine: The machine.
        n_tokens: Tokens of a row, BOS counted: a multiple of the digits of a state, >= 2.

    Raises:
        ConfigError: rows that are no multiple of the digits.

    Source: the chain rule of entropy, on the machine of Tamkin et al. 2023, section 3.

    >>> machine = TokFSM(torch.tensor([[True, True], [True, False]]), base=2)
    >>> figures = bayes_by_position(machine, n_tokens=3)
    >>> figures.loss.tolist()  # log 2 at first; then log 2 after state 0 and nothing after state 1
    [0.693..., 0.346...]
    >>> figures.accuracy.tolist()
    [0.5, 0.75]
    """
    n_states = machine.states_in_row(n_tokens)
    losses, accuracies = [], []
    for joint in _digit_tables(machine):
        conditional = joint / joint.sum(-1, keepdim=True)  # 0 / 0 where a prefix cannot be, which then weighs 0
        losses.append(-torch.xlogy(joint, conditional.where(joint > 0, torch.ones_like(joint))).sum((1, 2)))
        accuracies.append(joint.amax(-1).sum(-1))
    loss, accuracy = torch.stack(losses), torch.stack(accuracies)  # [digit context]
    context = torch.zeros(machine.n_states + 1, dtype=torch.float64)
    context[0] = 1
    figures = []
    for _ in range(n_states):
        figures.append(torch.stack([loss @ context, accuracy @ context]))
        state = machine.transition.T @ context[1:] + context[0] / machine.n_states
        context = torch.cat([torch.zeros(1, dtype=torch.float64), state])
    by_position = torch.cat(figures, dim=1)[:, : n_tokens - 1]
    return PositionFigures(by_position[0], by_position[1])


def bayes_loss(machine: TokFSM, n_tokens: int = 128) -> float:
    """Return the least expected loss of rows of `n_tokens` tokens, in nats per predicted token (all but BOS), exactly.

    Raises:
        ConfigError: rows that are no multiple of the digits.

    Source: reproduces the 1.1748 of the machine of Tamkin et al. 2023, section 3.

    >>> round(bayes_loss(TokFSM.paper()), 4)
    1.1748
    """
    return float(bayes_by_position(machine, n_tokens).loss.mean())


def bayes_accuracy(machine: TokFSM, n_tokens: int = 128) -> float:
    """Return the greatest expected accuracy on rows of `n_tokens` tokens, 0 to 1, over the predicted tokens (all but BOS), exactly.

    Raises:
        ConfigError: rows that are no multiple of the digits.

    Source: reproduces the 46.38 % of the machine of Tamkin et al. 2023, section 3.

    >>> round(100 * bayes_accuracy(TokFSM.paper()), 2)
    46.38
    """
    return float(bayes_by_position(machine, n_tokens).accuracy.mean())
