"""Search: where a concept holds, which codes stand for it, and the best neuron beside them."""

import dataclasses
import re
import time

import numpy as np
import pytest
import regex
import torch

from tests.tiny import KINDS, make_host
from tests.unit.search_store import MemoryStore
from tl_codebook import attach
from tl_codebook.errors import ConfigError, DataError, PositionError, ShapeError, UnknownHookError
from tl_codebook.experiments.tokfsm import best_neurons, choose_codes, code_table
from tl_codebook.names import Code, input_hook
from tl_codebook.store import collect_codes
from tl_codebook.store.concepts import Searchable, concept_positions, match_text
from tl_codebook.store.counting import code_counts
from tl_codebook.store.neurons import compare_with_neurons, neuron_activations
from tl_codebook.store.search import codes_of_example, search_codes
from tl_codebook.store.text import Vocabulary, load_vocabulary

WORDS = ["<bos>", "New", " York", " Haven", " is", " a", " city", ".", "the", " the", "re"]
Z, MLP = "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"
N_CODES = 6


def tokens_of(*words):
    return [WORDS.index(word) for word in words]


def make_store(n=40, seed=0, k=3, special=(0,), with_text=True):
    """Make a store of two sites with repeated codes and empty slots, BOS at the beginning and in the middle of sequences."""
    rng = np.random.default_rng(seed)
    first = tokens_of("<bos>", "New", " York", " is", " a", " city", ".", "<bos>", "New", " Haven", ".")
    second = tokens_of("<bos>", "the", "re", " is", " the", " city", " York", ".")
    rest = [[0, *rng.integers(1, len(WORDS), size).tolist()] for size in rng.integers(3, 12, n)]
    rows = [first, second, *rest]
    n_tokens = sum(map(len, rows))
    ids = {Z: rng.integers(0, N_CODES + 1, (n_tokens, 2, k)), MLP: rng.integers(0, N_CODES + 1, (n_tokens, 1, k))}
    return MemoryStore(rows, ids, N_CODES, [word.encode() for word in WORDS] if with_text else None, special)


@pytest.fixture
def store():
    return make_store()


def fires(store, site, code, group=0, n_slots=None):
    return (store.ids(site)[:, group, :n_slots] == code).any(-1)


# Where a concept holds


def test_the_group_is_what_is_marked(store):
    assert match_text(store, r"New( York)").first.tolist()[0] == 2
    assert match_text(store, r"New (York)").first.tolist()[0] == 2  # the token that holds the Y
    assert match_text(store, r"New York").first.tolist()[0] == 1  # no group: the match
    assert match_text(store, r"(?:New) Yor(k)").first.tolist()[0] == 2


@pytest.mark.usefixtures("unchecked")
def test_which_tokens_of_a_match(store):
    matches = match_text(store, r"New York is")
    assert (matches.first[0], matches.last[0]) == (1, 3)
    first_sequence = [[p for p in matches.positions(at).tolist() if p < 11] for at in ("first", "last", "all")]
    assert first_sequence == [[1], [3], [1, 2, 3]]
    with pytest.raises(ConfigError, match="at='middle'"):
        matches.positions("middle")


@pytest.mark.usefixtures("unchecked")
def test_several_groups_and_groups_that_take_no_part():
    store = make_store(n=0)
    assert match_text(store, r"(New) (York)").first.tolist() == [1]
    assert match_text(store, r"(New) (York)", group=2).first.tolist() == [2]
    assert match_text(store, r"(?P<first>New) (?P<then>York)", group="then").first.tolist() == [2]
    assert match_text(store, r"New (York)", group=0).first.tolist() == [1]
    assert match_text(store, r"New (?:(York)|Haven)").first.tolist() == [2]  # with Haven the group takes no part
    for group in (3, -1, "other", True, 1.0):
        with pytest.raises(ConfigError, match=r"was asked for, but '\(New\) \(York\)' has 2 groups"):
            match_text(store, r"(New) (York)", group=group)


def test_empty_matches_and_no_match_mark_nothing(store):
    for pattern in (r"()x?", r"", r"x*", r"\b", r"$", r"zzzz"):
        assert len(match_text(store, pattern)) == 0
        assert search_codes(store, pattern) == []


def test_a_text_is_what_lies_between_special_tokens():
    """BOS stands in the middle of the first sequence: no match runs over it, and ^ and $ are the ends of the text."""
    store = make_store(n=0)
    assert match_text(store, r"\.New").first.tolist() == []
    assert match_text(store, r"^(New)").first.tolist() == [1, 8]
    assert match_text(store, r"(\.)$").first.tolist() == [6, 10, 18]
    assert match_text(store, r"bos").first.tolist() == []
    # Characters are counted through the sequence: the first text has 22.
    assert match_text(store, r"Haven").start.tolist() == [len("New York is a city.New ")]
    assert match_text(store, r"Haven").sequence.tolist() == [0]


def test_a_token_counts_once_however_often_it_matches():
    store = make_store(n=0)
    matches = match_text(store, r"[A-Za-z]")
    assert len(matches) > len(matches.positions())
    hits = search_codes(store, r"[A-Za-z]", min_recall=0.0, n=None)
    assert {hit.occurrences for hit in hits} == {len(matches.positions())}


def test_matches_can_be_sifted(store):
    matches = match_text(store, "the")
    even = matches.where(matches.start % 2 == 0)
    assert 0 < len(even) < len(matches)
    assert set(even.positions()) == {first for first, start in zip(matches.first, matches.start, strict=True) if start % 2 == 0}


def test_compiled_patterns_keep_their_flags(store):
    wanted = match_text(store, "(?i)NEW").first.tolist()
    assert wanted
    for pattern in (re.compile("NEW", re.IGNORECASE), regex.compile("NEW", regex.IGNORECASE), re.compile("n e w", re.I | re.X)):
        assert match_text(store, pattern).first.tolist() == wanted


def test_many_blocks_give_what_one_gives(monkeypatch, store):
    whole = match_text(store, r"(is|the)")
    monkeypatch.setattr("tl_codebook.store.concepts._TOKENS_AT_ONCE", 7)
    parts = match_text(store, r"(is|the)")
    for field in dataclasses.fields(whole):
        assert getattr(whole, field.name).tolist() == getattr(parts, field.name).tolist()
    assert concept_positions(store, 4).tolist() == np.flatnonzero(store.flat == 4).tolist()


@pytest.mark.parametrize("query", [[2, 3], np.array([2, 3]), torch.tensor([2, 3]), [" York", " Haven"]])
def test_tokens(store, query):
    assert concept_positions(store, query).tolist() == np.flatnonzero(np.isin(store.flat, [2, 3])).tolist()


def test_masks(store):
    mask = np.random.default_rng(1).random(store.n_tokens) < 0.3
    for given in (mask, torch.from_numpy(mask), mask.tolist()):
        assert concept_positions(store, given).tolist() == np.flatnonzero(mask).tolist()
    even = MemoryStore([[1, 2, 3], [4, 5, 6]], {}, 1)
    assert concept_positions(even, torch.tensor([[0, 1, 0], [1, 0, 0]]).bool()).tolist() == [1, 3]
    for wrong in (mask[:-1], mask.reshape(1, -1)):
        with pytest.raises(ShapeError, match=f"the store has {store.n_tokens} positions"):
            concept_positions(store, wrong)


# Bad queries: faults 39 to 46


@pytest.mark.parametrize(("pattern", "at"), [("a(b", 3), ("[a", 2), ("(?P<x>a)\\p{Foo}", 15), ("*a", 0), ("a{99999999999999999999}", 2)])
def test_a_pattern_that_is_none_says_where(store, pattern, at):
    with pytest.raises(ConfigError, match=f"is no regular expression: .*at character {at}"):
        search_codes(store, pattern)


def test_a_pattern_that_is_nested_too_deeply(store):
    with pytest.raises(ConfigError, match="nested or repeated too deeply"):
        match_text(store, "(" * 5000 + "a" + ")" * 5000)


def test_what_a_message_repeats_is_inert(store):
    for query in ("\x1b[31m(", ["\x1b[31m"]):
        with pytest.raises((ConfigError, DataError)) as caught:
            search_codes(store, query)
        assert "\x1b" not in str(caught.value)
    with pytest.raises(UnknownHookError) as caught:
        search_codes(store, "a", sites="\x1b[31m")
    assert "\x1b" not in str(caught.value)


def test_a_pattern_of_bytes(store):
    with pytest.raises(ConfigError, match="no regular expression of text"):
        match_text(store, re.compile(b"a"))


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"^(a|aa)*\Z", r"(?:(?:a|aa)+b?)+c", r"(?R)"])
def test_a_pattern_that_would_run_for_ever_is_stopped(pattern):
    store = MemoryStore([[0] * 200 + [1]], {}, 1, [b"a", b"b"])
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"was stopped (after 0.2 s of matching|because it ran out of memory), 0 tokens or more into"):
        match_text(store, pattern, timeout=0.2)
    assert time.process_time() - began < 5


def test_the_time_limit_is_one_for_all_texts():
    store = MemoryStore([[0] * 24 + [1]] * 300, {}, 1, [b"a", b"b"])
    with pytest.raises(ConfigError, match="stopped"):
        match_text(store, r"^(a|aa)+$", timeout=0.05)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("timeout", [0, -1, float("nan"), True, "1"])
def test_a_time_limit_that_is_none(store, timeout):
    with pytest.raises(ConfigError, match=r"timeout=.* was asked for. Give seconds"):
        match_text(store, "a", timeout=timeout)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("query", [[], np.zeros(0, np.int64), [1.5], None, {}, ["a", 1], b"the"])
def test_queries_that_are_none(store, query):
    with pytest.raises(ConfigError, match=r"is none. Give a regular expression, token ids"):
        search_codes(store, query)


def test_tokens_that_are_none(store):
    with pytest.raises(DataError, match=r"token 11 was asked for, but ids begin at 0 and end at 10"):
        search_codes(store, [1, 11])
    with pytest.raises(DataError, match=r"token -1 was asked for"):
        search_codes(store, [-1])
    with pytest.raises(DataError, match=r"'York' is not one token"):
        search_codes(store, ["New", "York"])


def test_a_store_whose_tokens_are_not_of_the_vocabulary():
    store = MemoryStore([[0, 1, 7]], {}, 1, [b"a", b"b"])
    with pytest.raises(DataError, match="token 7 is asked for, but the vocabulary has 2"):
        match_text(store, "a")


def test_a_store_without_text():
    store = make_store(with_text=False)
    for query in ("the", [" the"]):
        with pytest.raises(DataError, match="collected without a tokenizer"):
            search_codes(store, query)
    vocabulary = Vocabulary.of_pieces([word.encode() for word in WORDS])
    assert search_codes(store, "the", vocabulary=vocabulary) == search_codes(make_store(), "the") != []
    assert search_codes(store, [9])


def test_a_mask_of_zeros_and_ones_is_not_taken_for_tokens(store):
    mask = np.isin(np.arange(store.n_tokens), [3, 5])
    assert search_codes(store, mask, n=3)
    with pytest.raises(ConfigError, match="a 0 or 1 for each position of the store, which would be tokens 0 and 1"):
        search_codes(store, mask.astype(int))


def test_texts_and_sequences_without_a_token():
    ids = {MLP: np.zeros((3, 1, 1), int)}
    empty = MemoryStore([[], [1], [0], [], [1]], ids, 2, [b"", b"a"])
    assert match_text(empty, "a").first.tolist() == [0, 2]
    assert match_text(empty, "a").sequence.tolist() == [1, 4]
    assert search_codes(MemoryStore([[], []], {MLP: np.zeros((0, 1, 1), int)}, 2, [b"a"]), "a") == []


# Which codes stand for it


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("n_slots", [None, 1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_counts_by_the_definition(store, special, n_slots, share):
    holds = np.random.default_rng(2).random(store.n_tokens) < share
    counted = np.ones(store.n_tokens, bool) if special else ~store.is_special()
    for site, n_groups in ((Z, 2), (MLP, 1)):
        counts = code_counts(store, site, np.flatnonzero(holds), n_slots=n_slots, special=special)
        assert (counts.occurrences, counts.n_positions) == ((holds & counted).sum(), counted.sum())
        for group in range(n_groups):
            for code in range(N_CODES):
                there = fires(store, site, code, group, n_slots) & counted
                assert counts.activations[group, code] == there.sum()
                assert counts.hits[group, code] == (there & holds).sum()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_code_counts_once_at_a_position(k):
    store = make_store(k=k)
    counts = code_counts(store, Z, np.arange(0, store.n_tokens, 3), special=True)
    assert counts.activations.tolist() == store.counts(Z).tolist()
    assert counts.hits[1, 4] == fires(store, Z, 4, 1)[::3].sum()


def test_codes_that_never_repeat_take_the_short_way():
    """Every slot another code: the counts of the store say so, and nothing is compared."""
    rng = np.random.default_rng(0)
    ids = {MLP: np.stack([rng.permutation(N_CODES)[:3] for _ in range(50)])[:, None]}
    store = MemoryStore([list(range(10))] * 5, ids, N_CODES)
    counts = code_counts(store, MLP, np.arange(20))
    assert counts.hits.tolist() == [[int((ids[MLP][:20] == code).sum()) for code in range(N_CODES)]]


def test_the_figures_are_those_of_the_experiments(store):
    """`code_table` of TokFSM counts the same: precision, recall, and the code that is chosen."""
    holds = np.random.default_rng(3).random(store.n_tokens) < 0.2
    ids = torch.from_numpy(store.ids(Z).astype(np.int64))
    ids[ids == N_CODES] = -1
    mask = torch.from_numpy(~store.is_special())[None]
    table = code_table(ids[None], torch.from_numpy(holds)[None].long() - 1, N_CODES, 1, mask=mask)
    counts = code_counts(store, Z, np.flatnonzero(holds))
    assert np.allclose(counts.precision(), table.precision()[..., 0])
    assert np.allclose(counts.recall(), table.recall()[..., 0])
    chosen = choose_codes(table, 0.01)
    best = search_codes(store, holds, sites=Z, by="precision")[0]
    assert (best.group, best.code.code) == (int(chosen.group), int(chosen.code))
    assert best.precision == pytest.approx(float(chosen.precision))


def test_rows(store):
    hits = search_codes(store, r"New (York)", min_recall=0.0, n=None)
    assert {hit.site for hit in hits} == {"z", "mlp_out"}
    for hit in hits:
        assert hit.code == Code(hit.layer, hit.site, hit.group, hit.code.code) == Code.parse(hit.label)
        there = fires(store, hit.code.hook_name, hit.code.code, hit.group or 0) & ~store.is_special()
        holds = np.isin(np.arange(store.n_tokens), match_text(store, r"New (York)").first)
        assert (hit.hits, hit.activations, hit.occurrences) == ((there & holds).sum(), there.sum(), holds.sum())
        assert hit.precision == hit.hits / hit.activations
        assert hit.recall == hit.hits / hit.occurrences
        assert hit.f1 == pytest.approx(2 * hit.precision * hit.recall / (hit.precision + hit.recall))
    assert {hit.group for hit in hits if hit.site == "mlp_out"} == {None}


def test_mutual_information():
    """A code that fires just where the concept holds tells all of it; one that fires everywhere, or by chance, nothing."""
    ids = np.array([[0, 2, 3], [0, 2, 1], [1, 2, 3], [1, 2, 4]])[:, None]
    counts = code_counts(MemoryStore([[0, 1, 2, 3]], {MLP: ids}, 5), MLP, np.array([0, 1]))
    one_in_four = 1 - 0.75 * (np.log2(3) - 2 / 3)  # 1 bit, less what is left at the three positions where the code does the same
    assert counts.mi()[0] == pytest.approx([1, one_in_four, 0, 0, one_in_four])


@pytest.mark.parametrize("by", ["f1", "precision", "recall", "mi"])
def test_order(store, by):
    hits = search_codes(store, "the", by=by, min_recall=0.0, n=None)
    keys = [(-getattr(hit, by), -hit.f1, hit.layer, hit.group or 0, hit.code.code) for hit in hits]
    assert keys == sorted(keys)
    assert len({key[0] for key in keys}) > 3
    assert search_codes(store, "the", by=by, min_recall=0.0, n=4) == hits[:4]


def test_thresholds_hold_what_they_say(store):
    every = search_codes(store, "the", min_recall=0.0, n=None)
    middle = sorted(hit.precision for hit in every)[len(every) // 2]
    assert search_codes(store, "the", min_precision=middle, min_recall=0.4, n=None) == [
        hit for hit in every if hit.precision >= middle and hit.recall >= 0.4
    ]
    ids = {MLP: np.array([[[0]], [[1]], [[1]]])}
    assert [hit.label for hit in search_codes(MemoryStore([[5, 6, 7]], ids, 2), 5, min_precision=1.0)] == ["L1.mlp_out:0"]


def test_sites(store):
    def places(sites):
        return {str(hit.code.address) for hit in search_codes(store, "e", sites=sites, min_recall=0.0, n=None)}

    assert places(None) == {"L0.z.0", "L0.z.1", "L1.mlp_out"}
    assert places("z") == places(Z) == places(["L0.z"]) == places(["L0.z.0", "L0.z"]) == {"L0.z.0", "L0.z.1"}
    assert places(["L0.z.1", "mlp_out"]) == {"L0.z.1", "L1.mlp_out"}
    for wrong in ("q", "L3.z", "L0.z.2", "blocks.0.hook_mlp_out", "nonsense:"):
        with pytest.raises(UnknownHookError, match=f"the store has no codes of '{wrong}'"):
            places(wrong)
    with pytest.raises(ConfigError, match="empty list of sites"):
        places([])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "option",
    [{"by": "f2"}, {"min_precision": 1.1}, {"min_recall": -0.1}, {"min_recall": float("nan")}, {"n": 0}, {"n_slots": 4}, {"n_slots": 0}],
    ids=str,
)
def test_options_that_cannot_be(store, option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}="):
        search_codes(store, "the", **option)


@pytest.mark.usefixtures("unchecked")
def test_a_shift_marks_the_token_before_or_after_within_the_sequence(store):
    wanted = tokens_of(" York")
    rows = [range(where.start, where.stop) for where in map(store.sequence, range(store.n_sequences))]
    for shift in (-1, 2):
        moved = [p + shift for row in rows for p in row if p + shift in row and store.flat[p] in wanted]
        mask = np.isin(np.arange(store.n_tokens), moved)
        assert 0 < mask.sum() < len(concept_positions(store, wanted)) or shift == -1
        assert search_codes(store, wanted, shift=shift, n=None) == search_codes(store, mask, n=None)
    opening = np.isin(np.arange(store.n_tokens), store.starts[:-1])
    assert search_codes(store, opening, shift=-1) == []  # nothing is before the first token of a sequence
    with pytest.raises(ConfigError, match=r"shift=0.5 was asked for"):
        search_codes(store, [1], shift=0.5)


def test_special_tokens(store):
    with pytest.raises(DataError, match="special tokens alone"):
        search_codes(store, [0])
    bos = search_codes(store, [0], special=True, min_recall=0.0, n=None)
    assert {hit.occurrences for hit in bos} == {int((store.flat == 0).sum())}
    plain, counted = (search_codes(store, "the", special=special, min_recall=0.0, n=None) for special in (False, True))
    before, after = ({hit.label: hit for hit in hits} for hits in (plain, counted))
    assert all(after[label].activations >= hit.activations and after[label].hits == hit.hits for label, hit in before.items())
    assert sum(hit.activations for hit in counted) > sum(hit.activations for hit in plain)


def test_damaged_ids(store):
    counts = store.counts(MLP)
    store.counts = lambda site: counts
    store.arrays[MLP][5] = N_CODES + 3
    with pytest.raises(DataError, match=f"the store holds code {N_CODES + 3} of a codebook of {N_CODES}"):
        search_codes(store, np.arange(store.n_tokens) == 5, sites="mlp_out")


def test_a_table_of_hits(store):
    pandas = pytest.importorskip("pandas")
    hits = search_codes(store, "the")
    table = pandas.DataFrame(hits)
    assert list(table.columns) == [field.name for field in dataclasses.fields(hits[0])]
    assert table["label"].tolist() == [hit.label for hit in hits]
    assert table["precision"].tolist() == [hit.precision for hit in hits]


def test_codes_of_an_example(store):
    where = store.sequence(1)
    assert [hit.mi for hit in codes_of_example(store, 1, min_share=0.3)] == sorted(
        (hit.mi for hit in codes_of_example(store, 1, min_share=0.3)), reverse=True
    )
    hits = codes_of_example(store, 1, min_share=0.3, by="recall")
    assert hits
    for hit in hits:
        there = fires(store, hit.code.hook_name, hit.code.code, hit.group or 0)
        assert hit.recall == there[where.start + 1 : where.stop].mean() >= 0.3  # the first is BOS
        assert hit.precision == there[where.start + 1 : where.stop].sum() / (there & ~store.is_special()).sum()
    assert [hit.recall for hit in hits] == sorted((hit.recall for hit in hits), reverse=True)
    part = codes_of_example(store, 1, start=2, stop=5, min_share=1.0, sites="z")
    assert {hit.occurrences for hit in part} <= {3}
    assert len(codes_of_example(store, 1, min_share=0.0, n=None)) > len(hits)


@pytest.mark.usefixtures("unchecked")
def test_examples_that_are_not_there(store):
    for wrong in ({"sequence": 42}, {"sequence": -1}, {"sequence": 0, "stop": 12}, {"sequence": 0, "start": 5, "stop": 4}):
        with pytest.raises(PositionError, match=r"asked for, but (the store|it) has"):
            codes_of_example(store, **wrong)
    with pytest.raises(DataError, match="none but special tokens"):
        codes_of_example(store, 0, stop=1)
    with pytest.raises(ConfigError, match=r"min_share=2"):
        codes_of_example(store, 0, min_share=2.0)


# The best neuron beside it


def activations_of(store, n_neurons=7):
    values = torch.randn(store.n_tokens, n_neurons, generator=torch.Generator().manual_seed(1))
    return values.mul(4).round().div(4)  # with ties


def test_neurons_are_those_of_the_experiments(store):
    """`best_neurons` of TokFSM, on the same activations at the code's recall."""
    values, holds = activations_of(store), np.isin(np.arange(store.n_tokens), match_text(store, "the").first)
    rows = compare_with_neurons(store, "the", {"a": values[:, :4], "b": values[:, 4:].numpy()}, n=5)
    hits = search_codes(store, "the", by="precision", n=5)
    assert [row.label for row in rows] == [hit.label for hit in hits]
    counted = torch.from_numpy(~store.is_special())
    labels = torch.from_numpy(holds)[counted].long() - 1
    for row, hit in zip(rows, hits, strict=True):
        best = best_neurons(values[counted], labels, torch.tensor([hit.recall], dtype=torch.double))
        assert (row.precision, row.recall) == (hit.precision, hit.recall)
        assert row.neuron == [f"a[{n}]" for n in range(4)][int(best.neuron)] if int(best.neuron) < 4 else f"b[{int(best.neuron) - 4}]"
        assert row.neuron_precision == pytest.approx(float(best.precision))
        assert row.neuron_recall == pytest.approx(float(best.recall))
        assert row.neuron_recall >= hit.recall
        assert row.threshold == float(best.threshold)


def test_parts_of_activations_give_what_the_whole_gives(store, monkeypatch):
    values = activations_of(store)
    whole = compare_with_neurons(store, "the", {Z: values}, n=3)
    monkeypatch.setattr("tl_codebook.store.neurons._VALUES_AT_ONCE", 20)
    assert compare_with_neurons(store, "the", {Z: values}, n=3) == whole
    assert whole[0].neuron.startswith("L0.z[")


def test_the_codes_can_be_given(store):
    hits = search_codes(store, "the", sites="mlp_out", min_recall=0.0)[2:4]
    rows = compare_with_neurons(store, "the", {"a": activations_of(store)}, hits=hits)
    assert [row.label for row in rows] == [hit.label for hit in hits]
    with pytest.raises(ConfigError, match="was found for a concept that holds at"):
        compare_with_neurons(store, "New", {"a": activations_of(store)}, hits=hits)
    assert compare_with_neurons(store, "zzz", {"a": activations_of(store)}) == []


def test_bad_activations(store):
    values = activations_of(store)
    with pytest.raises(ShapeError, match=f"but the store has {store.n_tokens} positions"):
        compare_with_neurons(store, "the", {"a": values[1:]})
    with pytest.raises(DataError, match="no activations"):
        compare_with_neurons(store, "the", {})
    values[3, 2] = float("nan")
    with pytest.raises(DataError, match="'a' is NaN"):
        compare_with_neurons(store, "the", {"a": values})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("gpt2")])
def test_neurons_of_a_model(store, kind):
    """A model's z (before the codes are chosen) and post, run over sequences of many lengths without padding."""
    model = make_host(kind)
    attach(model, "z", n_codes=16, k=2)
    source = neuron_activations(model, store, batch_size=5)
    got = compare_with_neurons(store, "the", source, n=2)
    found = {}
    for index in range(store.n_sequences):
        where = store.sequence(index)
        tokens = torch.from_numpy(store.tokens(where.start, where.stop))[None]
        _, cache = model.run_with_cache(tokens)
        for layer in range(2):
            z, post = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.mlp.hook_post"
            found.setdefault(z, []).append(cache[input_hook(z)].flatten(2)[0])
            found.setdefault(post, []).append(cache[post][0])
    names = [name for site in ("z", "post") for name in found if site in name]
    stacked = {name: torch.cat(found[name]) for name in (names if list(source.hooks) == names else source.hooks)}
    want = compare_with_neurons(store, "the", stacked, n=2)
    for one, other in zip(got, want, strict=True):
        assert (one.label, one.neuron) == (other.label, other.neuron)
        assert one.neuron_precision == pytest.approx(other.neuron_precision)
        assert one.threshold == pytest.approx(other.threshold, abs=1e-5)


def test_neurons_of_a_model_that_does_not_fit(store):
    model = make_host("native")
    with pytest.raises(UnknownHookError):
        neuron_activations(model, store, "nonsense")
    with pytest.raises(ConfigError, match="batch_size=0"):
        neuron_activations(model, store, batch_size=0)
    long = MemoryStore([[3] * 49], {MLP: np.zeros((49, 1, 1), int)}, 2)
    with pytest.raises(PositionError, match="sequences of 49 tokens, but the model takes 48"):
        neuron_activations(model, long)


# A store on disk


def test_a_collected_store(tmp_path):
    """What is found in the files is what the model says when it is run again."""
    model = make_host("native")
    attach(model, ["z", "mlp_out"], n_codes=8, k=3)
    texts = [f"w{a} w{b} w{c} w5" for a in (3, 4, 5) for b in (3, 6) for c in (5, 7)]
    store = collect_codes(model, texts, tmp_path / "store", progress=False)
    assert isinstance(store, Searchable)
    hits = search_codes(store, r"w3 (w\d+)", min_recall=0.0, n=None)
    assert {hit.occurrences for hit in hits} == {8}  # 4 texts begin with w3, and 4 others have it second
    model.eval()
    found = {}
    for text in texts:
        tokens = torch.tensor([[1, *(int(word[1:]) for word in text.split())]])
        _, cache = model.run_with_cache(tokens)
        for site in store.sites:
            found.setdefault(site, []).append(cache[f"{site}.hook_codes"][0].reshape(tokens.shape[1], -1, 3))
    ids = {site: torch.cat(parts).numpy() for site, parts in found.items()}
    again = MemoryStore([[1, *(int(word[1:]) for word in text.split())] for text in texts], ids, 8, store_words(store), special=[1])
    assert search_codes(again, r"w3 (w\d+)", min_recall=0.0, n=None) == hits


def store_words(store):
    return load_vocabulary(store.path)


# Speed


def test_a_search_does_not_go_through_the_codes():
    """With 64 times as many codes, counting takes about as long (and a fraction of a second for 4 million ids)."""
    seconds = {}
    for n_codes in (1024, 65_000):
        ids = np.random.default_rng(0).integers(0, n_codes, (250_000, 4, 4))
        store = MemoryStore([range(250_000)], {Z: ids}, n_codes)
        every = np.stack([np.bincount(ids[:, group].reshape(-1), minlength=n_codes) for group in range(4)])
        store.counts = lambda site, every=every: every
        mask = np.zeros(store.n_tokens, bool)
        mask[::4] = True
        began = time.process_time()
        hits = search_codes(store, mask, min_recall=0.0, n=10)
        seconds[n_codes] = time.process_time() - began
        assert len(hits) == 10
    assert seconds[65_000] < 20 * seconds[1024] + 0.5
    assert max(seconds.values()) < 5
