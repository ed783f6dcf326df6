"""What is said of a code from a store alone, held against the definitions, code by code; and what is refused."""

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tests.unit.coded_texts import N_CODES, TEXTS, K, coded_model
from tl_codebook.describe import association, describe_code, direct_logit_effect, page
from tl_codebook.describe.association import code_counts_of_text, neighbours, token_counts, tokens_at
from tl_codebook.describe.places import rows_ending_at
from tl_codebook.describe.words import Words
from tl_codebook.errors import (
    BasisMismatchError,
    CheckpointError,
    ConfigError,
    InvalidCodeError,
    LabelError,
    NonFiniteError,
    UnknownHookError,
)
from tl_codebook.names import Code
from tl_codebook.store.text import Vocabulary, save_vocabulary

HOSTILE = {5: b"\x1b[31mred\x1b[0m", 6: b"two\nlines\r", 7: "\u202eturned".encode(), 8: b"\x07\\bell", 9: b"\xf0\x9f", 10: b"'quoted'"}


@pytest.fixture(scope="module")
def model():
    return coded_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return tlc.collect_codes(model, TEXTS, tmp_path_factory.mktemp("store") / "store", context_length=16, progress=False)


@pytest.fixture
def copy_of(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "copy")
    return tmp_path / "copy"


def codes_of(store, name):
    book = store.sites[name]
    return [Code(None, name, group if book.n_groups > 1 else None, code) for group in range(book.n_groups) for code in range(book.n_codes)]


def slots_of(store, code):
    return store.ids(code.hook_name)[:, code.group or 0] == code.code


def text_places(store, code):
    return np.flatnonzero(slots_of(store, code).any(1) & ~store.is_special())


def flat(store):
    return store.tokens(0, store.n_tokens)


def beside(store, places, step):
    """Positions of text next to places, in the same sequence, one by one."""
    found = []
    for place in places.tolist():
        whole = store.sequence(int(store.sequence_of(np.array([place]))[0]))
        if whole.start <= place + step < whole.stop and not store.is_special()[place + step]:
            found.append(place + step)
    return np.array(found, dtype=np.int64)


def most_used(store, name="blocks.0.hook_mlp_out"):
    return max(codes_of(store, name), key=lambda code: len(text_places(store, code)))


def dead_one(store, name="blocks.0.attn.hook_z"):
    return next(code for code in codes_of(store, name) if not slots_of(store, code).any())


def test_how_often_every_code_fires(store):
    text = ~store.is_special()
    for name in store.sites:
        counts = {code: len(text_places(store, code)) for code in codes_of(store, name)}
        for code, count in counts.items():
            found = describe_code(store, code, n=1, n_contexts=0)
            assert found.code == code
            assert (found.count, found.n_sampled) == (count, count)
            assert found.frequency == pytest.approx(count / text.sum())
            assert found.n_special == (slots_of(store, code).any(1) & ~text).sum()
            assert found.rank == 1 + sum(other > count for them, other in counts.items() if them.group == code.group)
            assert found.n_codes == N_CODES
            assert found.by_slot == tuple(slots_of(store, code)[text].sum(0).tolist())
            assert found.top == found.random == ()


@pytest.mark.parametrize("kind", ["tokens", "previous"])
def test_tokens_as_the_definition_of_pmi_has_them(store, kind):
    tokens, text = flat(store), np.flatnonzero(~store.is_special())
    code = most_used(store)
    places = text_places(store, code)
    if kind == "previous":
        everywhere = tokens[beside(store, text, -1)]  # a token counts where text comes after it
        here = tokens[beside(store, places, -1)]
    else:
        everywhere, here = tokens[text], tokens[places]
    expected = {}
    for token in set(here.tolist()):
        count, share = (here == token).sum(), (here == token).mean()
        expected[token] = (count, share, np.log2(share / (everywhere == token).mean()))
    rows = getattr(describe_code(store, code, n=1000), kind)
    assert {row.token for row in rows} == expected.keys()
    for row in rows:
        assert (row.count, row.share, row.pmi) == pytest.approx(expected[row.token])
        assert row.text.strip() == f"w{row.token}"
    worth = [row.share * row.pmi for row in rows]
    assert worth == sorted(worth, reverse=True)
    assert min(row.pmi for row in rows) < 0 < max(row.pmi for row in rows)
    assert getattr(describe_code(store, code, n=3), kind) == rows[:3]


@pytest.mark.parametrize(("kind", "step"), [("before", -1), ("after", 1)])
@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"])
def test_codes_beside_as_the_definition_of_pmi_has_them(store, kind, step, name):
    code = most_used(store, name)
    near = beside(store, text_places(store, code), step)
    text = ~store.is_special()
    expected = {}
    for other in codes_of(store, name):
        fires = slots_of(store, other).any(1)
        if other.group == code.group and fires[near].any():
            expected[str(other)] = (fires[near].sum(), fires[near].mean(), np.log2(fires[near].mean() / fires[text].mean()))
    rows = getattr(describe_code(store, code, n=1000), kind)
    assert {row.label for row in rows} == expected.keys()
    for row in rows:
        assert (row.count, row.share, row.pmi) == pytest.approx(expected[row.label])
    worth = [row.share * row.pmi for row in rows]
    assert worth == sorted(worth, reverse=True)


def test_contexts(store):
    code = most_used(store)
    first = {place: int(slots_of(store, code)[place].argmax()) for place in text_places(store, code).tolist()}
    found = describe_code(store, code, n_contexts=25, before=3, after=2)
    assert [context.position for context in found.top] == sorted(first, key=lambda place: (first[place], place))[:25]
    assert len({context.slot for context in found.random}) > 1
    assert len({context.position for context in found.random}) == 25
    assert found.random != found.top
    for context in (*found.top, *found.random):
        whole = store.sequence(context.sequence)
        assert context.slot == first[context.position]
        assert context.start == max(whole.start, context.position - 3)
        tokens = flat(store)[context.start : min(whole.stop, context.position + 3)]
        assert list(context.tokens) == tokens.tolist()
        assert context.tokens[context.index] == flat(store)[context.position]
        words = Words.of_store(store)
        assert (context.before, context.text, context.after) == (
            words.text(tokens[: context.index]),
            words.text(tokens[context.index : context.index + 1]),
            words.text(tokens[context.index + 1 :]),
        )
        assert context.similarity is None
        assert str(context) == f"{context.before}[{context.text}]{context.after}"
    assert describe_code(store, code, n_contexts=25, before=3, after=2) == found
    assert describe_code(store, code, n_contexts=25, before=3, after=2, seed=1).random != found.random


def test_of_many_firings_some_are_drawn(store, monkeypatch):
    code = most_used(store)
    whole = describe_code(store, code)
    monkeypatch.setattr(page, "_MOST_FIRINGS", 20)
    found = describe_code(store, code)
    assert whole.count > 40
    assert (found.count, found.rank, found.frequency, found.n_sampled) == (whole.count, whole.rank, whole.frequency, 20)
    assert sum(row.count for row in describe_code(store, code, n=100).tokens) == 20
    assert "of 20 firings drawn at random" in str(found)
    assert "drawn at random" not in str(whole)
    assert describe_code(store, code) == found
    assert describe_code(store, code, seed=5).tokens != found.tokens
    places = text_places(store, code)
    assert {context.position for context in found.random} <= set(places.tolist())


def test_tokens_are_counted_once_and_looked_up_in_blocks(store, monkeypatch):
    special = store.is_special()
    monkeypatch.setattr(association, "_BLOCK", 7)
    monkeypatch.setattr(association, "_AT_ONCE", 50)
    monkeypatch.setattr(association, "_counted", type(association._counted)())
    counts = token_counts(store)
    assert counts.everywhere.tolist() == np.bincount(flat(store)[~special]).tolist()
    followed = flat(store)[beside(store, np.flatnonzero(~special), -1)]
    assert counts.followed.tolist() == np.bincount(followed, minlength=len(counts.everywhere)).tolist()
    assert token_counts(store) is counts
    for positions in ([], [0], [6, 7, 8, 90], np.flatnonzero(special)):
        positions = np.asarray(positions, np.int64)
        assert tokens_at(store, positions).tolist() == flat(store)[positions].tolist()
    for name in store.sites:
        for code in codes_of(store, name)[::N_CODES]:
            expected = store.counts(name, special=False)[code.group or 0]
            assert code_counts_of_text(store, code, store.ids(code.hook_name)).tolist() == expected.tolist()


def test_nothing_goes_over_the_ends_of_sequences(model, tmp_path):
    """Rows of token ids that have no BOS: the token before the first one is of another text."""
    rows = [[5, 6, 7], [8], [9, 5, 6, 10, 11], [12, 5]]
    store = tlc.collect_codes(model, rows, tmp_path / "store", progress=False)
    assert not store.is_special().any()
    every = np.arange(store.n_tokens)
    assert neighbours(store, every, -1).tolist() == [0, 1, 4, 5, 6, 7, 9]
    assert neighbours(store, every, 1).tolist() == [1, 2, 5, 6, 7, 8, 10]
    assert token_counts(store).followed.tolist() == np.bincount([5, 6, 9, 5, 6, 10, 12], minlength=13).tolist()
    assert [row.tolist() for row in rows_ending_at(store, np.array([2, 3, 8]), 3)] == [[5, 6, 7], [8], [6, 10, 11]]
    for code in codes_of(store, "blocks.0.hook_mlp_out"):
        found = describe_code(store, code, n=50)
        assert sum(row.count for row in found.previous) == found.n_previous == len(beside(store, text_places(store, code), -1))
        assert all(0 < context.index + 1 <= len(context.tokens) <= 5 for context in found.top)


def test_a_dead_code(store, model):
    code = dead_one(store)
    for found in (describe_code(store, code), describe_code(store, code, model)):
        assert (found.count, found.frequency, found.n_special, found.n_sampled, found.by_slot) == (0, 0.0, 0, 0, (0,) * K)
        assert found.top == found.random == found.tokens == found.previous == found.before == found.after == ()
        assert found.rank == 1 + (store.counts(code.hook_name, special=False)[code.group] > 0).sum()
        assert "fires at 0 positions of text (0.000%)" in str(found)
        json.dumps(found.as_dict(), allow_nan=False)
    assert len(found.raises) == len(found.similar) == 10
    measured = describe_code(store, code, model, measure=True)
    assert measured.scale is None
    assert measured.top == ()
    assert measured.effect.n_places == 64  # forcing a dead code is the way to see what it would do
    assert "fires at none of the places" in measured.notes[0]
    json.dumps(measured.as_dict(), allow_nan=False)


def test_a_code_of_special_tokens_alone(tmp_path):
    """It is dead in the text, and the page says that it is not dead."""
    model = make_host("native")
    books = tlc.attach(model, "mlp_out", layers=0, n_codes=4)
    _, cache = model.run_with_cache(torch.tensor([[1, 5, 6, 7]]))
    with torch.no_grad():
        books["blocks.0.hook_mlp_out"].codes[0] = cache["blocks.0.hook_mlp_out.hook_x"][0]
    store = tlc.collect_codes(model, ["w5 w6 w7"], tmp_path / "store", progress=False)
    assert store.ids("L0.mlp_out")[:, 0, 0].tolist() == [0, 1, 2, 3]
    found = describe_code(store, "L0.mlp_out:0")
    assert (found.count, found.n_special, found.rank) == (0, 1, 4)
    assert "and at 1 special tokens" in str(found)
    similar = {row.label: row for row in describe_code(store, "L0.mlp_out:1", model).similar}
    assert (similar["L0.mlp_out:0"].count, similar["L0.mlp_out:0"].dead) == (0, False)


def test_one_way_of_writing_a_code(store):
    assert describe_code(store, "L1.mlp_out.0:5") == describe_code(store, Code(1, "mlp_out", None, 5))
    assert describe_code(store, "blocks.0.attn.hook_z.2:5").code == Code(0, "z", 2, 5)


def test_without_text_token_ids_are_shown(copy_of, store):
    for name in ("vocabulary.bytes.npy", "vocabulary.offsets.npy"):
        (copy_of / name).unlink()
    manifest = json.loads((copy_of / "manifest.json").read_text())
    manifest.pop("vocabulary_bytes", None)  # as a store that was collected without a tokenizer
    (copy_of / "manifest.json").write_text(json.dumps(manifest))
    code = most_used(store)
    found, with_text = describe_code(tlc.CodeStore(copy_of), code), describe_code(store, code)
    assert [(row.token, row.text) for row in found.tokens] == [(row.token, None) for row in with_text.tokens]
    assert {context.before for context in found.top} == {None}
    place = found.top[0]
    assert f"[{place.tokens[place.index]}]" in str(found)
    assert f"token {found.tokens[0].token} " in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_damaged_vocabulary_is_no_missing_one(copy_of):
    (copy_of / "vocabulary.bytes.npy").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"vocabulary in .* cannot be read .* Collect the store again"):
        describe_code(tlc.CodeStore(copy_of), "L0.mlp_out:1")


def test_hostile_tokens_are_inert_in_a_terminal(copy_of, store, model):
    save_vocabulary(copy_of, Vocabulary.of_pieces([HOSTILE.get(token, b" w%d" % token) for token in range(61)]))
    hostile = tlc.CodeStore(copy_of)
    pages = [str(describe_code(hostile, code, model, n=61, n_contexts=50)) for code in codes_of(store, "blocks.0.hook_mlp_out")]
    for text in pages:
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert not any(line.startswith(("lines", "two")) for line in text.splitlines())
    together = "\n".join(pages)
    for shown in (r"'\x1b[31mred\x1b[0m'", r"'two\nlines\r'", r"'\u202eturned'", r"'\x07\\bell'", "token 9 "):
        assert shown in together
    assert r"[\x1b[31mred\x1b[0m]" in together  # in a context


def test_ids_that_the_vocabulary_does_not_have_have_no_text(copy_of, store):
    save_vocabulary(copy_of, Vocabulary.of_pieces([b" w%d" % token for token in range(10)]))
    rows = describe_code(tlc.CodeStore(copy_of), most_used(store), n=100).tokens
    assert {row.token < 10: row.text is not None for row in rows} == {True: True, False: False}


def test_as_dict_is_json(store, model):
    for found in (describe_code(store, most_used(store)), describe_code(store, most_used(store), model, measure=True)):
        plain = found.as_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain.keys() == {field.name for field in fields(found)}
        assert plain["code"] == str(found.code)
        assert plain["tokens"][0] == {key: getattr(found.tokens[0], key) for key in ("token", "text", "count", "share", "pmi")}
    assert plain["effect"]["raises"][0]["logit"] > 0


def test_the_page_says_it_all(store, model):
    found = describe_code(store, most_used(store), model, measure=True)
    text = str(found)
    assert text.startswith(f"{found.code}: fires at {found.count:,} positions of text")
    for name in ("by slot:", "tokens (share", "previous tokens", "codes before", "codes after", "similar codes:", "top:", "random:"):
        assert f"\n  {name}" in text
    assert f"raises directly, at a final norm's scale of {found.scale:.3g}:" in text
    assert f"forced at {found.effect.n_places} places (slot -1), next token: KL {found.effect.kl:.3g} nats" in text
    assert "in units of the final norm's scale" in str(describe_code(store, most_used(store), model))


def test_similar_codes(store, model):
    for code in (most_used(store), most_used(store, "blocks.1.attn.hook_z"), dead_one(store)):
        vectors = tlc.sites(model)[code.hook_name].codebook.codes[code.group or 0].detach().double()
        cosines = (vectors @ vectors[code.code]) / (vectors.norm(dim=1) * vectors[code.code].norm())
        expected = {i: float(cosines[i]) for i in range(N_CODES) if i != code.code}
        rows = describe_code(store, code, model, n=100).similar
        assert [Code.parse(row.label).code for row in rows] == sorted(expected, key=lambda i: -expected[i])
        for row in rows:
            other = Code.parse(row.label)
            assert (other.hook_name, other.group) == (code.hook_name, code.group)
            assert row.cosine == pytest.approx(expected[other.code], abs=1e-6)
            assert row.count == len(text_places(store, other))
            assert row.dead == (not slots_of(store, other).any())
        assert describe_code(store, code, model, n=2).similar == rows[:2]
    assert any(row.dead for row in rows)
    assert "(dead)" in str(describe_code(store, code, model, n=100))


def test_the_direct_effect_on_the_page(store, model):
    code = most_used(store)
    effect = direct_logit_effect(model, code)
    found = describe_code(store, code, model, n=4)
    assert found.scale is None
    assert [row.token for row in found.raises] == effect.argsort(descending=True)[:4].tolist()
    assert [row.logit for row in found.lowers] == effect.sort().values[:4].tolist()
    assert found.raises[0].text == Words.of_store(store).text([found.raises[0].token])
    scaled = describe_code(store, code, model, n=4, measure=True)
    assert scaled.scale > 0
    assert [row.logit * scaled.scale for row in scaled.raises] == pytest.approx([row.logit for row in found.raises])


def test_a_code_that_fires_everywhere_cannot_be_forced(tmp_path):
    model = make_host("native")
    tlc.attach(model, "mlp_out", layers=1, n_codes=1)
    store = tlc.collect_codes(model, ["w5 w6 w7"], tmp_path / "store", progress=False)
    found = describe_code(store, "L1.mlp_out:0", model, measure=True)
    assert found.effect is None
    assert "fires at every place of text already" in found.notes[0]
    assert found.similar == ()
    assert found.frequency == 1
    assert "note: no measured effect" in str(found)


def test_rows_that_a_model_is_run_with(store):
    places = np.flatnonzero(~store.is_special())
    for most in (2, 5, 9, 16):
        for place, row in zip(places.tolist(), rows_ending_at(store, places, most), strict=True):
            whole = store.sequence(int(store.sequence_of(np.array([place]))[0]))
            prefix = flat(store)[whole.start : place + 1]
            length = min(len(prefix), most)
            length -= length % 8 if length > 8 else 0
            assert row.tolist() == [1, *prefix[len(prefix) - length + 1 :].tolist()]
    assert {len(row) for row in rows_ending_at(store, places, 16)} == {2, 3, 4, 5, 6, 7, 8, 16}


@pytest.mark.parametrize(
    ("code", "error", "advice"),
    [
        ("L0.mlp_out:12", InvalidCodeError, "codes from 0 to 11"),
        ("L0.z.4:1", InvalidCodeError, "Groups go from 0 to 3"),
        ("L0.z:1", LabelError, r"Write L0\.z\.0:1"),
        ("L0.mlp:1", LabelError, "mlp_out"),
        ("L5.mlp_out:1", UnknownHookError, "It has codes of: L0.z"),
        ("nonsense", LabelError, "Write '<address>:<code>'"),
    ],
)
def test_codes_that_there_are_not(store, model, code, error, advice):
    for given in (None, model):
        with pytest.raises(error, match=advice):
            describe_code(store, code, given)
    with pytest.raises(error):
        direct_logit_effect(model, code)


@pytest.mark.parametrize("option", [{"n": 0}, {"n_contexts": -1}, {"before": -1}, {"after": 1.5}, {"seed": -1}, {"n": True}])
def test_options_that_cannot_be(store, option, unchecked):
    with pytest.raises(ConfigError, match=rf"{next(iter(option))}=.* was asked for\. Give a whole number"):
        describe_code(store, "L0.mlp_out:1", **option)


def test_measuring_needs_a_model(store):
    with pytest.raises(ConfigError, match="measure=True was asked for without a model"):
        describe_code(store, "L0.mlp_out:1", measure=True)


def test_a_model_with_other_codes_is_refused(store):
    other = make_host("native")
    with pytest.raises(UnknownHookError, match="no codebook sits at"):
        describe_code(store, "L0.mlp_out:1", other)
    books = tlc.attach(other, ["z", "mlp_out"], n_codes=N_CODES, k=K)
    with torch.no_grad():
        books["blocks.1.attn.hook_z"].codes[0, 0, 0] += 1  # of another site than the one asked for
    with pytest.raises(BasisMismatchError, match="are not those that"):
        describe_code(store, "L0.mlp_out:1", other)


def test_codes_of_nan_are_refused(tmp_path):
    model = make_host("native")
    books = tlc.attach(model, "mlp_out", layers=1, n_codes=4)
    with torch.no_grad():
        books["blocks.1.hook_mlp_out"].codes[0, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"codes of L1\.mlp_out hold NaN or Inf"):
        direct_logit_effect(model, "L1.mlp_out:1")


def test_an_index_that_contradicts_the_ids(copy_of, store):
    code = most_used(store)
    path = copy_of / store.book(code).ids_file
    ids = np.load(path)
    ids[text_places(store, code)[0]] = N_CODES
    np.save(path, ids)
    with pytest.raises(CheckpointError, match=rf"the index of .* has {code} where its ids have not"):
        describe_code(tlc.CodeStore(copy_of), code)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), True])
def test_scales_that_cannot_be(model, scale, unchecked):
    with pytest.raises(ConfigError, match=r"scale=.* was asked for"):
        direct_logit_effect(model, "L0.mlp_out:1", scale=scale)
