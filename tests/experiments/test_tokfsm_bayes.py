"""The exact figures of the best predictor: by hand, by every rollout, by samples, and the paper's."""

import itertools
import math

import pytest
import torch

from tl_codebook.errors import ConfigError, DataError
from tl_codebook.experiments.tokfsm import (
    TokFSM,
    bayes_accuracy,
    bayes_by_position,
    bayes_loss,
    bayes_predictions,
    write_tokens,
)

PAPER = TokFSM.paper()
SMALL = TokFSM(torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool), base=2)
"""States 00, 01 and 10; 0 goes to 1 or 2, 1 to 0, 2 anywhere."""


def every_rollout(machine, n_tokens):
    """Return every row that the machine can write, and its probability."""
    rows, weights = [], []
    for states in itertools.product(range(machine.n_states), repeat=n_tokens // machine.n_digits):
        weight = 1 / machine.n_states
        for before, after in itertools.pairwise(states):
            weight *= float(machine.transition[before, after])
        if weight:
            rows.append(write_tokens(machine, torch.tensor([states]))[0])
            weights.append(weight)
    return torch.stack(rows), torch.tensor(weights, dtype=torch.float64)


def test_the_papers_figures():
    assert f"{bayes_loss(PAPER):.4f}" == "1.1748"
    assert f"{100 * bayes_accuracy(PAPER):.2f}" == "46.38"
    figures = bayes_by_position(PAPER)
    assert figures.loss.shape == figures.accuracy.shape == (127,)
    assert figures.loss[:2].tolist() == pytest.approx([math.log(10)] * 2)  # the first state is any of 100
    assert (figures.loss[2::2][:62] + figures.loss[3::2]).tolist() == pytest.approx([math.log(10)] * 62)  # then one of 10


def test_the_papers_figures_by_samples():
    tokens = write_tokens(PAPER, PAPER.sample(4000, 64, torch.Generator().manual_seed(0)))
    predictions = bayes_predictions(PAPER, tokens)[:, :-1]
    losses = -predictions.gather(2, tokens[:, 1:, None]).log().mean((1, 2))
    accuracies = (predictions.argmax(-1) == tokens[:, 1:]).double().mean(1)
    for values, exact in ((losses, bayes_loss(PAPER)), (accuracies, bayes_accuracy(PAPER))):
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 4000**0.5


def test_the_pairs_of_state_and_next_first_digit():
    whole = write_tokens(PAPER, torch.arange(100)[:, None], keep_last=True)
    assert int((bayes_predictions(PAPER, whole)[:, -1] > 0).sum()) == 686


def test_a_machine_by_hand():
    """Rows BOS a b c, of two states."""
    log2, log3 = math.log(2), math.log(3)
    first = log3 - 2 / 3 * log2  # 0 with 2/3, 1 with 1/3
    second = 2 / 3 * log2  # 0 or 1 after 0; 0 after 1
    third = (log2 + 0 + first) / 3  # after 0: either digit; after 1: 0; after 2: as at the start
    figures = bayes_by_position(SMALL, n_tokens=4)
    assert figures.loss.tolist() == pytest.approx([first, second, third])
    assert figures.accuracy.tolist() == pytest.approx([2 / 3, 2 / 3 / 2 + 1 / 3, (1 / 2 + 1 + 2 / 3) / 3])
    assert bayes_loss(SMALL, 4) == pytest.approx((first + second + third) / 3)
    predictions = bayes_predictions(SMALL, torch.tensor([[2, 1, 0, 0, 1, 0, 0]]))[0]  # states 2, 1, 0
    half, any_first = [0.5, 0.5, 0], [2 / 3, 1 / 3, 0]
    expected = [any_first, [1, 0, 0], any_first, half, [1, 0, 0], [1, 0, 0], half]
    assert predictions.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("machine", "n_tokens"),
    [
        (SMALL, 8),
        (TokFSM.random(4, 2, 1, base=4), 5),
        (TokFSM.random(5, 2, 2, base=2), 9),
        (TokFSM.random(3, 2, 3, base=2, n_digits=3), 9),
        (TokFSM(torch.ones(1, 1, dtype=torch.bool), base=2), 4),
    ],
)
def test_against_every_rollout(machine, n_tokens):
    """The definition itself: the probability of a next token is the weight of the rollouts that have it, among those with the prefix."""
    rows, weights = every_rollout(machine, n_tokens)
    assert float(weights.sum()) == pytest.approx(1)
    predictions = bayes_predictions(machine, rows)
    loss, accuracy = torch.zeros(n_tokens - 1, dtype=torch.float64), torch.zeros(n_tokens - 1, dtype=torch.float64)
    for row, weight, predicted in zip(rows, weights, predictions, strict=True):
        for pos in range(n_tokens - 1):
            same = (rows[:, : pos + 1] == row[: pos + 1]).all(1)
            expected = torch.zeros(machine.n_vocabulary, dtype=torch.float64).index_add_(0, rows[same, pos + 1], weights[same])
            expected /= expected.sum()
            torch.testing.assert_close(predicted[pos], expected, rtol=0, atol=1e-12)
            loss[pos] -= weight * expected[row[pos + 1]].log()
            accuracy[pos] += weight * (expected.argmax() == row[pos + 1])
    torch.testing.assert_close(bayes_by_position(machine, n_tokens).loss, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(bayes_by_position(machine, n_tokens).accuracy, accuracy, rtol=0, atol=1e-12)


def test_after_an_impossible_transition_the_last_state_counts():
    tokens = torch.tensor([[2, 0, 1, 0, 1]])  # 1 -> 1 is no edge
    assert bayes_predictions(SMALL, tokens)[0, -1].tolist() == [1, 0, 0]
    assert bayes_predictions(SMALL, tokens)[0, 3].tolist() == [1, 0, 0]  # after 1 and a first digit 0, state 0: the token 1 is impossible


def test_only_bos():
    assert bayes_predictions(SMALL, torch.tensor([[2]])).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1], "does not begin with BOS"),
        ([2, 3], "token 3"),
        ([2, 1, 1, 0, 0], "state 0 of sequence 0 are those of no state"),
        ([2, 0, 0, 2, 0], "sequence 0 has BOS at position 3"),
        ([2, 0, 0, 2], "sequence 0 has BOS at position 3"),
        ([2, 0, 1, 1], "up to position 3 begin no state that can follow"),
    ],
)
def test_rows_that_no_prediction_can_follow(row, message):
    with pytest.raises(DataError, match=message):
        bayes_predictions(SMALL, torch.tensor([row]))


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_odd_rows_are_refused(n_tokens):
    for figure in (bayes_loss, bayes_accuracy, bayes_by_position):
        with pytest.raises(ConfigError, match="Give a multiple of 2"):
            figure(SMALL, n_tokens)
