"""A machine read back from labels: by hand, and from a machine's own states."""

import pytest
import torch

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm import TokFSM, majority_states, read_automaton, score_edges

SMALL = TokFSM(torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool), base=2)


def test_counts_by_hand():
    labels = torch.tensor([[0, 1, 0, 1, 1], [3, 3, -1, 3, 0]])
    assert read_automaton(labels, 4).tolist() == [[0, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert read_automaton(labels[:, :1], 4).sum() == 0


def test_majority_by_hand():
    labels = torch.tensor([[0, 0, 0, 1], [1, 3, -1, 3]])
    states = torch.tensor([[2, 2, 0, 2], [1, -1, 1, 0]])
    assert majority_states(labels, states, n_labels=5, n_states=3).tolist() == [2, 1, -1, 0, -1]


def test_scores_by_hand():
    counts = torch.tensor([[0, 4, 1, 0], [9, 1, 0, 0], [2, 2, 2, 0], [0, 5, 0, 7]])
    states = torch.tensor([0, 1, 2, -1])
    assert score_edges(SMALL, counts, states) == (6 / 7, 1, pytest.approx(12 / 13))  # 1 -> 1 is read wrongly
    assert score_edges(SMALL, counts, states, min_share=0.1) == (1, 1, 1)  # a tenth is not more than a tenth
    assert score_edges(SMALL, counts, states, min_share=0.2) == (1, 5 / 6, pytest.approx(10 / 11))
    assert score_edges(SMALL, torch.zeros(4, 4, dtype=torch.long), states) == (0, 0, 0)
    assert score_edges(SMALL, torch.tensor([[1]]), torch.tensor([1])) == (0, 0, 0)
    assert score_edges(SMALL, torch.tensor([[1]]), torch.tensor([2])) == (1, 1 / 6, pytest.approx(2 / 7))


def test_labels_of_one_state_are_added_up():
    """Labels 0 and 1 both stand for state 0, which goes to 1 (6 times) and to itself (once)."""
    counts = torch.tensor([[0, 1, 3], [0, 0, 3], [2, 2, 0]])
    assert score_edges(SMALL, counts, torch.tensor([0, 0, 1])) == (2 / 3, 2 / 6, pytest.approx(4 / 9))
    assert score_edges(SMALL, counts, torch.tensor([0, 0, 1]), min_share=0.15) == (1, 2 / 6, 0.5)


def test_a_machine_read_from_its_own_states_under_other_names():
    machine = TokFSM.random(30, 5, seed=0)
    states = machine.sample(200, 50, torch.Generator().manual_seed(0))
    names = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:60].reshape(30, 2)  # two labels a state
    labels = names[states, torch.randint(2, states.shape, generator=torch.Generator().manual_seed(2))]
    known = majority_states(labels, states, 80, 30)
    assert known[names].equal(torch.arange(30)[:, None].expand(30, 2))
    assert int((known == -1).sum()) == 20
    counts = read_automaton(labels, 80)
    assert int(counts.sum()) == 200 * 49
    assert score_edges(machine, counts, known) == (1, 1, 1)
    noisy = labels.where(torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) > 0.01, names[0, 0])
    assert score_edges(machine, read_automaton(noisy, 80), known).precision < 0.95
    assert score_edges(machine, read_automaton(noisy, 80), known, min_share=0.05).f1 > 0.99


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: read_automaton(torch.tensor([[0, 2]]), 2), DataError, "label 2 was given, but there are 2 labels"),
        (lambda: read_automaton(torch.tensor([[0, 2]]), 0), ConfigError, "n_labels=0"),
        (lambda: majority_states(torch.tensor([[0, 1]]), torch.tensor([[0]]), 2, 2), ShapeError, r"labels \[1, 2\] and states \[1, 1\]"),
        (lambda: majority_states(torch.tensor([[0]]), torch.tensor([[2]]), 2, 2), DataError, "state 2 was given, but there are 2 states"),
        (lambda: majority_states(torch.tensor([[0]]), torch.tensor([[2]]), 2, 0), ConfigError, "n_states=0"),
        (lambda: score_edges(SMALL, torch.ones(2, 2, dtype=torch.long), torch.tensor([0])), ShapeError, r"counts \[2, 2\] .* 1 labels"),
        (lambda: score_edges(SMALL, torch.ones(1, 1, dtype=torch.long), torch.tensor([3])), DataError, "state 3 was given"),
        (lambda: score_edges(SMALL, torch.ones(1, 1, dtype=torch.long), torch.tensor([0]), 1.0), ConfigError, "min_share=1.0"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
