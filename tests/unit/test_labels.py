"""Labels without a language model: chosen on one half, measured on the other; and the files that hold them."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
import regex

from tests.tiny import KINDS, make_host
from tests.unit.search_store import MemoryStore
from tl_codebook import attach
from tl_codebook.describe import labels as labels_module
from tl_codebook.describe.label_files import CodeLabel, CodeLabels, read_labels, write_labels
from tl_codebook.describe.labels import label_codes
from tl_codebook.describe.patterns import PATTERNS
from tl_codebook.errors import (
    BasisMismatchError,
    CheckpointError,
    CheckpointExistsError,
    ConfigError,
    DataError,
    InvalidCodeError,
    LabelError,
    SearchTimeoutError,
    UnknownHookError,
)
from tl_codebook.names import Code, as_code
from tl_codebook.store import collect_codes
from tl_codebook.store.text import Vocabulary

WORDS = ["<bos>", "the", " the", "The", " cat", " sat", ",", ".", " ran", " dog", "ing", "\n"]
SITE, HEADS = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    '"><svg onload=alert(1)>',
    "{{7*7}}",
    "${jndi:ldap://x}",
    "%s%n{0.__class__}",
    "=cmd|' /C calc'!A0",
    "__import__('os').system('false')",
    "../../etc/passwd",
]
CONTROL = ["\x1b[31mred", "a\nb", "a\0b", "a\rb", "a\tb", "x\u202ey", "x\u2028y", "\ud800", "\x9b2J", "x\u2066y"]


class Store(MemoryStore):
    """A store in memory that knows where each code fires."""

    def positions(self, code):
        code = as_code(code)
        return np.flatnonzero((self.arrays[code.hook_name][:, code.group or 0] == code.code).any(-1))


def make_store(n_sequences=60, length=12, n_codes=8, k=2, seed=0, n_groups=1, site=SITE, plant=None, words=WORDS):
    """Make a store of random words after a BOS, in which `plant` [token] -> ids says where codes fire, and other slots are at random."""
    rng = np.random.default_rng(seed)
    rows = [[0, *rng.integers(1, len(words), rng.integers(length // 2, length)).tolist()] for _ in range(n_sequences)]
    flat = np.array([token for row in rows for token in row])
    ids = rng.integers(0, n_codes + 1, (len(flat), n_groups, k))
    ids = ids if plant is None else plant(flat, ids, rows)
    return Store(rows, {site: ids}, n_codes, [word.encode() for word in words], special=[0])


def only(**firing):
    """Return a plant that fires ``code_3=mask_function`` alone: a function of tokens and rows for each code, one slot each."""

    def plant(flat, ids, rows):
        ids = np.full((len(flat), 1, len(firing)), 8)
        for slot, (name, where) in enumerate(firing.items()):
            ids[where(flat, rows), 0, slot] = int(name.removeprefix("code_"))
        return ids

    return plant


def at(*tokens):
    return lambda flat, rows: np.isin(flat, tokens)


def after(*tokens):
    def where(flat, rows):
        mask = np.zeros(len(flat), bool)
        mask[1:] = np.isin(flat[:-1], tokens) & (flat[1:] != 0)
        return mask

    return where


def label(store, **options):
    return label_codes(store, progress=False, **{"min_count": 5} | options)


# Which label


def test_each_kind_of_label():
    store = make_store(plant=only(code_0=at(6), code_1=at(9), code_2=at(1, 2, 3), code_3=after(4), code_4=after(1, 2, 3)))
    found = label(store)
    assert [(row.label, row.text, row.kind, row.tokens) for row in found] == [
        ("L0.mlp_out:0", "comma", "regex", ()),
        ("L0.mlp_out:1", "token ' dog'", "token", (9,)),
        ("L0.mlp_out:2", "token 'the', ' the' or 'The'", "token", (1, 2, 3)),
        ("L0.mlp_out:3", "previous token ' cat'", "previous token", (4,)),
        ("L0.mlp_out:4", "previous token 'the', ' the' or 'The'", "previous token", (1, 2, 3)),
    ]
    assert all(row.precision == row.recall == row.f1 == 1.0 for row in found)
    assert found["L0.mlp_out:0"].pattern == PATTERNS["comma"]
    assert (found.n_codes, found.n_labelled, found.n_unlabelled, found.n_dead, found.n_rare) == (8, 5, 3, 3, 0)
    head, *lines = str(found).splitlines()
    assert head == "5 of 8 codes labelled (held-out precision 0.9 or more), 3 unlabelled, of which 3 never fire" + (
        " and 0 fire fewer than 5 times in a half"
    )
    assert lines[1] == "  L0.mlp_out:1  token ' dog'  (precision 1.000, recall 1.000)"


def test_figures_are_those_of_the_half_that_did_not_choose():
    rng = np.random.default_rng(5)

    def noisy(flat, rows):
        return (flat == 9) & (rng.random(len(flat)) < 0.7) | (rng.random(len(flat)) < 0.004)

    store = make_store(n_sequences=200, plant=only(code_1=noisy))
    row = label(store)["L0.mlp_out:1"]
    held = labels_module._sides(store, 0) == 1
    fires = (store.ids(SITE)[:, 0] == 1).any(-1) & held & ~store.special
    holds = (store.flat == 9) & held
    assert 0.9 <= row.precision < 1
    assert row.recall < 0.9
    assert row.precision == (fires & holds).sum() / fires.sum()
    assert row.recall == (fires & holds).sum() / holds.sum()
    assert row.f1 == pytest.approx(2 * row.precision * row.recall / (row.precision + row.recall), abs=1e-12)
    assert row.n_held_out == fires.sum()
    assert row.n_train + row.n_held_out == ((store.ids(SITE)[:, 0] == 1).any(-1) & ~store.special).sum()


def test_halves():
    store = make_store(n_sequences=31)
    sides = labels_module._sides(store, 0)
    assert (sides[store.special] == 2).all()
    halves = [set(sides[store.sequence(i)].tolist()) - {2} for i in range(store.n_sequences)]
    assert all(len(half) == 1 for half in halves)  # no sequence lies in both
    assert sorted([halves.count({0}), halves.count({1})]) == [15, 16]
    assert (labels_module._sides(store, 0) == sides).all()
    assert (labels_module._sides(store, 1) != sides).any()


@pytest.mark.parametrize("good_half", [0, 1])
def test_what_holds_on_one_half_alone_is_no_label(good_half):
    blank = make_store(n_sequences=100)
    sides = labels_module._sides(blank, 0)
    other = np.random.default_rng(1).random(blank.n_tokens) < 0.2
    fires = np.where(sides == good_half, blank.flat == 9, other) & ~blank.special
    store = make_store(n_sequences=100, plant=only(code_1=lambda flat, rows: fires))
    assert len(label(store)) == 0
    assert label(store).n_unlabelled == 8


def test_against_every_candidate_by_hand():
    """Slow and simple: all candidates of all codes, one after the other."""
    patterns = {"end": r"([.,])", "after the": r"(?i:the) (\w+)", "letter a": r"(\w*a\w*)", "any": r"(\S)"}
    n_found = 0
    for seed in range(6):
        store = make_store(seed=seed, n_sequences=80, n_codes=6, k=3, n_groups=2, site=HEADS, plant=_correlated(seed))
        for n_slots in (None, 1):
            found = label(store, patterns=patterns, min_precision=0.55, min_recall=0.02, n_slots=n_slots, seed=seed)
            expected = {code: best for code in _codes(2, 6) if (best := _by_hand(store, code, patterns, 0.55, 0.02, n_slots, seed))}
            assert {str(row.code): (row.kind, row.text) for row in found} == {code: best[:2] for code, best in expected.items()}
            for code, (_, _, precision, recall) in expected.items():
                assert (found[code].precision, found[code].recall) == pytest.approx((precision, recall))
            n_found += len(found)
    assert n_found > 20


def _codes(n_groups, n_codes):
    return [f"L1.z.{group}:{code}" for group in range(n_groups) for code in range(n_codes)]


def _correlated(seed):
    def plant(flat, ids, rows):
        rng = np.random.default_rng(seed + 100)
        before = np.concatenate([[0], flat[:-1]])
        for group in range(2):
            for code in range(4):
                where = np.isin((flat, before)[code % 2], rng.integers(1, len(WORDS), 1 + code)) & (rng.random(len(flat)) < 0.6)
                ids[:, group][ids[:, group] == code] = 6
                ids[where, group, rng.integers(0, 3)] = code
        return ids

    return plant


def _by_hand(store, code, patterns, min_precision, min_recall, n_slots, seed):
    place, sides = Code.parse(code), labels_module._sides(store, seed)
    fires = (store.ids(HEADS)[:, place.group, :n_slots] == place.code).any(-1) & (sides < 2)
    masks = {("regex", name): _regex_mask(store, pattern) for name, pattern in patterns.items()}
    before = np.where(np.isin(np.arange(store.n_tokens), store.starts[:-1]), 0, np.concatenate([[0], store.flat[:-1]]))
    for kind, tokens in (("token", store.flat), ("previous token", before)):
        for token in range(1, len(WORDS)):
            masks[kind, f"{kind} {WORDS[token]!r}"] = tokens == token
        masks[kind, f"{kind} 'the', ' the' or 'The'"] = np.isin(tokens, [1, 2, 3])
    best, greatest = None, 0.0
    for (kind, text), mask in masks.items():
        figures = []
        for side in (0, 1):
            half = sides == side
            both, n_fires, n_holds = (fires & mask & half).sum(), (fires & half).sum(), (mask & half).sum()
            figures.append((both / max(n_fires, 1), both / max(n_holds, 1), 2 * both / max(n_fires + n_holds, 1)))
        common = (mask & (sides < 2)).sum() > 0.5 * (sides < 2).sum()
        if not common and figures[0][0] >= min_precision and figures[0][1] >= min_recall and figures[0][2] > greatest + 1e-12:
            greatest, best = figures[0][2], (kind, text, *figures[1][:2])
    return best if best and best[2] >= min_precision and best[3] >= min_recall else None


def _regex_mask(store, pattern):
    mask = np.zeros(store.n_tokens, bool)
    for number in range(store.n_sequences):
        whole = store.sequence(number)
        ends = np.cumsum([len(WORDS[token]) for token in store.flat[whole.start + 1 : whole.stop]])
        text = "".join(WORDS[token] for token in store.flat[whole.start + 1 : whole.stop])
        for match in regex.finditer(pattern, text):
            mask[whole.start + 1 + np.searchsorted(ends, match.start(1), side="right")] = True
    return mask


def test_what_is_true_almost_everywhere_is_no_label():
    store = make_store(plant=only(code_1=lambda flat, rows: np.random.default_rng(0).random(len(flat)) < 0.3))
    assert len(label(store, patterns={"a token": r"(?s)(.)"}, min_precision=0.3)) == 0
    assert len(label(store, patterns={"a token": r"([^,])"}, min_precision=0.3)) == 0
    rare = label(store, patterns={"some": r"((?i:the|cat|sat))"}, min_precision=0.3)  # 5 of 11 words
    assert [row.text for row in rare] == ["some"]


def test_dead_and_rare_codes_are_counted():
    def plant(flat, ids, rows):
        ids = np.full((len(flat), 1, 2), 8)
        ids[flat == 9, 0, 0] = 0
        ids[flat == 0, 0, 0] = 1  # at BOS alone: dead on text
        ids[np.flatnonzero(flat == 4)[:5], 0, 1] = 2
        return ids

    found = label(make_store(plant=plant))
    assert (found.n_codes, found.n_labelled, found.n_dead, found.n_rare, found.n_unlabelled) == (8, 1, 6, 1, 7)
    assert label(make_store(plant=plant), min_count=1)["L0.mlp_out:2"].kind in ("token", "previous token")
    none = label(make_store(plant=plant), min_count=10_000)
    assert (none.n_labelled, none.n_dead, none.n_rare) == (0, 6, 2)


def test_a_code_counts_once_at_a_position():
    store = make_store(plant=lambda flat, ids, rows: np.where((flat == 9)[:, None, None], 3, 8).repeat(2, axis=-1))
    row = label(store)["L0.mlp_out:3"]
    assert row.n_train + row.n_held_out == (store.flat == 9).sum()
    assert row.precision == 1.0


def test_the_token_before_is_of_the_same_text():
    store = make_store(n_sequences=120, plant=only(code_1=lambda flat, rows: np.concatenate([[True], flat[:-1] == 0]) & (flat != 0)))
    row = label(store)["L0.mlp_out:1"]  # the first word of each text: before it there is a BOS, which is no token of text
    assert (row.kind, row.text) == ("regex", "start of a text")
    assert len(label(store, patterns={})) == 0


def test_the_token_before_is_of_the_same_sequence():
    """Without a BOS between them: the last token of a sequence comes before nothing."""
    rng = np.random.default_rng(0)
    rows = [[9, *rng.choice([1, 5, 6], 6).tolist(), 4] for _ in range(60)]  # each begins with ' dog' and ends with ' cat'
    flat = np.concatenate(rows)
    ids = np.where((flat == 9)[:, None, None], 1, 8)
    store = Store(rows, {SITE: ids}, 8, [word.encode() for word in WORDS])
    assert label(store, patterns={})["L0.mlp_out:1"].text == "token ' dog'"
    sides = labels_module._sides(store, 0)
    _, before, behind = labels_module._token_facts(store, sides, None, ("token", "previous token"), ("next token",))
    assert before.counts(np.flatnonzero(flat == 9)).sum() == 0
    assert behind.counts(np.flatnonzero(flat == 4)).sum() == 0
    assert before.counts(np.flatnonzero(flat == 4)).sum() == behind.counts(np.flatnonzero(flat == 9)).sum() == 60


@pytest.mark.parametrize("good_half", [0, 1])
def test_recall_has_to_be_reached_on_both_halves(good_half):
    blank = make_store(n_sequences=100)
    sides = labels_module._sides(blank, 0)
    some = np.random.default_rng(1).random(blank.n_tokens) < 0.3
    store = make_store(n_sequences=100, plant=only(code_1=lambda flat, rows: (flat == 9) & ((sides == good_half) | some)))
    assert label(store)["L0.mlp_out:1"].text == "token ' dog'"
    assert len(label(store, min_recall=0.6)) == 0
    assert len(label(store, min_recall=0.1)) == 1


def test_sites_groups_and_patterns_of_ones_own():
    store = make_store(n_groups=2, site=HEADS, plant=lambda flat, ids, rows: np.where((flat == 9)[:, None, None], [[[1], [2]]], 8))
    assert [row.label for row in label(store)] == ["L1.z.0:1", "L1.z.1:2"]
    one = label(store, sites="L1.z.1")
    assert [row.label for row in one] == ["L1.z.1:2"]
    assert one.n_codes == 8
    assert label(store, patterns={"pet": r"(dog)"}, tokens=False)["L1.z.0:1"].text == "pet"
    assert len(label(store, patterns={"pet": r"(cat)"}, tokens=False)) == 0
    assert [row.text for row in label(store, patterns={})] == ["token ' dog'"] * 2
    many = {f"pattern {i}": r"(cat)" for i in range(40)} | {"pet": r"(dog)"}  # more than are taken together
    assert label(store, patterns=many, tokens=False)["L1.z.1:2"].text == "pet"


def test_without_text():
    store = make_store(plant=only(code_1=at(9)))
    words, store.vocabulary = store.vocabulary, None
    with pytest.raises(DataError, match=r"patterns=\{\} for labels by token ids"):
        label(store)
    assert label(store, patterns={})["L0.mlp_out:1"].text == "token 9"
    assert label(store, vocabulary=words)["L0.mlp_out:1"].text == "token ' dog'"


def test_bytes_that_are_no_text():
    store = make_store(plant=only(code_1=at(9), code_2=at(10)))
    pieces = [word.encode() for word in WORDS]
    pieces[9], pieces[10] = b"\xe2\x80", b"\x1b[31m"
    store.vocabulary = Vocabulary.of_pieces(pieces)
    found = label(store, patterns={})
    assert found["L0.mlp_out:1"].text == "token bytes e2 80"
    assert found["L0.mlp_out:2"].text == r"token '\x1b[31m'"


@pytest.mark.parametrize("token", HOSTILE)
def test_hostile_tokens_are_text(token):
    words = [*WORDS[:9], token, *WORDS[10:]]
    found = label(make_store(plant=only(code_1=at(9)), words=words), patterns={})
    assert found["L0.mlp_out:1"].text == f"token '{token}'"
    assert token in str(found)


# With a model


def test_the_token_after():
    """The candidates are those that the code makes likely: code 1 its own, code 2 another one."""
    store = make_store(plant=only(code_1=lambda flat, rows: np.concatenate([flat[1:] == 9, [False]]) & (flat != 0)), n_sequences=120)
    sides, positions = labels_module._sides(store, 0), store.positions("L0.mlp_out:1")
    facts = labels_module._token_facts(store, sides, store.vocabulary, (), ("next token",))
    fires = np.bincount(sides[positions], minlength=3)[:2]
    for tokens, text in (([4, 9], "next token ' dog'"), ([4, 5], None)):
        likely = np.array([[tokens] * 8])
        found = labels_module._best(facts, positions, fires, 0.9, 0.0, likely, Code.parse("L0.mlp_out:1"))
        assert (found and (found.text, found.precision)) == (text and (text, 1.0))
    assert labels_module._best(facts, positions, fires, 0.9, 0.0, None, Code.parse("L0.mlp_out:1")) is None


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1], "native"])
def test_tokens_that_a_code_makes_likely(kind, tmp_path):
    from tl_codebook.describe.logits import direct_logit_effect

    model = make_host(kind)
    attach(model, ["z", "q", "mlp_out"], n_codes=5, k=2)
    store = collect_codes(model, ["w3 w4 w5", "w6 w7"], tmp_path / "store", progress=False)
    likely = labels_module._likely_tokens(store, model, list(store.sites), 3)
    assert sorted(likely) == [name for name in sorted(store.sites) if not name.endswith("hook_q")]
    for code in ("L0.z.2:4", "L1.mlp_out:3"):
        place = Code.parse(code)
        wanted = direct_logit_effect(model, code).topk(3).indices.tolist()
        assert likely[place.hook_name][place.group or 0, place.code].tolist() == wanted
    assert label(store, model=model, min_count=1, patterns={}).n_codes == 2 * (4 * 5 + 4 * 5 + 5)


def test_a_model_with_other_codes(tmp_path):
    model = make_host("native")
    books = attach(model, "mlp_out", n_codes=5)
    store = collect_codes(model, ["w3 w4 w5", "w6 w7"], tmp_path / "store", progress=False)
    books[SITE].codes.data += 1
    with pytest.raises(BasisMismatchError, match=r"blocks\.0\.hook_mlp_out"):
        label(store, model=model)


# What cannot be asked


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_precision": 90}, ConfigError, "min_precision=90.*0 to 1"),
        ({"min_precision": True}, ConfigError, "min_precision=True"),
        ({"min_recall": -0.1}, ConfigError, "min_recall=-0.1"),
        ({"min_count": 0}, ConfigError, "min_count=0"),
        ({"n_logits": 0}, ConfigError, "n_logits=0"),
        ({"n_slots": 3}, ConfigError, "n_slots=3.*2 codes"),
        ({"sites": "L7.z"}, UnknownHookError, "L7.z"),
        ({"sites": []}, ConfigError, "no code"),
        ({"patterns": ["(a)"]}, ConfigError, "mapping"),
        ({"patterns": {"": "(a)"}}, ConfigError, "names and regular expressions"),
        ({"patterns": {"a": 3}}, ConfigError, "names and regular expressions"),
        ({"patterns": {"a": "(a"}}, ConfigError, "no regular expression.*character"),
        ({"patterns": {"a\nb": "(cat)"}, "tokens": False}, LabelError, "one line"),
        ({"timeout": 0}, ConfigError, "timeout=0"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    plant = None if "timeout" in options or "n_slots" in options else only(code_1=at(4))
    with pytest.raises(error, match=f"(?s){message}"):
        label(make_store(plant=plant), **options)


def test_one_sequence_cannot_be_halved():
    with pytest.raises(DataError, match="one sequence"):
        label(make_store(n_sequences=1))


def test_a_pattern_that_never_ends():
    words = ["<bos>", *["aaaa"] * 10, "."]
    start = time.perf_counter()
    with pytest.raises(SearchTimeoutError, match="stopped after"):
        label(make_store(words=words), patterns={"slow": r"^(a|aa)+$"}, timeout=0.3)
    assert time.perf_counter() - start < 20


# The library of patterns


def test_every_pattern_compiles_and_marks_one_group():
    for name, pattern in PATTERNS.items():
        assert regex.compile(pattern).groups == 1, name
    with pytest.raises(TypeError):
        PATTERNS["mine"] = "(a)"  # the library of all is not changed in passing


TEXT = 'Once, Lily said, "I don\'t see Tom Ford." In 1999 she walked to the 12 shops; it was raining (NASA) slowly!\nThe biggest nation?'


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("comma", [",", ","]),
        ("end of a sentence", [".", "!", "?"]),
        ("opening quotation mark", ['"']),
        ("closing quotation mark", ['"']),
        ("inside a quotation", list("Idon'tseeTomFord.")),
        ("capitalised word inside a sentence", ["Lily", "Tom", "Ford"]),
        ("word in capitals", ["NASA"]),
        ("-ed", ["ed"]),
        ("-ing", ["ing"]),
        ("-ly", ["ly", "ly"]),
        ("-er or -est", ["est"]),
        ("-tion", ["tion"]),
        ("-s", ["s"]),
        ("contraction", ["'t"]),
        ("year", ["1999"]),
        ("number", ["1999", "12"]),
        ("he, she or they", ["she"]),
        ("I, me, my", ["I"]),
        ("article", ["the", "The"]),
        ("negation", ["n't"]),
        ("verb of saying", ["said"]),
        ("start of a text", ["O"]),
        ("start of a sentence", ["O", "I", "T"]),
        ("word after 'the'", ["12", "biggest"]),
        ("word after 'to'", ["the"]),
        ("first name of two", ["Tom"]),
        ("newline", ["\n"]),
        ("bracket", ["(", ")"]),
        ("colon or semicolon", [";"]),
    ],
)
def test_what_patterns_mark(name, marked):
    assert [match.group(1) for match in regex.finditer(PATTERNS[name], TEXT)] == marked


# Rows


def test_lookup():
    rows = [CodeLabel("L1.z.2:7", "b"), CodeLabel("L0.mlp_out:30", "a"), CodeLabel("L0.mlp_out:4", "c")]
    labels = CodeLabels(rows)
    assert [row.text for row in labels] == ["c", "a", "b"]  # in the order of codes
    assert labels["L1.z.2:7"] is labels[2] is labels.get(Code(1, "z", 2, 7))
    assert labels[-1].text == "b"
    assert [row.text for row in labels[:2]] == ["c", "a"]
    assert "L0.mlp_out:4" in labels
    assert "L0.mlp_out:5" not in labels
    assert rows[0] in labels
    assert labels[Code.parse("L0.mlp_out:4")] is labels["L0.mlp_out:4"]
    assert labels[np.int64(0)] is labels[0]
    assert labels.get("L0.mlp_out:5") is None
    with pytest.raises(InvalidCodeError, match=r"no label.*get"):
        labels["L0.mlp_out:5"]
    with pytest.raises(LabelError, match=r"L1.z.2:7 was given more than one"):
        CodeLabels([rows[0], dataclasses.replace(rows[0], text="other")])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("text", ["", "  ", None, 3, "x" * 2001, *CONTROL])
def test_texts_that_are_no_label(text):
    with pytest.raises(LabelError, match="one line"):
        CodeLabel("L0.mlp_out:3", text)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "field",
    [
        {"label": "nonsense"},
        {"label": 3},
        {"kind": "vibes"},
        {"precision": 1.5},
        {"recall": float("nan")},
        {"f1": True},
        {"precision": "1"},
        {"n_train": -1},
        {"n_held_out": 2.0},
        {"pattern": 3},
        {"tokens": [1]},
        {"tokens": (-1,)},
        {"tokens": (True,)},
    ],
)
def test_rows_that_cannot_be(field):
    with pytest.raises(LabelError):
        CodeLabel(**{"label": "L0.mlp_out:3", "text": "a"} | field)


# Files


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    model = make_host("native")
    attach(model, ["z", "mlp_out"], n_codes=5, k=2)
    return collect_codes(model, ["w3 w4 w5", "w6 w7 w3"] * 5, tmp_path_factory.mktemp("labels") / "store", progress=False)


def test_there_and_back(stored, tmp_path):
    found = label(stored, min_precision=0.2, min_count=1)
    assert len(found) > 5
    assert found.codes_sha256 == stored.manifest["codes_sha256"]
    write_labels(found, tmp_path / "labels.json")
    for store in (None, stored):
        again = read_labels(tmp_path / "labels.json", store)
        assert again == found
        assert str(again) == str(found)
        assert type(again[0].tokens) is tuple


@pytest.mark.parametrize("text", [*HOSTILE, "naïve ☃ 🎉 汉字", 'quote " and \\ backslash'])
def test_hostile_labels_stay_what_they_are(text, tmp_path):
    write_labels({"L0.mlp_out:3": text}, tmp_path / "labels.json")
    raw = (tmp_path / "labels.json").read_bytes()
    assert raw.isascii()
    assert not set(b"<>&") & set(raw)  # inert when it is put into a page
    assert read_labels(tmp_path / "labels.json")["L0.mlp_out:3"].text == text
    assert text in str(read_labels(tmp_path / "labels.json"))


def test_labels_by_hand(stored, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"L1.z.2:4": "once", "L0.mlp_out:3": "comma"}))
    labels = read_labels(path, stored)
    assert [(row.label, row.text, row.kind) for row in labels] == [("L0.mlp_out:3", "comma", "other"), ("L1.z.2:4", "once", "other")]
    assert str(labels).startswith("2 labels of codes\n")
    assert labels.n_unlabelled is None
    write_labels(labels, path, overwrite=True)
    assert read_labels(path).codes_sha256 == {name: stored.manifest["codes_sha256"][name] for name in labels.codes_sha256}
    assert set(labels.codes_sha256) == {SITE, HEADS}
    write_labels({"L0.mlp_out.0:3": "the only group"}, path, store=stored, overwrite=True)
    assert read_labels(path)["L0.mlp_out:3"].text == "the only group"


def test_labels_of_other_codes(stored, tmp_path):
    path = tmp_path / "labels.json"
    write_labels({"L0.mlp_out:3": "comma", "L1.z.2:4": "dot"}, path, store=stored)
    content = json.loads(path.read_text())
    content["codes_sha256"][SITE] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(BasisMismatchError, match=r"other codes than .* at blocks.0.hook_mlp_out\."):
        read_labels(path, stored)
    assert len(read_labels(path)) == 2
    with pytest.raises(BasisMismatchError):
        write_labels(read_labels(path), tmp_path / "new.json", store=stored)
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [("L0.mlp_out:5", InvalidCodeError), ("L0.z.4:0", InvalidCodeError), ("L0.z:0", LabelError), ("L0.attn_out:0", UnknownHookError)],
)
def test_labels_of_codes_that_are_not_there(code, error, stored, tmp_path):
    write_labels({code: "comma"}, tmp_path / "labels.json")
    with pytest.raises(error):
        read_labels(tmp_path / "labels.json", stored)
    with pytest.raises(error):
        write_labels({code: "comma"}, tmp_path / "other.json", store=stored)


def spoil(**changes):
    """Return labels as JSON with some of the content replaced; of ``row``, of the first label."""
    row = {"label": "L0.mlp_out:3", "text": "comma", "kind": "token", "precision": 0.9, "n_held_out": 30, "tokens": [4]}
    content = {"format": "tl_codebook.labels", "version": 1, "codes_sha256": {SITE: "a" * 64}, "n_codes": 5, "n_dead": 1, "n_rare": 0}
    content |= {"min_precision": 0.9, "min_count": 20, "labels": [row | changes.pop("row", {})]} | changes
    return json.dumps({key: value for key, value in content.items() if value != "gone"})


def test_the_file_that_is_spoilt_below_is_good(tmp_path):
    (tmp_path / "labels.json").write_text(spoil())
    assert read_labels(tmp_path / "labels.json").n_unlabelled == 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (spoil(version=2), "of version 2, this release reads 1"),
        (spoil(version="1"), "version is '1'"),
        (spoil(version=True), "version is True"),
        (spoil(format="other"), "format is 'other'"),
        (spoil(extra=1), r"unknown keys: \['extra'\]"),
        (spoil(labels="gone"), r"missing keys: \['labels'\]"),
        (spoil(labels={}), "labels is a dict"),
        (spoil(labels=[3]), "label 0 has 3"),
        (spoil(labels=[{"label": "L0.mlp_out:3"}]), "needs label, text and kind"),
        (spoil(codes_sha256=[]), "does not give a hash"),
        (spoil(codes_sha256={SITE: "short"}), "does not give a hash"),
        (spoil(n_codes=1.5), "n_codes is 1.5"),
        (spoil(n_codes=True), "n_codes is True"),
        (spoil(n_codes=1), "more than 1 codes"),
        (spoil(min_precision=2), "min_precision is 2"),
        (spoil(row={"unknown": 1}), "label 0 has .*unknown"),
        (spoil(row={"label": "L0.mlp_out"}), "cannot read 'L0.mlp_out' as a code"),
        (spoil(row={"label": "L0.nowhere:3"}), "nowhere"),
        (spoil(row={"text": ["a"]}), "one line"),
        (spoil(row={"text": "\u001b[2J"}), "one line"),
        (spoil(row={"kind": "os.system"}), "kind='os.system'"),
        (spoil(row={"precision": 1.01}), "a share from 0 to 1"),
        (spoil(row={"precision": "0.9"}), "a share from 0 to 1"),
        (spoil(row={"n_held_out": -1}), "whole number"),
        (spoil(row={"tokens": 4}), "list of token ids"),
        (spoil(row={"tokens": ["4"]}), "tuple of token ids"),
        (spoil().replace("0.9,", "NaN,", 1), "NaN is no JSON value"),
        (spoil().replace("0.9,", "1e999,", 1), "inf"),
        (spoil().replace('"n_codes"', '"version"'), "'version' stands there twice"),
        (spoil().replace('"kind"', '"text"'), "'text' stands there twice"),
        (spoil()[:-9], "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("3", "labels were expected"),
        ("{}", "labels were expected"),
        ('{"L0.mlp_out:3": 4}', "labels were expected"),
        ('{"L0.mlp_out:x": "a"}', "cannot be? read|cannot read"),
        ('["a"]', "labels were expected"),
        ("[[]]", "labels were expected"),
        ('{"L0.mlp_out:3": "a", "L0.mlp_out:3": "b"}', "stands there twice"),
        ('{"L0.mlp_out:3": "a\\u0000"}', "one line"),
        ("\ufeff{}", "cannot be read as JSON"),
    ],
)
def test_files_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        read_labels(path)


def test_files_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95pickle")
    for path in ("missing.json", "", "binary.json", "a\0b", "x" * 300):
        with pytest.raises(CheckpointError):
            read_labels(tmp_path / path)
    (tmp_path / "large.json").write_text(spoil())
    monkeypatch.setattr("tl_codebook.describe.label_files._LARGEST", 10)
    with pytest.raises(CheckpointError, match="at most 10"):
        read_labels(tmp_path / "large.json")


def test_paths_that_cannot_be_written(tmp_path):
    labels = {"L0.mlp_out:3": "comma"}
    (tmp_path / "there.json").write_text("old")
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        write_labels(labels, tmp_path / "there.json")
    for path in (tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300), tmp_path / "there.json" / "inside.json"):
        with pytest.raises(CheckpointError):
            write_labels(labels, path)
    assert (tmp_path / "there.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("old")
    link = tmp_path / "labels.json"
    link.symlink_to(outside)
    with pytest.raises(CheckpointExistsError):
        write_labels({"L0.mlp_out:3": "comma"}, link)
    write_labels({"L0.mlp_out:3": "comma"}, link, overwrite=True)
    assert outside.read_text() == "old"
    assert not link.is_symlink()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "labels.json"
    write_labels({"L0.mlp_out:3": "comma"}, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_labels({"L0.mlp_out:3": "dot"}, path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["labels.json"]
