"""The best neuron at equal recall: by hand, and against a double loop over neurons and thresholds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm import neurons
from tl_codebook.experiments.tokfsm.neurons import NeuronChoice, best_neurons, score_neurons

# Label 0 holds at the first three positions, label 1 at the next two, nothing at the last.
LABELS = torch.tensor([0, 0, 0, 1, 1, -1])
ACTIVATIONS = torch.tensor([[5.0, 1.0], [3.0, 1.0], [1.0, 0.0], [4.0, 3.0], [0.0, 2.0], [2.0, 2.0]])


def slowly(activations, labels, recalls):
    """Try every neuron and every threshold that it has a value at, highest first."""
    rows = []
    for label, recall in enumerate(recalls.tolist()):
        holds, best = labels == label, (-1, float("inf"), 0.0, 0.0)
        for neuron in range(activations.shape[1]) if recall > 0 and holds.any() else []:
            for threshold in sorted(set(activations[:, neuron].tolist()), reverse=True):
                fires = activations[:, neuron] >= threshold
                hits = int((fires & holds).sum())
                if hits / int(holds.sum()) >= recall - 1e-6:
                    if (hits / int(fires.sum()), hits / int(holds.sum())) > best[2:]:
                        best = (neuron, threshold, hits / int(fires.sum()), hits / int(holds.sum()))
                    break
        rows.append(best)
    return rows


def as_rows(choice):
    return [tuple(row) for row in zip(*(column.tolist() for column in choice), strict=True)]


@st.composite
def measured(draw):
    n, n_neurons, n_labels = (draw(st.integers(1, most)) for most in (25, 6, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(n, n_neurons, generator=generator)
    if draw(st.booleans()):
        values = (2 * values).round()  # many equal values
    labels = torch.randint(-1, n_labels, (n,), generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    hits = torch.randint(n + 1, (n_labels,), generator=generator)
    occurrences = torch.stack([(labels == label).sum() for label in range(n_labels)])
    return values, labels, (hits.clamp(max=occurrences) / occurrences.clamp(min=1).to(dtype)).to(dtype)


def test_by_hand():
    choice = best_neurons(ACTIVATIONS, LABELS, torch.tensor([2 / 3, 1.0]))
    # Label 0, two of three: neuron 0 at 3 fires at 5, 3, 4 (2 of 3 right); neuron 1 at 1 fires at all but one (2 of 5).
    # Label 1, both: neuron 0 at 0 fires everywhere (2 of 6); neuron 1 at 2 fires at 3, 2, 2 (2 of 3).
    assert as_rows(choice) == [(0, 3.0, 2 / 3, 2 / 3), (1, 2.0, 2 / 3, 1.0)]
    other = torch.tensor([[3.0, 0.0], [2.9, 0.0], [9.0, 2.0], [0.0, 1.9]])
    scores = score_neurons(choice, other, torch.tensor([0, 0, 1, -1]))
    # Neuron 0 fires at the first and third (1 of 2 right, 1 of 2 found); neuron 1 at the third alone.
    assert (scores.precision.tolist(), scores.recall.tolist()) == ([1 / 2, 1.0], [1 / 2, 1.0])


def test_equal_values_come_together():
    """One of three is asked for, but the highest threshold that gives it gives all three."""
    choice = best_neurons(torch.tensor([[1.0], [1.0], [1.0], [1.0]]), torch.tensor([0, 0, 0, -1]), torch.tensor([1 / 3]))
    assert as_rows(choice) == [(0, 1.0, 3 / 4, 1.0)]


def test_a_label_for_which_nothing_is_asked_gets_no_neuron():
    choice = best_neurons(ACTIVATIONS, LABELS, torch.tensor([0.0, 1.0, 1.0]))  # label 2 never holds
    assert choice.neuron.tolist() == [-1, 1, -1]
    scores = score_neurons(choice, ACTIVATIONS, LABELS)
    assert scores.found.tolist() == [False, True, False]
    assert scores.precision.tolist() == [0, 2 / 3, 0]
    assert best_neurons(ACTIVATIONS, LABELS, torch.zeros(2)).neuron.tolist() == [-1, -1]
    assert score_neurons(best_neurons(ACTIVATIONS, LABELS, torch.zeros(2)), ACTIVATIONS, LABELS).summary() == (0, 0, 0)


@pytest.mark.parametrize("at_once", [1, 60, 2**24])
@settings(max_examples=40, deadline=None)
@given(measured())
def test_the_double_loop_agrees(at_once, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neurons, "_VALUES_AT_ONCE", at_once)
        choice = best_neurons(*data)
    assert as_rows(choice) == slowly(*data)
    scores = score_neurons(choice, *data[:2])
    assert scores.precision.equal(choice.precision)  # on the data it was chosen on
    assert scores.recall.equal(choice.recall)
    assert (choice.recall >= data[2] - 1e-6)[scores.found].all()


def test_half_precision_is_compared_as_it_is():
    choice = best_neurons(ACTIVATIONS.bfloat16(), LABELS, torch.tensor([2 / 3, 1.0]))
    assert as_rows(choice) == as_rows(best_neurons(ACTIVATIONS, LABELS, torch.tensor([2 / 3, 1.0])))
    assert score_neurons(choice, ACTIVATIONS.bfloat16(), LABELS).precision.equal(choice.precision)


CHOICE = NeuronChoice(torch.tensor([2]), torch.zeros(1), torch.zeros(1), torch.zeros(1))
NAN = ACTIVATIONS.clone().fill_(torch.nan)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: best_neurons(ACTIVATIONS, LABELS, torch.tensor([0.5, 1.5])), ConfigError, "a recall of 1.5"),
        (lambda: best_neurons(ACTIVATIONS, LABELS, torch.tensor([torch.nan, 1.0])), ConfigError, "a recall of nan"),
        (lambda: best_neurons(ACTIVATIONS, LABELS, torch.tensor([0.5])), DataError, "label 1 was given, but there are 1 labels"),
        (lambda: best_neurons(ACTIVATIONS, LABELS[1:], torch.ones(2)), ShapeError, "5 labels of 6 positions"),
        (lambda: best_neurons(ACTIVATIONS[:0], LABELS[:0], torch.ones(2)), DataError, r"activations \[0, 2\]"),
        (lambda: best_neurons(ACTIVATIONS[:, :0], LABELS, torch.ones(2)), DataError, r"activations \[6, 0\]"),
        (lambda: best_neurons(ACTIVATIONS, LABELS, torch.ones(0)), DataError, "0 labels were given"),
        (lambda: best_neurons(NAN, LABELS, torch.ones(2)), DataError, "an activation is NaN"),
        (lambda: score_neurons(CHOICE, ACTIVATIONS, LABELS.clamp(max=0)), DataError, "neuron 2 was chosen, but there are activations of 2"),
        (lambda: score_neurons(CHOICE, ACTIVATIONS, LABELS), DataError, "label 1 was given"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
