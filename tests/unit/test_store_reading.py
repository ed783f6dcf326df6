"""What a store answers, held against the ids themselves; what it refuses; and files that are not what they should be."""

import itertools
import json
import os
import shutil
import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_codebook as tlc
from tests.tiny import make_host
from tests.unit.coded_texts import N_CODES, TEXTS, K, coded_model
from tl_codebook.errors import (
    BasisMismatchError,
    CheckpointError,
    ConfigError,
    InvalidCodeError,
    LabelError,
    PositionError,
    UnknownHookError,
)
from tl_codebook.names import Address, Code
from tl_codebook.store.index import build_index
from tl_codebook.store.manifest import differences, open_array, stored_book


@pytest.fixture(scope="module")
def model():
    return coded_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_codebook.store.collect._WINDOW_TOKENS", 1)  # several parts of tokens
        path = tmp_path_factory.mktemp("store") / "store"
        return tlc.collect_codes(model, TEXTS, path, context_length=16, batch_size=2, progress=False)


def fires(store, name, group, code):
    return (store.ids(name)[:, group] == code).any(-1)


def test_positions_and_counts_are_those_of_the_ids(store):
    for name, book in store.sites.items():
        counts = store.counts(name)
        text = store.counts(name, special=False)
        assert counts.shape == (book.n_groups, N_CODES)
        for group in range(book.n_groups):
            for code in range(N_CODES):
                at = fires(store, name, group, code)
                label = f"{book.label}.{group}:{code}" if book.n_groups > 1 else f"{book.label}:{code}"
                assert store.positions(label).tolist() == np.flatnonzero(at).tolist()
                assert store.positions(label).dtype == np.int64
                assert counts[group, code] == at.sum()
                assert text[group, code] == (at & ~store.is_special()).sum()
                assert store.frequency(label) == pytest.approx(at.mean())
                assert store.frequency(label, special=False) == pytest.approx(at[~store.is_special()].mean())
        assert np.array_equal(store.dead(name), counts == 0)
    assert store.dead("L1.z").any()
    assert not store.dead("L1.z").all()


def test_perplexity_is_the_number_of_codes_in_equal_use(store):
    for group, counts in enumerate(store.counts("L0.z")):
        share = counts[counts > 0] / counts.sum()
        assert store.perplexity("L0.z")[group] == pytest.approx(np.prod(share**-share))
        assert 1 <= store.perplexity("L0.z")[group] <= N_CODES


def test_a_code_may_be_written_in_every_way(store):
    wanted = store.positions("L0.z.2:5").tolist()
    assert store.positions(Code(0, "z", 2, 5)).tolist() == wanted
    assert store.positions("blocks.0.attn.hook_z.2:5").tolist() == wanted
    assert store.positions("L1.mlp_out.0:5").tolist() == store.positions("L1.mlp_out:5").tolist()
    assert store.book(Address(0, "z")).hook_name == "blocks.0.attn.hook_z"
    assert np.array_equal(store.ids(Address(0, "z")), store.ids("blocks.0.attn.hook_z"))


def test_tokens_and_sequences(store):
    rows = datasets.load_from_disk(str(store.path / "tokens"))["input_ids"][:]
    flat = [token for row in rows for token in row]
    assert store.n_sequences == len(rows)
    assert store.n_tokens == len(flat)
    assert len(store._columns[1]) > 3  # what follows goes over the ends of several parts
    for start, stop in ((0, store.n_tokens), (7, 8), (30, 95), (5, 5), (store.n_tokens, store.n_tokens)):
        assert store.tokens(start, stop).tolist() == flat[start:stop]
    for number in (0, 3, store.n_sequences - 1):
        whole = store.sequence(number)
        assert store.tokens(whole.start, whole.stop).tolist() == rows[number]
        assert store.sequence_of([whole.start, whole.stop - 1]).tolist() == [number, number]
    assert store.is_special().tolist() == [token == 1 for token in flat]
    assert store.nbytes == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert repr(store).startswith(f"CodeStore({str(store.path)!r}: ")
    assert f"{store.n_tokens:,} tokens" in repr(store)


def test_contexts(store):
    number = int(store.counts("L0.mlp_out")[0].argmax())
    code = f"L0.mlp_out:{number}"
    places = store.positions(code)
    assert len(places) > 20
    for context in store.contexts(code, 10**6, before=3, after=2):
        whole = store.sequence(context.sequence)
        assert whole.start <= context.start <= context.position < whole.stop
        assert context.start == max(whole.start, context.position - 3)
        assert context.tokens.tolist() == store.tokens(context.start, min(whole.stop, context.position + 3)).tolist()
        assert context.tokens[context.index] == store.tokens(context.position, context.position + 1)[0]
        assert fires(store, "L0.mlp_out", 0, number)[context.position]
    assert [c.position for c in store.contexts(code, 10**6)] == places.tolist()
    assert [c.position for c in store.contexts(code, 4)] == places[:4].tolist()
    random = [c.position for c in store.contexts(code, 8, order="random", seed=1)]
    assert random == sorted(set(random))
    assert len(random) == 8
    assert set(random) <= set(places.tolist())
    assert random != places[:8].tolist()
    assert random == [c.position for c in store.contexts(code, 8, order="random", seed=1)]
    assert random != [c.position for c in store.contexts(code, 8, order="random", seed=2)]
    assert store.contexts(code, 0) == []


QUESTIONS = {
    "site": (lambda s: s.ids("L7.z"), UnknownHookError, r"no codebook of 'L7.z' is in the store. .*It has: L0.z, L0.mlp_out"),
    "code of another site": (lambda s: s.positions("L0.q.1:2"), UnknownHookError, "no codebook of 'blocks.0.attn.hook_q'"),
    "no group": (lambda s: s.positions("L0.z:2"), LabelError, "names no group, and L0.z has 4. Write L0.z.0:2"),
    "group": (lambda s: s.positions("L0.z.4:2"), InvalidCodeError, "Groups go from 0 to 3"),
    "group of one": (lambda s: s.positions("L0.mlp_out.1:2"), InvalidCodeError, "L0.mlp_out has 1 group of 12 codes"),
    "code": (lambda s: s.frequency("L0.z.1:12"), InvalidCodeError, "codes from 0 to 11"),
    "label": (lambda s: s.positions("L0.z.1"), LabelError, "cannot read 'L0.z.1' as a code"),
    "token before": (lambda s: s.tokens(-1, 3), PositionError, "positions -1 to 3"),
    "token after": (lambda s: s.tokens(3, 10**9), PositionError, "the store has 0 to"),
    "backwards": (lambda s: s.tokens(5, 3), PositionError, "positions 5 to 3"),
    "sequence": (lambda s: s.sequence(-1), PositionError, "sequence -1 was asked for"),
    "sequence of": (lambda s: s.sequence_of([0, 10**9]), PositionError, "0 to 1000000000 were given"),
    "negative n": (lambda s: s.contexts("L0.z.0:1", -1), ConfigError, "n=-1"),
    "order": (lambda s: s.contexts("L0.z.0:1", order="best"), ConfigError, "order='best'"),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.usefixtures("unchecked")
def test_questions_without_an_answer(store, question):
    ask, kind, message = QUESTIONS[question]
    with pytest.raises(kind, match=message):
        ask(store)


def test_it_opens_and_answers_at_once(store):
    def fastest(action):
        times = []
        for _ in range(5):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        return min(times)

    assert fastest(lambda: tlc.CodeStore(store.path)) < 0.05
    assert fastest(lambda: (store.frequency("L0.z.1:3"), store.contexts("L0.z.1:3", 20, order="random"))) < 0.05


def test_the_model_it_was_collected_with(store, model):
    store.check_model(model)
    other = make_host("native")
    with pytest.raises(UnknownHookError, match="no codebook sits at"):
        store.check_model(other)
    tlc.attach(other, ["z", "mlp_out"], n_codes=N_CODES, k=K)
    theirs = {name: point.codebook for name, point in tlc.sites(other).items()}
    for name, point in tlc.sites(model).items():
        theirs[name].load_state_dict(point.codebook.state_dict())
    store.check_model(other)
    with torch.no_grad():
        theirs["blocks.1.hook_mlp_out"].codes[0, 2, 1] += 1e-6
    with pytest.raises(BasisMismatchError, match=r"the codes of blocks.1.hook_mlp_out are not those"):
        store.check_model(other)


# --- the index ---


@given(
    data=st.data(), n_groups=st.integers(1, 3), k=st.integers(1, 4), n_codes=st.integers(1, 9), entries=st.sampled_from([1, 5, 16, 10**6])
)
def test_the_index_of_any_ids(data, n_groups, k, n_codes, entries, tmp_path_factory):
    """In one part or in many; slots that repeat a code count once, n_codes is no code."""
    n_tokens = data.draw(st.integers(1, 25))
    values = data.draw(st.lists(st.integers(0, n_codes), min_size=n_tokens * n_groups * k, max_size=n_tokens * n_groups * k))
    book = stored_book("blocks.0.attn.hook_z", n_codes, n_groups, k)
    ids = np.array(values, dtype=book.dtype).reshape(n_tokens, n_groups, k)
    folder = tmp_path_factory.mktemp("index")
    (folder / "ids").mkdir()
    np.save(folder / book.ids_file, ids)
    build_index(folder, book, n_tokens, entries=entries)
    offsets = np.load(folder / book.offsets_file)
    positions = np.load(folder / book.positions_file)
    assert positions.dtype == np.uint32
    assert len(offsets) == n_groups * n_codes + 1
    found = [positions[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == [np.flatnonzero((ids[:, g] == c).any(-1)).tolist() for g in range(n_groups) for c in range(n_codes)]
    assert sorted(path.name for path in (folder / "index").iterdir()) == ["L0.z.offsets.npy", "L0.z.positions.npy"]


def test_positions_after_a_boundary_of_parts_with_many_codes(tmp_path):
    rng = np.random.default_rng(0)
    book = stored_book("blocks.0.hook_mlp_out", 70_000, 1, 2)
    assert book.dtype == np.uint32
    ids = rng.integers(0, 70_001, (500, 1, 2)).astype(np.uint32)
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / book.ids_file, ids)
    build_index(tmp_path, book, 500, entries=64)
    offsets, positions = np.load(tmp_path / book.offsets_file), np.load(tmp_path / book.positions_file)
    for code in np.unique(ids[ids < 70_000])[::17]:
        assert positions[offsets[code] : offsets[code + 1]].tolist() == np.flatnonzero((ids == code).any((1, 2))).tolist()


# --- files that are not what they should be (faults.md, 1 to 5, 9, 11 and 12) ---


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store.path, tmp_path / "copy")


def change(path, **changes):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (manifest | changes).items() if value is not ...}))


SITE = {"n_codes": 12, "n_groups": 1, "k": 3, "dtype": "uint8"}
MANIFESTS = {
    "newer": ({"version": 2}, "is of version 2, this release reads 1. Use the release that wrote it"),
    "version": ({"version": "1"}, "its version is '1'"),
    "another format": ({"format": "tl_codebook"}, "not 'tl_codebook.store'"),
    "not complete": ({"complete": False}, "is not complete"),
    "a field is missing": ({"tokenizer": ...}, r"missing: \['tokenizer'\]"),
    "no tokens": ({"n_tokens": 0}, "n_tokens is 0"),
    "a fraction": ({"n_tokens": 3.5}, "n_tokens is 3.5"),
    "more tokens": ({"n_tokens": 10**15}, "is incomplete: it has .* bytes, its array alone takes"),
    "other sequences": ({"n_sequences": 2}, "starts.npy holds int64"),
    "no sites": ({"sites": {}}, "its sites are {}"),
    "a path for a site": ({"sites": {"../../etc/passwd": SITE}}, "neither a site with a layer nor a hook name"),
    "an absolute path": ({"sites": {"/etc/hook_passwd": SITE}}, "neither a site"),
    "a name with NUL": ({"sites": {"hook_a\0b": SITE}}, "neither a site"),
    "a long name": ({"sites": {"hook_" + "a" * 300: SITE}}, "which no file may name"),
    "a name with a newline": ({"sites": {"hook_a\n": SITE}}, "neither a site"),
    "sizes": ({"sites": {"blocks.0.hook_mlp_out": SITE | {"k": True}}}, "is described as"),
    "a list for a site": ({"sites": {"blocks.0.hook_mlp_out": []}}, "is described as"),
    "another dtype": ({"sites": {"blocks.0.hook_mlp_out": SITE | {"dtype": "object"}}}, "the ids of 'blocks.0.hook_mlp_out' are 'object'"),
    "a site that is not there": ({"sites": {"blocks.0.attn.hook_q": SITE}}, "L0.q.npy is missing"),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_manifest_that_is_wrong(copy, fault):
    changes, message = MANIFESTS[fault]
    change(copy / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        tlc.CodeStore(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ('{"version": 1, "version": 1}', "stands there twice"),
        ('{"version": NaN}', "NaN is no JSON value"),
        ("[" * 99999, "cannot be read as JSON"),
    ],
)
def test_a_manifest_that_cannot_be_read(copy, text, message):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        tlc.CodeStore(copy)


def test_no_store(tmp_path):
    for path, message in ((tmp_path, "holds no manifest.json"), (tmp_path / "none", "is no folder"), ("a\0b", "is no name")):
        with pytest.raises(CheckpointError, match=message):
            tlc.CodeStore(path)


FILES = ["starts.npy", "flags.npy", "ids/L0.z.npy", "index/L0.z.offsets.npy", "index/L0.z.positions.npy"]


def read_all(path):
    store = tlc.CodeStore(path)
    return store.tokens(0, 3), store.is_special(), store.ids("L0.z"), store.positions("L0.z.0:1"), store.dataset


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "pickle", "objects", "archive", "floats", "another shape", "a lying header"])
def test_a_file_that_is_wrong(copy, fault, name, tmp_path):
    path, canary = copy / name, tmp_path / "canary"
    whole = path.read_bytes()
    path.unlink()
    if fault == "empty":
        path.touch()
    elif fault == "cut":
        path.write_bytes(whole[:-1])
    elif fault == "pickle":
        path.write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode().ljust(len(whole) + 1))
    elif fault == "objects":
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode().ljust(len(whole)))
    elif fault == "archive":
        np.savez(tmp_path / "a.npz", a=np.zeros(len(whole), dtype=np.uint8))
        shutil.move(tmp_path / "a.npz", path)
    elif fault == "floats":
        np.save(path, np.zeros(len(whole)))
    elif fault == "another shape":
        np.save(path, np.zeros((len(whole), 2, 2, 2), dtype=np.uint8))
    elif fault == "a lying header":
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**17,)})
            file.write(whole)
    with pytest.raises(CheckpointError, match=path.name):
        read_all(copy)
    assert not canary.exists()


@pytest.mark.parametrize("top", ["ids", "index", "tokens", "flags.npy", "starts.npy"])
def test_a_link_out_of_the_store(copy, top, tmp_path):
    shutil.move(copy / top, tmp_path / "outside")
    (copy / top).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        tlc.CodeStore(copy)


def test_a_link_among_the_files_of_a_store(copy, tmp_path):
    shutil.move(copy / "ids/L0.z.npy", tmp_path / "outside.npy")
    (copy / "ids/L0.z.npy").symlink_to(tmp_path / "outside.npy")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        tlc.CodeStore(copy)


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/passwd", "a\0b", "none.arrow", 3])
def test_tokens_that_lie_elsewhere(copy, name):
    change(copy / "tokens/state.json", _data_files=[{"filename": name}])
    with pytest.raises(CheckpointError):
        tlc.CodeStore(copy).tokens(0, 1)
    with pytest.raises(CheckpointError):
        _ = tlc.CodeStore(copy).dataset


def test_tokens_that_are_damaged_or_others(copy, tmp_path):
    path = copy / "tokens/data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"tokens cannot be read|tokens holds"):
        tlc.CodeStore(copy).tokens(0, 1)
    datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(tmp_path / "other")
    shutil.rmtree(copy / "tokens")
    shutil.move(tmp_path / "other", copy / "tokens")
    with pytest.raises(CheckpointError, match="holds 2 tokens, the manifest says"):
        tlc.CodeStore(copy).tokens(0, 1)


def test_offsets_that_do_not_ascend(copy):
    path = copy / "index/L0.z.offsets.npy"
    offsets = np.load(path)
    offsets[3] = offsets[-1] + 1
    np.save(path, offsets)
    with pytest.raises(CheckpointError, match="does not ascend"):
        tlc.CodeStore(copy).counts("L0.z")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(copy):
    (copy / "flags.npy").chmod(0)
    with pytest.raises(CheckpointError, match=r"flags\.npy"):
        tlc.CodeStore(copy).is_special()


def test_arrays_are_read_only(store):
    with pytest.raises(ValueError, match="read-only"):
        store.ids("L0.z")[0, 0, 0] = 1
    assert not open_array(store.path / "flags.npy", np.uint8, (None,)).flags.writeable


def test_differences_are_named_where_they_are():
    then = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": 1}
    assert differences(then, {"a": 1, "b": {"c": [1, 3], "d": 3, "f": 0}, "e": 2}, ["a", "b"]) == [
        "b.c: [1, 2] then, [1, 3] now",
        "b.f: None then, 0 now",
    ]
