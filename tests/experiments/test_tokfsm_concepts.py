"""Codes against concepts: by hand, and what holds whatever the counts are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm import TokFSM, write_tokens
from tl_codebook.experiments.tokfsm.concepts import (
    CodeTable,
    choose_codes,
    code_table,
    codes_per_concept,
    decode_accuracy,
    purity,
    score_codes,
    state_labels,
)

# Two sequences of four positions, two slots. Code 0 fires at (0,0) twice over, (0,1), (1,0); code 1 at (0,1), (0,2), (1,1), (1,3);
# code 2 at (0,2), (1,2), (1,3). Label 0 holds at (0,0), (0,1), (1,0); label 1 at (0,2), (1,1), (1,2), (1,3); nothing at (0,3).
IDS = torch.tensor([[[0, 0], [0, 1], [2, 1], [-1, -1]], [[-1, 0], [1, -1], [2, -1], [1, 2]]])
LABELS = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]])
ONE = IDS[..., :1]  # code 0 at (0,0), (0,1); 1 at (1,1), (1,3); 2 at (0,2), (1,2)


def table(ids=IDS, labels=LABELS, n_codes=4, n_labels=3, **options):
    return code_table(ids, labels, n_codes, n_labels, **options)


def of(ids, labels, n_codes=4, n_labels=3):
    """A table of one row of codes, one slot, one group."""
    return code_table(torch.tensor(ids)[None, :, None], torch.tensor(labels)[None], n_codes, n_labels)


@st.composite
def counted(draw):
    n_codes, n_labels, k, n = (draw(st.integers(1, most)) for most in (5, 4, 3, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(-1, n_codes, (2, n, 2, k), generator=generator)
    labels = torch.randint(-1, n_labels, (2, n), generator=generator)
    return ids, labels, n_codes, n_labels


def test_counts_by_hand():
    counts = table()
    assert counts.hits.tolist() == [[[3, 0, 0], [1, 3, 0], [0, 3, 0], [0, 0, 0]]]
    assert counts.activations.tolist() == [[3, 4, 3, 0]]
    assert counts.occurrences.tolist() == [3, 4, 0]
    assert counts.n_slots == 2
    assert counts.precision().tolist() == [[[1, 0, 0], [1 / 4, 3 / 4, 0], [0, 1, 0], [0, 0, 0]]]
    assert counts.recall().tolist() == [[[1, 0, 0], [1 / 3, 3 / 4, 0], [0, 3 / 4, 0], [0, 0, 0]]]


def test_activations_without_a_label_count_against_precision():
    assert of([0, 0, 0], [1, -1, -1]).precision()[0, 0].tolist() == [0, 1 / 3, 0]


def test_a_mask_leaves_positions_out():
    mask = torch.tensor([[True, True, False, True], [False, False, True, True]])  # left: code 0 twice, 1 twice, 2 twice
    counts = table(mask=mask)
    assert counts.hits.tolist() == [[[2, 0, 0], [1, 1, 0], [0, 2, 0], [0, 0, 0]]]
    assert counts.occurrences.tolist() == [2, 2, 0]


def test_groups_are_counted_apart():
    both = torch.stack([IDS, IDS.flip(1)], dim=2)
    counts = table(both)
    assert counts.hits[:1].equal(table().hits)
    assert counts.hits[1:].equal(table(IDS.flip(1)).hits)


def test_state_labels_stand_at_the_last_digit():
    machine = TokFSM.paper()
    tokens = write_tokens(machine, torch.tensor([[4, 13, 99], [50, 0, 7]]))
    assert state_labels(machine, tokens).tolist() == [[-1, -1, 4, -1, 13, -1], [-1, -1, 50, -1, 0, -1]]
    whole = write_tokens(machine, torch.tensor([[4, 13]]), keep_last=True)
    assert state_labels(machine, whole).tolist() == [[-1, -1, 4, -1, 13]]
    assert state_labels(machine, whole[:, :1]).tolist() == [[-1]]
    broken = torch.tensor([[10, 10, 4, 1, 3]])  # BOS among the digits of the first
    assert state_labels(machine, broken).tolist() == [[-1, -1, -1, -1, 13]]


def test_choosing_by_hand():
    chosen = choose_codes(table())
    assert chosen.code.tolist() == [0, 2, -1]  # code 2 beats code 1 for label 1: 1 against 3/4; label 2 never holds
    assert chosen.group.tolist() == chosen.site.tolist() == [0, 0, -1]
    assert chosen.precision.tolist() == [1, 1, 0]
    assert chosen.recall.tolist() == [1, 3 / 4, 0]
    assert choose_codes(table(), min_recall=0.74).code.tolist() == [0, 2, -1]
    assert choose_codes(table(), min_recall=0.75).code.tolist() == [0, -1, -1]  # exactly .75 is not above it


def test_of_equal_codes_the_greater_recall_then_the_lowest():
    assert choose_codes(of([2, 1, 1], [0, 0, 0])).code[0] == 1  # both precise; 2 of 3 against 1 of 3
    assert choose_codes(of([2, 1], [0, 0])).code[0] == 1
    twice = code_table(torch.tensor([[[[1], [0]], [[0], [1]]]]), torch.tensor([[0, 0]]), 2, 1)
    assert (int(choose_codes(twice).group[0]), int(choose_codes(twice).code[0])) == (0, 0)


def test_over_several_sites():
    # Label 0: precision 1/2 in a, 1 in b. Label 1: 1 in both, recall 1/2 in a, 1 in b. Label 2: 1 and 1 in both, so the first.
    a, b = of([0, 0, 1, 2], [0, 1, 1, 2]), of([3, 1, 1, 0], [0, 1, 1, 2], n_codes=5)
    chosen = choose_codes({"a": a, "b": b})
    assert [(chosen.sites[site], code) for site, code in zip(chosen.site.tolist(), chosen.code.tolist(), strict=True)] == [
        ("b", 3),
        ("b", 1),
        ("a", 2),
    ]
    assert score_codes(chosen, {"b": b, "a": a}).summary() == (1, 1, 1)  # by name, not by order


def test_held_out_scores_by_hand():
    chosen = choose_codes(of([0, 1], [0, 1]))
    # Code 0 fires at 2 positions, 1 of them of label 0 (of 3); code 1 never fires; label 2 has no code.
    scores = score_codes(chosen, of([0, 0, 2, 2, 3], [0, 1, 0, 0, 2]))
    assert scores.precision.tolist() == [1 / 2, 0, 0]
    assert scores.recall.tolist() == [pytest.approx(1 / 3), 0, 0]
    assert scores.found.tolist() == [True, True, False]
    assert scores.summary() == (pytest.approx(1 / 6), pytest.approx(1 / 9), pytest.approx(2 / 3))


def test_decoding_by_hand():
    train = of([0, 0, 0, 1, 2, 2], [0, 0, 1, 2, 1, 0])  # code 0 stands for 0, 1 for 2, 2 for 0 (a tie), 3 for nothing
    test = of([0, 0, 1, 2, 3, -1, 0], [0, 1, 2, 0, 0, 0, -1])  # right: the first, third and fourth of six
    assert decode_accuracy(train, test).tolist() == [3 / 6]
    assert decode_accuracy(train, train).tolist() == [4 / 6]
    # Slot 0 of the table above: code 0 right at 2, 1 at 2, 2 at 2 of 7; (1,0) is empty.
    assert decode_accuracy(table(ONE), table(ONE)).tolist() == [6 / 7]


def test_purity_by_hand():
    assert purity(torch.tensor([4, 4, 9, 2, 2])) == (1 / 3, 1 / 5, 3)
    assert purity(torch.tensor([4, -1])) == (1, 1 / 2, 1)
    assert purity(torch.tensor([-1])) == (0, 0, 0)
    assert purity(torch.arange(7)) == (1, 1, 7)


def test_codes_per_concept_by_hand():
    # Label 0: codes 3, 1, 0 fire 6, 3 and 1 times of 10. Label 1: code 2 once, the other position is empty. Label 2 never holds.
    counts = of([3] * 6 + [1] * 3 + [0] + [2, -1], [0] * 10 + [1, 1])
    needed = {0.6: [1, -1, 0], 0.61: [2, -1, 0], 0.9: [2, -1, 0], 0.95: [3, -1, 0], 1.0: [3, -1, 0], 0.5: [1, 1, 0]}
    for coverage, n in needed.items():
        assert codes_per_concept(counts, coverage).tolist() == [n]
    assert codes_per_concept(of([0] * 3 + [1] * 27, [0] * 30), 0.1).tolist() == [[1, 0, 0]]
    assert codes_per_concept(of([1] * 3 + [0] * 3 + [2] * 4, [0] * 10), 0.7).tolist() == [[2, 0, 0]]  # .7 * 10 rounds to 7


@settings(max_examples=60, deadline=None)
@given(counted(), st.floats(0, 0.99))
def test_what_always_holds(data, min_recall):
    counts = code_table(*data)
    for share in (counts.precision(), counts.recall()):
        assert ((share >= 0) & (share <= 1)).all()
    chosen = choose_codes(counts, min_recall)
    scores = score_codes(chosen, counts)
    assert scores.precision.equal(chosen.precision)  # on the data it was chosen on
    assert scores.recall.equal(chosen.recall)
    assert (chosen.recall[scores.found] > min_recall).all()
    assert scores.precision[~scores.found].sum() == 0
    good = counts.precision().where(counts.recall() > min_recall, torch.zeros(()).double())
    assert good.amax((0, 1)).equal(chosen.precision)
    split = choose_codes(
        {str(group): CodeTable(counts.hits[group, None], counts.activations[group, None], counts.occurrences, 1) for group in (0, 1)},
        min_recall,
    )
    assert split.precision.equal(chosen.precision)
    assert split.code.equal(chosen.code)
    assert split.site.equal(chosen.group)


@settings(max_examples=40, deadline=None)
@given(counted(), st.floats(0.01, 1))
def test_other_names_of_codes_change_nothing(data, coverage):
    ids, labels, n_codes, n_labels = data
    names = torch.randperm(n_codes)
    renamed = torch.where(ids < 0, ids, names[ids])
    before, after = code_table(*data), code_table(renamed, labels, n_codes, n_labels)
    assert before.hits.equal(after.hits[:, names])
    assert choose_codes(before).precision.equal(choose_codes(after).precision)
    assert choose_codes(before).recall.equal(choose_codes(after).recall)
    before, after = (code_table(each[..., :1], labels, n_codes, n_labels) for each in (ids, renamed))
    assert codes_per_concept(before, coverage).equal(codes_per_concept(after, coverage))
    if before.occurrences.sum():
        assert decode_accuracy(before, before).equal(decode_accuracy(after, after))
    assert purity(ids.flatten()) == purity(renamed.flatten())


CHOSEN = choose_codes({"z": of([3], [0])})
EMPTY = torch.zeros(4, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: table(n_codes=2), DataError, "id 2 was given, but there are 2 codes"),
        (lambda: table(n_codes=0), ConfigError, "n_codes=0"),
        (lambda: table(n_labels=1), DataError, "label 1 was given, but there are 1 labels"),
        (lambda: table(n_labels=0), ConfigError, "n_labels=0"),
        (lambda: table(labels=LABELS[:, :3]), ShapeError, r"ids \[2, 4, 2\] with labels \[2, 3\]"),
        (lambda: table(mask=EMPTY), ShapeError, r"and a mask \[4, 2\]"),
        (lambda: table(mask=EMPTY.reshape(2, 4)), DataError, "0 positions .* are left to count"),
        (lambda: table(IDS[:0], LABELS[:0]), DataError, "0 positions"),
        (lambda: table(IDS[..., :0]), DataError, "and 0 slots"),
        (lambda: choose_codes(table(), 1.0), ConfigError, "min_recall=1.0"),
        (lambda: choose_codes({}), DataError, "no table was given"),
        (lambda: choose_codes({"a": table(), "b": table(n_labels=2)}), ShapeError, "'a': 3, 'b': 2"),
        (lambda: score_codes(CHOSEN, {"z": of([0], [0], n_labels=2)}), ShapeError, "for 3 labels, and the tables have 2"),
        (lambda: score_codes(CHOSEN, {"v": of([0], [0])}), DataError, "site 'z' were chosen, but the tables are those of .'v'"),
        (lambda: score_codes(CHOSEN, {"z": of([0], [0], n_codes=3)}), DataError, "code 3 of the site 'z' .* 1 groups of 3 codes"),
        (lambda: decode_accuracy(table(), table(ONE)), DataError, "decode_accuracy .* 2 codes a position"),
        (lambda: decode_accuracy(table(ONE), table()), DataError, "2 codes a position"),
        (lambda: decode_accuracy(table(ONE), table(ONE, n_codes=5)), ShapeError, r"\[1, 4, 3\] and \[1, 5, 3\]"),
        (lambda: decode_accuracy(of([0], [0]), of([0], [-1])), DataError, "no position of the table has a label"),
        (lambda: purity(torch.tensor([], dtype=torch.long)), DataError, "no input"),
        (lambda: codes_per_concept(table()), DataError, "codes_per_concept .* 2 codes a position"),
        (lambda: codes_per_concept(table(ONE), 0.0), ConfigError, "coverage=0.0"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
