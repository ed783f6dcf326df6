"""Bad inputs on the reading side (faults.md, by number): what no other test of store, search, describe, graphs and views tries."""

import csv
import io
import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

import tl_codebook as tlc
from tests.browser.chromium import PAYLOADS, Elements
from tests.tiny import HOSTS, make_hf, make_host
from tests.unit.test_search_text import byte_level
from tl_codebook import files
from tl_codebook.cli import main
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.describe import CodeLabels, describe_code
from tl_codebook.errors import CheckpointError, CheckpointExistsError, ConfigError, DataError, LabelError, UnknownHookError
from tl_codebook.graphs.plots import plot_effects
from tl_codebook.store import match_text
from tl_codebook.store.collect import _Job
from tl_codebook.store.manifest import open_array
from tl_codebook.store.tables import write_csv
from tl_codebook.store.text import Vocabulary, load_vocabulary, save_vocabulary
from tl_codebook.store.writing import LOCK
from tl_codebook.views import show_examples

ARROW = "tokens/data-00000-of-00001.arrow"
VOCABULARY = ("vocabulary.bytes.npy", "vocabulary.offsets.npy")
TEXTS = [" ".join(f"w{3 + (5 * i + j * j) % 57}" for j in range(4 + 11 * (i % 5))) for i in range(20)]


@pytest.fixture(scope="module")
def model():
    model = make_host("native")
    torch.manual_seed(0)
    tlc.attach(model, "mlp_out", n_codes=12, k=3)
    return model


def gather(model, dataset, path, **options):
    return tlc.collect_codes(model, dataset, path, **{"progress": False, "context_length": 16} | options)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return gather(model, TEXTS, tmp_path_factory.mktemp("faults") / "store")


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store.path, tmp_path / "copy")


def rows_of(store):
    return [store.tokens(store.sequence(i).start, store.sequence(i).stop).tolist() for i in range(store.n_sequences)]


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_all(folder):
    """Read every file of a store, in every way in which one is."""
    store = tlc.CodeStore(folder)
    code = f"L0.mlp_out:{int(store.counts('L0.mlp_out', special=False)[0].argmax())}"
    found = [store.tokens(0, 5), store.dataset[0], store.vocabulary, store.ids("L0.mlp_out")[0], store.contexts(code), store.sequence(1)]
    found += [store.positions(f"L0.mlp_out:{number}") for number in range(12)]
    return [*found, tlc.search_codes(store, "w5"), describe_code(store, code), show_examples(store, code)]


def test_what_is_spoilt_below_is_good(copy):
    read_all(copy)


def change(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit(path, places, values):
    array = np.load(path)
    array[places] = values
    np.save(path, array)


# --- files (1 to 4, 11, 12) ---


@pytest.mark.parametrize("name", ["manifest.json", "tokens/state.json", "tokens/dataset_info.json", ARROW, *VOCABULARY])
def test_1_and_2_a_pickle_in_place_of_a_file_is_not_opened(copy, name, tmp_path):
    (copy / name).write_bytes(f"cposix\nsystem\n(S'touch {tmp_path / 'canary'}'\ntR.".encode())
    with pytest.raises(CheckpointError):
        read_all(copy)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".npy", ".arrow"])
def test_1_a_dataset_that_would_need_a_pickle(model, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(f"cposix\nsystem\n(S'touch {tmp_path / 'canary'}'\ntR.".encode())
    with pytest.raises(DataError, match="of a kind that is not read"):
        gather(model, tmp_path / f"a{suffix}", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


HEADERS = {
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
    "brackets": b"(" * 9000,
    "a nested type": b"{'descr': [" * 50,
    "a long sum": b"1+" * 4000 + b"1",
    "no length": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}",
    "more than there is": b"{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_3_headers_that_are_none(header, tmp_path):
    raw = HEADERS[header] + b"\n"
    save_vocabulary(tmp_path, Vocabulary.of_pieces([b"a"]))
    for name in VOCABULARY:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + bytes(5000))
        with pytest.raises(CheckpointError, match=r"vocabulary in .* cannot be read"):
            load_vocabulary(tmp_path)
        with pytest.raises(CheckpointError, match=r"damaged|holds"):
            open_array(tmp_path / name, np.uint8, (None,))
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize("name", VOCABULARY)
def test_3_an_archive_in_place_of_a_vocabulary(copy, name, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    shutil.move(tmp_path / "a.npz", copy / name)
    with pytest.raises(CheckpointError, match="is an archive"):
        read_all(copy)


INCOMPLETE = {
    "no features": (lambda c: (c / "tokens/dataset_info.json").unlink(), "dataset_info.json is missing"),
    "empty features": (lambda c: (c / "tokens/dataset_info.json").write_bytes(b""), "tokens cannot be read"),
    "empty tokens": (lambda c: (c / ARROW).write_bytes(b""), "tokens cannot be read"),
    "no list of files": (lambda c: change(c / "tokens/state.json", _data_files=...), "tokens cannot be read"),
    "no part": (lambda c: change(c / "tokens/state.json", _data_files=[]), "holds 0 tokens"),
    "a folder": (lambda c: change(c / "tokens/state.json", _data_files=[{"filename": "."}]), "its manifest names '.'"),
    "no split": (lambda c: change(c / "tokens/state.json", _split=...), "tokens cannot be read"),
    "a format that is none": (lambda c: change(c / "tokens/state.json", _format_type="os.system"), "tokens cannot be read"),
    "no vocabulary": (lambda c: [(c / name).unlink() for name in VOCABULARY], "the bytes of its tokens, and they are missing"),
    "half a vocabulary": (lambda c: (c / VOCABULARY[0]).unlink(), "is missing"),
    "no hashes": (lambda c: change(c / "manifest.json", codes_sha256=None), "codes_sha256 is None"),
    "hashes of others": (lambda c: change(c / "manifest.json", codes_sha256={}), "has no hash for 'blocks.0.hook_mlp_out'"),
    "sequences that go back": (lambda c: edit(c / "starts.npy", 2, 0), r"starts.npy does not ascend"),
    "sequences far outside": (lambda c: edit(c / "starts.npy", 2, 10**12), r"starts.npy does not ascend"),
    "positions outside": (lambda c: edit(c / "index/L0.mlp_out.positions.npy", slice(None), 2**32 - 1), "do not ascend to"),
    "positions that go back": (lambda c: edit(c / "index/L0.mlp_out.positions.npy", slice(None), 0), "do not ascend to"),
    "ids that are no codes": (lambda c: edit(c / "ids/L0.mlp_out.npy", slice(None), 200), "holds code 200 of a codebook of 12|damaged"),
}


@pytest.mark.parametrize("fault", INCOMPLETE)
def test_4_files_that_are_cut_or_contradict_each_other(copy, fault):
    spoil, message = INCOMPLETE[fault]
    spoil(copy)
    with pytest.raises((CheckpointError, DataError), match=message):
        read_all(copy)


def test_4_an_index_that_has_less_than_its_ids(copy):
    edit(copy / "index/L0.mlp_out.offsets.npy", slice(0, -1), 0)  # all positions are those of the last code
    with pytest.raises(CheckpointError, match=r"the index of L0.mlp_out in .* has not what its ids have"):
        tlc.CodeStore(copy).counts("L0.mlp_out", special=False)


def lists(values, starts):
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def cut_elsewhere(n, starts):
    return {"input_ids": lists(np.ones(n, np.int32), [0, n])}


COLUMNS = {
    "floats": lambda n, starts: {"input_ids": lists(np.ones(n, np.float32), starts)},
    "64 bits": lambda n, starts: {"input_ids": lists(np.full(n, 2**40), starts)},
    "bools": lambda n, starts: {"input_ids": lists(np.ones(n, bool), starts)},
    "times": lambda n, starts: {"input_ids": lists(np.ones(n, "M8[s]"), starts)},
    "texts": lambda n, starts: {"input_ids": lists(["a"] * n, starts)},
    "no lists": lambda n, starts: {"input_ids": pa.array(np.ones(n, np.int32))},
    "nothing": lambda n, starts: {"input_ids": lists(pa.array([None] * n, pa.int32()), starts)},
    "another row": lambda n, starts: {"input_ids": pa.array([*([1] * b for b in np.diff(starts)), None], pa.list_(pa.int32()))},
    "another name": lambda n, starts: {"ids": lists(np.ones(n, np.int32), starts)},
    "a path to open": lambda n, starts: {
        "input_ids": lists(np.ones(n, np.int32), starts),
        "image": pa.array([{"bytes": None, "path": "http://127.0.0.1:1/canary"}] * (len(starts) - 1)),
    },
    "other sequences": cut_elsewhere,
}


def write_arrow(path, columns):
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)


@pytest.mark.parametrize("fault", COLUMNS)
def test_4_tokens_that_are_no_token_ids(copy, store, fault):
    write_arrow(copy / ARROW, COLUMNS[fault](store.n_tokens, store.starts))
    for read in (lambda: tlc.CodeStore(copy).tokens(0, 3), lambda: tlc.CodeStore(copy).dataset):
        with pytest.raises(CheckpointError, match=r"tokens (cannot be read|holds)|are not the sequences of"):
            read()


def test_4_rows_that_reach_out_of_their_file(copy, store):
    """Arrow believes offsets: without a check, memory beyond the file would be read."""
    n = store.n_tokens
    write_arrow(copy / ARROW, cut_elsewhere(n, None))
    before, offsets, after = (copy / ARROW).read_bytes().rpartition(np.array([0, n], np.int32).tobytes())
    (copy / ARROW).write_bytes(before + np.array([0, 2**30], np.int32).tobytes() + after)
    assert offsets
    with pytest.raises(CheckpointError, match="tokens cannot be read"):
        tlc.CodeStore(copy).tokens(0, 3)


NAMES = {
    "zeros before a layer": ("blocks.00.hook_mlp_out", "is written 'blocks.0.hook_mlp_out'"),
    "5000 digits": (f"blocks.{'1' * 5000}.hook_mlp_out", "manifest.json"),
    "no name": ("", "neither a site"),
    "a device": ("CON", "neither a site"),
    "a dash": ("-hook_x", "neither a site"),
    "up": ("hook_x/../../y", "neither a site"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_11_names_of_sites(copy, fault):
    name, message = NAMES[fault]
    site = {"n_codes": 12, "n_groups": 1, "k": 3, "dtype": "uint8"}
    change(copy / "manifest.json", sites={name: site}, codes_sha256={name: "0"})
    with pytest.raises(CheckpointError, match=message):
        tlc.CodeStore(copy)


def test_11_a_path_that_is_too_long(tmp_path):
    with pytest.raises(CheckpointError, match="is no name of a folder"):
        tlc.CodeStore(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["manifest.json", *VOCABULARY, ARROW, "tokens/dataset_info.json"])
def test_12_links_out_of_the_store(copy, name, tmp_path):
    shutil.move(copy / name, tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_all(copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
@pytest.mark.parametrize("name", ["manifest.json", VOCABULARY[0], "flags.npy", ARROW, "tokens/dataset_info.json"])
def test_12_a_pipe_is_not_waited_for(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError):
        read_all(copy)


@pytest.fixture
def unfinished(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_codebook.store.collect.build_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gather(model, TEXTS, tmp_path / "unfinished")
    return tmp_path / "unfinished"


@pytest.mark.parametrize("name", ["index", "tokens", "shards"])
@pytest.mark.parametrize("begun", [True, False])
def test_12_going_on_writes_nothing_through_a_link(model, unfinished, name, begun, tmp_path):
    (tmp_path / "outside").mkdir()
    shutil.rmtree(unfinished / name, ignore_errors=True)
    (unfinished / name).symlink_to(tmp_path / "outside")
    if not begun:
        change(unfinished / "progress.json", bytes={})
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside"):
        gather(model, TEXTS, unfinished, resume=True)
    assert list((tmp_path / "outside").iterdir()) == []


# --- two writers (19), and notes of an unfinished collection that lie (9) ---


@pytest.mark.parametrize(("resume", "error"), [(False, CheckpointExistsError), (True, CheckpointError)])
def test_19_a_store_that_came_in_the_meantime_stays(model, resume, error, tmp_path, monkeypatch):
    """The folder is empty when one process looks, and another one has finished before the first takes the lock."""
    take, others = _Job._first, []

    def slowly(job):
        monkeypatch.setattr(_Job, "_first", take)
        others.append(listing(gather(model, ["w5 w6"], tmp_path / "store").path))
        return take(job)

    monkeypatch.setattr(_Job, "_first", slowly)
    with pytest.raises(error, match=r"holds a store already|was collected otherwise|in the meantime"):
        gather(model, TEXTS, tmp_path / "store", resume=resume)
    assert listing(tmp_path / "store") == others[0]


def test_19_a_collection_that_was_finished_in_the_meantime_stays(model, unfinished, monkeypatch):
    prepare, others = _Job._prepare, []

    def slowly(job, *args):
        monkeypatch.setattr(_Job, "_prepare", prepare)
        others.append(listing(gather(model, TEXTS, unfinished, resume=True).path))
        return prepare(job, *args)

    monkeypatch.setattr(_Job, "_prepare", slowly)
    with pytest.raises(CheckpointError, match=r"another process collected into .* in the meantime"):
        gather(model, TEXTS, unfinished, resume=True)
    assert listing(unfinished) == others[0]
    assert gather(model, TEXTS, unfinished, resume=True).manifest["complete"]


LOCKS = {"a folder": lambda path: path.mkdir(), "a link": lambda path: path.symlink_to(path.parent / "target"), "a pipe": os.mkfifo}


@pytest.mark.parametrize("fault", LOCKS)
def test_19_a_lock_that_is_none(model, fault, tmp_path):
    LOCKS[fault](tmp_path / LOCK)
    with pytest.raises(CheckpointError, match=r"cannot be used as a lock|no ordinary file"):
        gather(model, TEXTS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    "changes",
    [{"n_tokens": -1}, {"window": True}, {"documents": 10.0}, {"bytes": {"flags.npy": "1"}}, {"bytes": {"flags.npy": -1}}, "0", 0, None],
    ids=str,
)
def test_9_numbers_of_a_note_that_cannot_be(model, unfinished, changes):
    if not isinstance(changes, dict):
        changes = {"asked": json.loads((unfinished / "progress.json").read_text())["asked"] | {"window_tokens": changes}}
    change(unfinished / "progress.json", **changes)
    before = listing(unfinished)
    with pytest.raises(CheckpointError, match=r"progress.json cannot be used \(wrong: "):
        gather(model, TEXTS, unfinished, resume=True)
    assert listing(unfinished) == before


# --- data (39 to 42) ---


@pytest.mark.parametrize(("texts", "rows"), [([[5]], [[5]]), (["w5"], [[1, 5]]), (["", "w5", "  "], [[1, 5]])])
def test_39_one_token_is_a_text_and_none_is_not(model, texts, rows, tmp_path):
    store = gather(model, texts, tmp_path / "store")
    assert rows_of(store) == rows
    hit = tlc.search_codes(store, [5])[0]
    assert hit.occurrences == 1
    assert hit.label in str(describe_code(store, hit.label))
    assert store.contexts(hit.label)[-1].tokens.tolist() == rows[0]
    with pytest.raises(DataError, match="every document is empty"):
        gather(model, ["", " \t\n"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("make", [lambda: torch.ones(2, 2).long().to_sparse(), lambda: torch.ones(2, 2, dtype=torch.long, device="meta")])
def test_39_tensors_without_ids(model, make, tmp_path):
    with pytest.raises(DataError, match="Give a dense one that holds its ids"):
        gather(model, make(), tmp_path / "store")


MASKS = {
    "short": [1, 1],
    "long": [1, 1, 1, 1],
    "a row of rows": [[1, 1, 1]],
    "one number": 1,
    "shares": [1.0, 0.5, 0.0],
    "additive": [0.0, 0.0, -1e9],
    "NaN": [1, 1, float("nan")],
    "None": [1, 1, None],
    "texts": ["1", "1", "0"],
    "segments": [1, 2, 2],
    "a hole": [1, 0, 1],
    "ragged": [[1], [1, 1], []],
}


@pytest.mark.parametrize("fault", MASKS)
def test_40_masks_that_are_none(model, fault, tmp_path):
    with pytest.raises(DataError, match=r"document 1 has .*attention_mask"):
        gather(model, [[1, 5], {"input_ids": [1, 5, 6], "attention_mask": MASKS[fault]}], tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda mask: [bool(m) for m in mask], lambda mask: [float(m) for m in mask]])
def test_40_masks_of_every_kind(model, kind, tmp_path):
    rows = [{"input_ids": [0, 0, 1, 5, 6], "attention_mask": kind([0, 0, 1, 1, 1])}, {"input_ids": [7, 8, 0], "attention_mask": None}]
    assert rows_of(gather(model, rows, tmp_path / "store")) == [[1, 5, 6], [7, 8, 0]]


class OtherTokenizer:
    """The model's tokenizer with the BOS of another one."""

    def __init__(self, tokenizer, bos):
        self.tokenizer, self.bos_token_id = tokenizer, bos

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def __len__(self):
        return len(self.tokenizer)


@pytest.mark.parametrize("bos", [61, 50256, -1, "1", [1]])
def test_41_a_tokenizer_with_another_bos(model, bos, tmp_path):
    """The words are tokens of the model, the BOS before them is not: -1 would be its last token."""
    with pytest.raises(DataError, match=r"begins texts with the token .*, the model has 61"):
        gather(model, ["w5 w6"], tmp_path / "store", tokenizer=OtherTokenizer(model.tokenizer, bos))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("tokenizer", ["gpt2", 3, {"w5": 5}])
def test_41_a_tokenizer_that_is_none(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="Give a Hugging Face tokenizer"):
        gather(model, ["w5 w6"], tmp_path / "store", tokenizer=tokenizer)


def test_41_labels_are_no_tokens(model, tmp_path):
    rows = [{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}]
    assert rows_of(gather(model, rows, tmp_path / "store")) == [[1, 5, 6]]
    with pytest.raises(DataError, match="the token id -100"):
        gather(model, rows, tmp_path / "other", column="labels")


ODD = "nul \0 \u202ertl\u202c e\u0301 🦊👩‍👩‍👧 a\r\nb\rc\u2028d\x85e\ufeff</script>\x1b[31m"


@pytest.fixture(scope="module")
def bytewise():
    """Collect what a model reads byte by byte: every character outside ASCII lies in several tokens."""
    model = load_hf(make_hf("gpt2", vocab_size=300), byte_level(), host=HOSTS[0])
    tlc.attach(model, "mlp_out", layers=0, n_codes=8, k=1)
    return lambda *args, **options: gather(model, *args, **options, tokenizer=byte_level())  # a host may give its own tokenizer a BOS


def test_42_odd_texts_from_a_file_to_the_page(bytewise, tmp_path):
    (tmp_path / "odd.txt").write_text(ODD, encoding="utf-8", newline="")
    store = bytewise(tmp_path / "odd.txt", tmp_path / "store", context_length=10)
    stored = store.vocabulary.join(store.tokens(0, store.n_tokens))[0]
    assert stored == ODD.encode()  # not one byte more or less, over sequences that end inside characters
    code = f"L0.mlp_out:{int(store.counts('L0.mlp_out')[0].argmax())}"
    page, view = str(describe_code(store, code, n=300, n_contexts=100)), show_examples(store, code, n=100)
    for text in (page, view.text):
        assert all(character.isprintable() or character == "\n" for character in text)
    assert [tag for tag, _ in Elements(view.page(interactive=False)).active()] == ["meta"] * 4


def test_42_a_character_over_several_tokens_is_found_in_the_store(bytewise, tmp_path):
    store = bytewise(["a🦊b", "é\r\n\u2028"], tmp_path / "store")
    for pattern, wanted in (("🦊", [1, 2, 3, 4]), ("\r\n", [8, 9]), ("\u2028", [10, 11, 12]), ("é", [6, 7])):
        assert match_text(store, pattern).positions("all").tolist() == wanted


def test_42_a_line_of_a_megabyte(bytewise, tmp_path):
    (tmp_path / "long.txt").write_text("🦊é" * 170_000, encoding="utf-8")
    store = bytewise(tmp_path / "long.txt", tmp_path / "store", n_tokens=600, context_length=48)
    assert (store.n_tokens, store.n_sequences) == (600, 13)
    assert store.vocabulary.join(store.tokens(0, 600))[0] == ("🦊é" * 100).encode()


# --- hostile text (43 to 46) ---


@pytest.fixture(scope="module")
def hostile(store, tmp_path_factory):
    folder = shutil.copytree(store.path, tmp_path_factory.mktemp("hostile") / "store")
    save_vocabulary(folder, Vocabulary.of_pieces([(PAYLOADS * 3)[token].encode() for token in range(61)]))
    return tlc.CodeStore(folder)


def inert(text):
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("options", [["--json"], [], ["--label_all"], ["--label_all", "--json"]], ids=" ".join)
def test_43_what_the_command_line_prints(hostile, options, capsys):
    code = f"L0.mlp_out:{int(hostile.counts('L0.mlp_out')[0].argmax())}"
    rest = ["--min_precision", "0.05"] if "--label_all" in options else [code, "--n", "61", "--n_contexts", "50"]
    assert main(["describe", str(hostile.path), *rest, *options]) == 0
    said = capsys.readouterr().out
    assert inert(said)
    assert "w5" not in said  # the tokens are the hostile ones
    if "--json" in options:
        json.loads(said)


def test_43_a_page_of_the_command_line(hostile, store, tmp_path, capsys):
    code = f"L0.mlp_out:{int(hostile.counts('L0.mlp_out')[0].argmax())}"
    pages = []
    for name, of in (("hostile", hostile), ("plain", store)):
        assert main(["describe", str(of.path), code, "--html", str(tmp_path / name), "--n_contexts", "100"]) == 0
        pages.append(Elements((tmp_path / name).read_text(encoding="utf-8")))
    capsys.readouterr()
    assert [tag for tag, _ in pages[0].active()] == [tag for tag, _ in pages[1].active()]  # the display's own scripts
    assert "onerror=" in pages[0].text


def test_43_the_name_of_a_folder_in_the_log(model, tmp_path, capsys):
    gather(model, ["w5 w6"], tmp_path / "\x1b[31mred\nline", progress=True)
    first = capsys.readouterr().err.split("\n")[0]
    assert r"\x1b[31mred\nline: about 3 tokens" in first
    assert "\x1b" not in first


def test_44_names_in_a_plot_are_text():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [r"$\frac{1}{0}$", r"\$\frac{1}{0}$", "a$b$c", "<img src=x onerror=alert(1)>"]
    axes, words = (names, [str(i) for i in range(4)]), tuple(names)
    found = SimpleNamespace(values=lambda what: torch.eye(4), by="position", axes=axes, words=words, corrupt=0.0, clean=1.0)
    ax = plot_effects(found, "recovered", None, 10)
    try:
        buffer = io.StringIO()
        ax.figure.savefig(buffer, format="svg", metadata={"Date": None})
    finally:
        pyplot.close("all")
    assert [label.get_text().replace("\\$", "$") for label in ax.get_yticklabels()] == names
    assert [label.get_text().replace("\\$", "$") for label in ax.get_xticklabels()] == [f"{i} {name}" for i, name in enumerate(names)]
    assert "<img" not in buffer.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a(b"], "is no regular expression: .*at character 3"),
        (["(w5)", "--group", "2"], "has 1 groups"),
        (["(w5) (w10)", "--group", "x"], "group 'x' was asked for"),
        ([r"(?:.|.\w?)+$(?<=\s)", "--timeout", "0.05"], "was stopped after 0.05 s of matching"),
    ],
)
def test_45_a_pattern_at_the_command_line(store, options, message, capsys):
    began = time.process_time()
    assert main(["search", str(store.path), *options]) == 1
    said = capsys.readouterr().err
    assert time.process_time() - began < 3
    assert said.startswith("tl-codebook search: ")
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert main(["search", str(store.path), "w5"]) == 0


def test_46_labels_in_a_spreadsheet(tmp_path):
    texts = ["=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1", '=HYPERLINK("http://x")', '"; =1']
    write_csv(CodeLabels.from_texts({f"L0.mlp_out:{i}": text for i, text in enumerate(texts)}), tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv", encoding="utf-8", newline="") as file:
        cells = [row["text"] for row in csv.DictReader(file)]
    assert cells == ["'" + text if text[0] in "=@+-" else text for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        ["graph", "--quiet", "--graphml", "x" * 300],
        ["graph", "--quiet", "--html", "a\0b"],
        ["graph", "--quiet", "--sites", "\x1b[31m"],
        ["search", "w5", "--csv", "a\0b"],
        ["search", "--tokens", "\x1b[31m"],
        ["describe", "\x1b[31m:3"],
    ],
    ids=ascii,
)
def test_43_wrong_calls_are_one_line_that_is_inert(store, options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([options[0], str(store.path), *options[1:]]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tl-codebook {options[0]}: ")
    assert inert(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["meta", "cpu:7", "\x1b[31m", "xpu"])
def test_43_a_device_that_is_none(device, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("w5")
    assert main(["collect", str(tmp_path / "model"), str(tmp_path / "a.txt"), str(tmp_path / "out"), "--device", device]) == 1
    said = capsys.readouterr().err
    assert "--device" in said
    assert "\x1b" not in said


def test_3_ids_that_no_codebook_has_are_not_shown(tmp_path):
    model = make_host("native")
    tlc.attach(model, "mlp_out", n_codes=8, k=2)
    store = tlc.collect_codes(model, ["w3 w4 w5"], tmp_path / "store", progress=False)
    ids = np.load(tmp_path / "store/ids/L0.mlp_out.npy")
    ids[1] = 200
    np.save(tmp_path / "store/ids/L0.mlp_out.npy", ids)
    with pytest.raises(CheckpointError, match=r"the store holds code 200 of 8 at blocks.0.hook_mlp_out: it is damaged"):
        tlc.show_codes(store, 0, "L0.mlp_out")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("sites", [3, [None]])
def test_11_sites_that_are_no_names(tmp_path, sites):
    model = make_host("native")
    tlc.attach(model, "mlp_out", n_codes=8)
    with pytest.raises(UnknownHookError, match="a site was given as"):
        tlc.collect_codes(model, ["w3"], tmp_path / "store", sites=sites, progress=False)


@pytest.mark.parametrize("label", [f"L{'9' * 5000}.z.0:1", f"L0.z.{'9' * 5000}:1", f"L0.z.0:{'9' * 5000}"])
def test_11_numbers_of_thousands_of_digits(label):
    with pytest.raises(LabelError):
        tlc.Code.parse(label)


def test_12_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"missing|cannot be followed"):
        files.resolve(tmp_path, "a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").symlink_to(tmp_path / "folder" / "b")
    with pytest.raises(CheckpointError, match="cannot be followed"):
        files.resolve(tmp_path, "folder")


def test_43_a_message_with_a_hostile_path_is_inert(capsys):
    assert main(["search", "\x1b[31mred\u202e", "w"]) == 1
    assert not set(capsys.readouterr().err) & {"\x1b", "\u202e"}


def test_45_a_shift_beyond_everything_finds_nothing(tmp_path):
    model = make_host("native")
    tlc.attach(model, "mlp_out", n_codes=8)
    store = tlc.collect_codes(model, ["w3 w4 w5"], tmp_path / "store", progress=False)
    assert tlc.search_codes(store, "w4", shift=10**25) == tlc.search_codes(store, "w4", shift=-(10**25)) == []
