"""How much of a text the machine could have written, and which successors a predictor expects."""

import pytest
import torch

from tl_codebook.errors import DataError, ShapeError
from tl_codebook.experiments.tokfsm import TokFSM, read_states, successor_match, transition_validity, write_tokens

SMALL = TokFSM(torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool), base=2)


def test_by_hand():
    states = torch.tensor([[0, 1, 0, 2], [0, 0, 1, 1], [2, 2, 1, 2]])  # + + +; - + -; + + -
    assert transition_validity(SMALL, states) == (6 / 9, 2 / 3, 9, 3)
    assert transition_validity(SMALL, states.tolist()) == (6 / 9, 2 / 3, 9, 3)
    assert transition_validity(SMALL, [[0, 1, 0, 2], [0, 0], [2, 2, 1]]) == (5 / 6, 2 / 3, 6, 3)


def test_what_is_no_state_makes_no_valid_transition():
    assert transition_validity(SMALL, torch.tensor([[2, -1, 2, 2], [2, 3, 2, 2]])) == (2 / 6, 0, 6, 2)
    tokens = torch.tensor([[2, 1, 0, 1, 1, 1, 0, 1, 0]])  # 2, no state, 2, 2
    assert transition_validity(SMALL, read_states(SMALL, tokens)) == (1 / 3, 0, 3, 1)


def test_all_that_the_machine_writes_is_valid():
    machine = TokFSM.paper()
    tokens = write_tokens(machine, machine.sample(50, 64))
    assert transition_validity(machine, read_states(machine, tokens)) == (1, 1, 50 * 62, 50)


@pytest.mark.parametrize("states", [[], [[0, 1], [2]], torch.zeros(2, 1, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)])
def test_without_transitions_there_is_no_share(states):
    with pytest.raises(DataError, match=r"was given, which holds no transition\. Give sequences of two states or more"):
        transition_validity(SMALL, states)


def test_successors_by_hand():
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.5, 0.1], [0.0, 0.0, 1.0]])
    assert successor_match(SMALL, scores).tolist() == [1, 0, 1]
    assert successor_match(SMALL, torch.tensor([[0.5, 0.4, 0.1], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])).tolist() == [0.5, 1, 1]
    assert successor_match(SMALL, SMALL.transition).tolist() == [1, 1, 1]


def test_scores_of_another_machine():
    with pytest.raises(ShapeError, match=r"\[2, 3\] were given, but the machine has 3 states"):
        successor_match(SMALL, torch.zeros(2, 3))
