"""What is collected: the ids that the model computes, for every kind of dataset and host; and what is left as it was."""

import json

import datasets
import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.tiny import HOSTS, make_host
from tl_codebook.errors import AttachError, CheckpointError, CheckpointExistsError, ConfigError, DataError, UnknownHookError
from tl_codebook.store import collect
from tl_codebook.store.sequences import _TEXT_PIECE

TEXTS = ["w5 w6 w7", "", "w8 w9", " ".join(f"w{3 + i % 57}" for i in range(60)), "w10 w11 w12 w13", "w14"]
ROWS = [[1, *(int(word[1:]) for word in text.split())] for text in TEXTS if text]
CUT = [ROWS[0], ROWS[1], ROWS[2][:16], *([1, *ROWS[2][1 + 15 * i : 16 + 15 * i]] for i in (1, 2, 3)), ROWS[3], ROWS[4]]
"""The sequences of `TEXTS` at a context of 16: BOS and 15 tokens."""


def host_with_codes(kind="native", **config):
    model = make_host(kind)
    tlc.attach(model, ["z", "mlp_out"], **{"n_codes": 16, "k": 2} | config)
    return model


@pytest.fixture(scope="module")
def model():
    return host_with_codes()


def gather(model, dataset, path, **options):
    return tlc.collect_codes(model, dataset, path, **{"progress": False, "context_length": 16} | options)


def rows_of(store):
    return [store.tokens(store.sequence(i).start, store.sequence(i).stop).tolist() for i in range(store.n_sequences)]


def assert_ids_are_those_of_each_sequence_alone(store, model):
    for i, row in enumerate(rows_of(store)):
        _, cache = model.run_with_cache(torch.tensor([row]))
        for name, book in store.sites.items():
            alone = cache[f"{name}.hook_codes"][0].reshape(len(row), book.n_groups, book.k)
            assert np.array_equal(store.ids(name)[store.sequence(i)], alone.numpy()), (name, i)


@pytest.mark.parametrize("kind", [f"{host}-{architecture}" for host in HOSTS for architecture in ("gpt2", "neox", "llama")] + ["native"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ids_are_those_of_each_sequence_alone(kind, batch_size, tmp_path):
    """Batches are padded on the right; that must not show."""
    model = host_with_codes(kind)
    store = gather(model, TEXTS, tmp_path / "store", batch_size=batch_size)
    assert rows_of(store) == CUT
    assert list(store.sites) == list(tlc.sites(model))
    assert_ids_are_those_of_each_sequence_alone(store, model)


def test_a_tokenizer_that_pads_on_the_left(tmp_path):
    """HookedTransformer would take padding tokens at the beginning for padding."""
    model = host_with_codes()
    model.tokenizer.padding_side = "left"
    rows = [[0, 0, 5, 6], [1, 7, 0]]
    store = gather(model, rows, tmp_path / "store")
    model.tokenizer.padding_side = "right"
    assert rows_of(store) == rows
    assert_ids_are_those_of_each_sequence_alone(store, model)


def write_files(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "\n")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "a.parquet")


KINDS = {
    "list": lambda folder: TEXTS,
    "generator": lambda folder: (text for text in TEXTS),
    "rows with texts": lambda folder: [{"text": text, "n": 3} for text in TEXTS],
    "Dataset": lambda folder: datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(6))}),
    "IterableDataset": lambda folder: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    "IterableDataset without columns": lambda folder: datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS)),
    "jsonl": lambda folder: folder / "a.jsonl",
    "name of a jsonl": lambda folder: str(folder / "a.jsonl"),
    "parquet": lambda folder: folder / "a.parquet",
    "folder": lambda folder: folder / "saved",
    "split of a DatasetDict": lambda folder: datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})})["train"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_texts(model, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_files(tmp_path)
    assert rows_of(gather(model, KINDS[kind](tmp_path), tmp_path / "store")) == CUT


ROWS_OF_IDS = {
    "lists": [[1, 5, 6], [7, 8]],
    "tensors": [torch.tensor([1, 5, 6]), torch.tensor([7, 8])],
    "input_ids": [{"input_ids": [1, 5, 6]}, {"input_ids": [7, 8]}],
    "padding on both sides": [
        {"input_ids": [0, 0, 1, 5, 6], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [7, 8, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0]},
    ],
    "a Dataset": datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 0], [7, 8, 0, 0]], "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]]}),
}


@pytest.mark.parametrize("kind", ROWS_OF_IDS)
def test_rows_of_ids_stay_as_they_are_without_their_padding(model, kind, tmp_path):
    store = gather(model, ROWS_OF_IDS[kind], tmp_path / "store")
    assert rows_of(store) == [[1, 5, 6], [7, 8]]
    assert store.is_special().tolist() == [True, False, False, False, False]
    assert_ids_are_those_of_each_sequence_alone(store, model)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_tensor(model, dtype, tmp_path):
    tokens = torch.tensor([[1, 5, 6], [7, 8, 9]])
    for i, given in enumerate([tokens.to(dtype), tokens.to(dtype).numpy()]):
        assert rows_of(gather(model, given, tmp_path / str(i))) == tokens.tolist()


def test_a_text_file_is_one_document_and_a_long_one_several(model, tmp_path):
    (tmp_path / "short.txt").write_text("w5 w6\r\n\x00 w7\u2028w8\n", newline="")
    unknown = 0  # the tokenizer's own word for a NUL
    assert rows_of(gather(model, tmp_path / "short.txt", tmp_path / "short")) == [[1, 5, 6, unknown, 7, 8]]
    lines = [f"w{3 + i % 57}" * 1 for i in range(9)]
    (tmp_path / "long.txt").write_text("x" * (_TEXT_PIECE - 2) + " w5\nw6 " + " ".join(lines))
    assert rows_of(gather(model, tmp_path / "long.txt", tmp_path / "long")) == [
        [1, unknown, 5],
        [1, 6, *(3 + i % 57 for i in range(9))],
    ]


def test_n_tokens_cuts_the_last_sequence(model, tmp_path):
    store = gather(model, TEXTS, tmp_path / "store", n_tokens=9)
    assert rows_of(store) == [CUT[0], CUT[1], CUT[2][:2]]
    assert store.n_tokens == 9
    assert_ids_are_those_of_each_sequence_alone(store, model)
    assert gather(model, TEXTS, tmp_path / "all", n_tokens=10**9).n_tokens == sum(map(len, CUT))


def test_special_tokens(model, tmp_path):
    store = gather(model, ["w5 <eos> w6"], tmp_path / "store")
    assert store.tokens(0, 4).tolist() == [1, 5, 2, 6]
    assert store.is_special().tolist() == [True, False, True, False]


@pytest.mark.parametrize(("n_codes", "dtype"), [(255, "uint8"), (256, "uint16")])
def test_the_smallest_integer(n_codes, dtype, tmp_path):
    model = host_with_codes(n_codes=n_codes, k=1)
    store = gather(model, TEXTS, tmp_path / "store", sites="L0.mlp_out")
    assert store.ids("L0.mlp_out").dtype == dtype
    assert (tmp_path / "store/ids/L0.mlp_out.npy").stat().st_size == 128 + store.n_tokens * np.dtype(dtype).itemsize
    assert_ids_are_those_of_each_sequence_alone(store, model)


def test_what_fires_after_hooks_and_empty_slots(tmp_path):
    """A permanent hook counts, as in any forward pass; -1 (no code) is stored as n_codes and fires nowhere."""
    model = host_with_codes()

    def change(ids, hook):
        ids[:, 0] = -1
        ids[:, 1] = 3
        return ids

    model.hook_dict["blocks.0.hook_mlp_out.hook_codes"].add_hook(change)
    store = gather(model, ["w5 w6 w7", "w8 w9"], tmp_path / "store", sites="L0.mlp_out")
    assert store.ids("L0.mlp_out")[[0, 4], 0].tolist() == [[16, 16], [16, 16]]
    assert store.ids("L0.mlp_out")[[1, 5], 0].tolist() == [[3, 3], [3, 3]]
    assert {1, 5} <= set(store.positions("L0.mlp_out:3").tolist())
    assert not {0, 4} & {int(p) for code in range(16) for p in store.positions(f"L0.mlp_out:{code}")}
    assert store.counts("L0.mlp_out").sum() < 2 * store.n_tokens - 4


@pytest.mark.parametrize("kind", [*HOSTS, "native"])
def test_no_layer_above_the_last_site_runs(kind, tmp_path):
    model = host_with_codes(kind if kind == "native" else f"{kind}-gpt2")
    ran = []
    for point in tlc.sites(model).values():
        point.hook_x.register_forward_hook(lambda module, inputs, output, name=point.site: ran.append(name))
    gather(model, TEXTS, tmp_path / "store", sites=["L0.mlp_out"])
    assert set(ran) == {"blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"}
    gather(model, TEXTS, tmp_path / "all", sites="z")
    assert "blocks.1.attn.hook_z" in ran


def test_sites_are_chosen_and_labelled(model, tmp_path):
    store = gather(model, TEXTS, tmp_path / "store", sites=["L1.z", "blocks.0.hook_mlp_out"])
    assert {name: (book.label, book.n_groups, book.k) for name, book in store.sites.items()} == {
        "blocks.1.attn.hook_z": ("L1.z", 4, 2),
        "blocks.0.hook_mlp_out": ("L0.mlp_out", 1, 2),
    }
    assert sorted(path.name for path in (tmp_path / "store/ids").iterdir()) == ["L0.mlp_out.npy", "L1.z.npy"]


def test_a_site_outside_the_table(tmp_path):
    model = make_host("native")
    tlc.attach(model, {"blocks.0.mlp.hook_pre": tlc.CodebookConfig(8, 1)})
    store = gather(model, TEXTS, tmp_path / "store")
    _, cache = model.run_with_cache(torch.tensor([CUT[2]]))
    assert np.array_equal(store.ids("blocks.0.mlp.hook_pre")[store.sequence(2), 0], cache["blocks.0.mlp.hook_pre.hook_codes"][0])
    places = {code: store.positions(f"blocks.0.mlp.hook_pre:{code}").tolist() for code in range(8)}
    assert sorted(place for each in places.values() for place in each) == list(range(store.n_tokens))


def test_the_model_is_as_it_was(tmp_path):
    model = host_with_codes()
    model.train().blocks[0].eval()
    books = [point.codebook for point in tlc.sites(model).values()]
    books[0].count_when = "always"
    before = [book.usage.counts.clone() for book in books]
    modes = [module.training for module in model.modules()]
    gather(model, TEXTS, tmp_path / "store")
    with pytest.raises(DataError):
        gather(model, [[1, 2], [99]], tmp_path / "other")
    assert [module.training for module in model.modules()] == modes
    assert [book.count_when for book in books] == ["always", "train", "train", "train"]
    assert all(torch.equal(a, book.usage.counts) for a, book in zip(before, books, strict=True))
    assert not any(point.hook_codes._forward_hooks for point in tlc.sites(model).values())
    assert torch.is_grad_enabled()


def test_the_manifest_says_what_was_collected(model, tmp_path):
    import hashlib

    manifest = gather(model, TEXTS, tmp_path / "store", n_tokens=30).manifest
    assert (manifest["format"], manifest["version"], manifest["complete"]) == ("tl_codebook.store", 1, True)
    assert (manifest["n_tokens"], manifest["n_sequences"], manifest["context_length"]) == (30, 4, 16)
    for name, point in tlc.sites(model).items():
        raw = point.codebook.codes.detach().numpy().tobytes()
        assert manifest["codes_sha256"][name] == hashlib.sha256(raw).hexdigest()
        groups = 4 if name.endswith("z") else 1
        assert manifest["sites"][name] == {"n_codes": 16, "n_groups": groups, "k": 2, "dtype": "uint8"}
    about = manifest["tokenizer"]
    assert (about["n_tokens"], about["bos_token_id"], about["eos_token_id"], about["pad_token_id"]) == (61, 1, 2, 0)
    assert manifest["model"]["config"]["n_layers"] == 2


def test_the_tokens_are_a_dataset_and_their_text_is_kept(model, tmp_path):
    from tl_codebook.store.text import load_vocabulary

    store = gather(model, TEXTS, tmp_path / "store")
    assert datasets.load_from_disk(str(tmp_path / "store/tokens"))["input_ids"][:] == CUT
    assert store.dataset[3]["input_ids"] == CUT[3]
    assert store.manifest["vocabulary_bytes"] is True
    assert load_vocabulary(tmp_path / "store").bytes_of(5).strip() == b"w5"


def test_the_size_is_told_before_the_bar(model, tmp_path, capsys):
    store = gather(model, TEXTS, tmp_path / "store", progress=True)
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path / 'store'}: about {store.n_tokens:,} tokens and ")
    slots = 2 * (2 * 4 + 2)  # two layers of 4 heads and mlp_out, k=2: a byte each, 4 in the index
    assert f"{slots + 4 * slots + 6} bytes a token" in told
    gather(model, TEXTS, tmp_path / "silent")
    assert capsys.readouterr().err == ""


def test_the_files_take_about_what_was_said(model, tmp_path):
    rows = [[1, *range(3, 18)]] * 400
    store = gather(model, rows, tmp_path / "store")
    assert 0.7 * 106 * store.n_tokens < store.nbytes < 1.3 * 106 * store.n_tokens


# --- refused before anything is written ---


def surrogate():
    return ["w5", "w6 \ud83d w7"]


REFUSED = {
    "no documents": (lambda: [], DataError, "the list is empty"),
    "an empty Dataset": (lambda: datasets.Dataset.from_dict({"text": []}), DataError, "is empty"),
    "an empty generator": (lambda: iter(()), DataError, "every document is empty"),
    "empty texts": (lambda: ["", ""], DataError, "every document is empty"),
    "no tokens": (lambda: [[1, 5], []], DataError, "document 1 is a float64|document 1 has no tokens"),
    "padding alone": (lambda: [{"input_ids": [0, 0], "attention_mask": [0, 0]}], DataError, "document 0 has no tokens"),
    "a token too large": (lambda: [[1, 5], [1, 61]], DataError, "document 1 has the token id 61, the model 61 tokens"),
    "a label for padding": (lambda: torch.tensor([[1, -100]]), DataError, "the token id -100"),
    "a row too long": (lambda: [list(range(3, 20))], DataError, "document 0 has 17 tokens, a sequence at most 16"),
    "floats": (lambda: torch.rand(2, 3), DataError, "torch.float32"),
    "one row": (lambda: torch.tensor([1, 2]), DataError, "Give whole token ids"),
    "a batch of batches": (lambda: torch.ones(1, 2, 3, dtype=torch.long), DataError, "Give whole token ids"),
    "a number": (lambda: 3, DataError, "a int was given"),
    "bytes": (lambda: b"w5", DataError, "a bytes was given"),
    "None among texts": (lambda: ["w5", None], DataError, "document 1 is a NoneType"),
    "nested lists": (lambda: [[[1, 2]]], DataError, "document 0 is a int64 \\(1, 2\\)"),
    "strings in a row": (lambda: [["w5"]], DataError, "document 0 is"),
    "another column": (lambda: datasets.Dataset.from_dict({"story": ["w5"]}), DataError, "no column 'text'; its columns are \\['story'\\]"),
    "a DatasetDict": (
        lambda: datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["w5"]})}),
        DataError,
        "a DatasetDict of 'train' was given. Give one of them, such as dataset\\['train'\\]",
    ),
    "half a surrogate pair": (surrogate, DataError, "document 1 has '\\\\ud83d' at character 3"),
    "no such file": (lambda: "/nowhere/texts.jsonl", DataError, "no dataset could be loaded"),
    "no name of a file": (lambda: "x" * 5000, DataError, "no"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_data_that_is_refused_leaves_nothing_behind(model, fault, tmp_path):
    make, kind, message = REFUSED[fault]
    with pytest.raises(kind, match=message):
        gather(model, make(), tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"text": "w5"}\n{no', "line 2 is no JSON"),
        (b"[" * 99999, "line 1 is no JSON"),
        (b"3\n", "document 0 is a int"),
    ],
)
def test_a_jsonl_file_that_is_wrong(model, content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        gather(model, tmp_path / "a.jsonl", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"w5 \xff\xfe", "cannot be read as UTF-8")])
def test_a_text_file_that_is_wrong(model, content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        gather(model, tmp_path / "a.txt", tmp_path / "store")


WRONG = {
    "batch_size": ({"batch_size": 0}, ConfigError, "batch_size=0"),
    "n_tokens": ({"n_tokens": 0}, ConfigError, "n_tokens=0"),
    "a fraction of tokens": ({"n_tokens": 1e6}, ConfigError, "n_tokens=1000000.0"),
    "context too short": ({"context_length": 1}, ConfigError, "context_length=1"),
    "context too long": ({"context_length": 49}, DataError, "49 tokens were asked for, and the model's context is 48"),
    "site": ({"sites": "q"}, UnknownHookError, "no codebook sits at 'q'"),
    "address": ({"sites": ["L7.z"]}, UnknownHookError, "no codebook sits at 'L7.z'"),
    "both": ({"resume": True, "overwrite": True}, ConfigError, "Give one"),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_cannot_be(model, fault, tmp_path):
    options, kind, message = WRONG[fault]
    with pytest.raises(kind, match=message):
        gather(model, TEXTS, tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_has_nothing_to_collect(tmp_path):
    model = make_host("native")
    with pytest.raises(AttachError, match="has no codebooks"):
        gather(model, TEXTS, tmp_path / "store")
    tlc.attach(model, "mlp_out", n_codes=8)
    with tlc.bypassed(model, "L1.mlp_out"), pytest.raises(AttachError, match=r"'blocks.1.hook_mlp_out' is off"):
        gather(model, TEXTS, tmp_path / "store")
    model.tokenizer = None
    with pytest.raises(DataError, match="the model has no tokenizer"):
        gather(model, TEXTS, tmp_path / "store")
    store = gather(model, ROWS[:2], tmp_path / "store")
    assert store.manifest["tokenizer"] is None
    assert store.manifest["vocabulary_bytes"] is False
    assert not store.is_special().any()


# --- the folder ---


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_is_not_ours_is_never_touched(model, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointExistsError, match="holds no store of codes"):
            gather(model, TEXTS, tmp_path, **options)
    assert listing(tmp_path) == {"mine.txt": b"keep"}


def test_a_store_is_replaced_only_when_asked_and_readers_keep_theirs(model, tmp_path):
    old = gather(model, TEXTS, tmp_path / "store")
    ids, before = old.ids("L0.z"), old.ids("L0.z").copy()
    files = listing(tmp_path / "store")
    with pytest.raises(CheckpointExistsError, match="holds a store already"):
        gather(model, ["w50 w51"], tmp_path / "store")
    with pytest.raises(DataError):
        gather(model, [""], tmp_path / "store", overwrite=True)
    assert listing(tmp_path / "store") == files
    new = gather(model, ["w50 w51"], tmp_path / "store", overwrite=True)
    assert rows_of(new) == [[1, 50, 51]]
    assert np.array_equal(ids, before)  # the map of before holds the file of before


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/below"])
def test_a_path_that_cannot_be(model, name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError):
        gather(model, TEXTS, tmp_path / name)
    assert listing(tmp_path) == {"file": b"mine"}


def test_a_disk_that_is_too_small(model, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(collect.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(CheckpointError, match=r"would take about .* KB, and .* has 5.0 KB free. .* smaller n_tokens"):
        gather(model, TEXTS, tmp_path / "store")
    assert gather(model, TEXTS, tmp_path / "store", n_tokens=20).n_tokens == 20


def test_a_tokenizer_whose_text_is_not_that_of_its_tokens(model, tmp_path, monkeypatch):
    from tl_codebook.errors import CheckpointWarning

    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: "something else")
    with pytest.warns(CheckpointWarning, match="will have no text"):
        store = gather(model, TEXTS, tmp_path / "store")
    assert store.manifest["vocabulary_bytes"] is False
    assert not (tmp_path / "store/vocabulary.bytes.npy").exists()
