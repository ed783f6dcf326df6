"""From files and texts to rows of tokens, and the faults on the way (faults.md, 39 to 41)."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_hf, make_host
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import DataError
from tl_codebook.training import collate, load_dataset_from, tokenize_dataset
from tl_codebook.training.data import _suspects

TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13"]


@pytest.fixture(scope="module")
def model():
    return make_host("bridge-gpt2")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- loading ---


def write(folder, kind):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "csv":
        data.to_csv(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "saved":
        data.save_to_disk(path)
    elif kind == "folder of txt":
        path.mkdir()
        for i, text in enumerate(TEXTS):
            (path / f"{i}.txt").write_text(text)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder of txt"])
def test_every_format(tmp_path, kind):
    assert load_dataset_from(write(tmp_path, kind))["text"][:] == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("w5 w6\r\nw7\u2028ä 🙂", newline="")
    assert load_dataset_from(str(tmp_path / "a.txt"))["text"][0].split() == ["w5", "w6", "w7", "ä", "🙂"]


@pytest.mark.parametrize("name", ["data.pkl", "data.npy", "data.pt"])
def test_files_of_other_kinds_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=rf"{name} is of a kind that is not read\. Give \.txt"):
        load_dataset_from(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", "bad.jsonl", "bad.txt"])
def test_what_cannot_be_loaded(tmp_path, name):
    (tmp_path / "bad.jsonl").write_text("{no json")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=f"no dataset could be loaded from .*{name}"):
        load_dataset_from(tmp_path / name)


def test_an_empty_dataset_on_disk(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"is empty|could be loaded"):
        load_dataset_from(tmp_path / "empty")


# --- packing ---


def test_packing_by_hand(model):
    """Documents end to end, each with its BOS (1); the last row is padded (0)."""
    packed = tokenize_dataset(TEXTS, model, context_length=5)
    assert packed["input_ids"][:] == [[1, 5, 6, 7, 1], [8, 9, 1, 10, 11], [12, 13, 0, 0, 0]]
    assert packed["attention_mask"][:] == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]


def test_a_rest_of_one_token_is_dropped(model):
    assert tokenize_dataset(["w5 w6 w7"], model, context_length=3)["input_ids"][:] == [[1, 5, 6]]


@pytest.mark.parametrize(
    "data",
    [TEXTS, tuple(TEXTS), [{"text": text} for text in TEXTS], datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})],
    ids=["list", "tuple", "rows", "dataset"],
)
def test_kinds_of_data(model, data):
    assert tokenize_dataset(data, model, context_length=5)["input_ids"][0] == [1, 5, 6, 7, 1]


def test_another_column_and_many_batches(model):
    data = datasets.Dataset.from_dict({"story": ["w5 w6"] * 600})
    packed = tokenize_dataset(data, model, context_length=6, text_column="story")
    assert len(packed) == 300
    assert all(row == [1, 5, 6, 1, 5, 6] for row in packed["input_ids"])


def test_the_default_length_is_the_context(model):
    assert len(tokenize_dataset(["w5 " * 100], model)["input_ids"][0]) == 48


def test_empty_texts_add_no_tokens(model):
    assert tokenize_dataset(["", "w5 w6", "", "w7"], model, context_length=5)["input_ids"][:] == [[1, 5, 6, 1, 7]]


def test_given_ids_stay_as_they_are(model):
    rows = [
        {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 0], "labels": [9]},
        {"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "labels": [9]},
    ]
    got = tokenize_dataset(rows, model)
    assert got["input_ids"][:] == [[3, 4, 5], [6, 7, 8]]
    assert got.column_names == ["input_ids", "attention_mask"]


FAULTS = {
    "empty list": ([], {}, "0 rows"),
    "empty strings": (["", ""], {}, "no text of two tokens or more"),
    "an empty row": ([{"input_ids": []}], {}, "token"),
    "no column": ([{"story": "w5"}], {}, r"no column 'text'; its columns are \['story'\]\. Say text_column"),
    "a column of numbers": ([{"text": 5}], {}, "a text column holds a int"),
    "a missing text": ([{"text": None}, {"text": "w5"}], {}, "a text column holds a NoneType"),
    "an id too large": ([{"input_ids": [3, 61]}], {}, "token id 61, the model 61 tokens"),
    "a negative id": ([{"input_ids": [3, -100]}], {}, "token id -100"),
    "a row too long": ([{"input_ids": [3] * 49}], {}, "row of 49 tokens, the model's context is 48"),
    "rows too long": (TEXTS, {"context_length": 49}, r"rows of 49 tokens were asked for, and the model's context is 48\. Give 2 to 48"),
    "rows too short": (TEXTS, {"context_length": 1}, "rows of 1 tokens"),
    "no length": (TEXTS, {"context_length": 0}, "rows of 0 tokens"),
    "a number": (5, {}, "a int of"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("unchecked")
def test_faults(model, fault):
    data, settings, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        tokenize_dataset(data, model, **settings)


def test_texts_without_a_tokenizer():
    with pytest.raises(DataError, match="no tokenizer, so texts cannot be read"):
        tokenize_dataset(TEXTS, load_hf(make_hf("gpt2"), host="bridge"))


# --- rows that are there already: looked at by the column, with the errors of one look at each ---


class Rows:
    """As much of a dataset as `tokenize_dataset` needs, without Arrow: its rows are looked at one by one."""

    column_names = ("input_ids",)

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, name):
        return self.rows

    def select_columns(self, names):
        return self


def said(data, model):
    """What is wrong with the data, or None."""
    try:
        tokenize_dataset(data, model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


TOKENS_AS = {
    **{f"int{bits}": datasets.List(datasets.Value(f"int{bits}")) for bits in (8, 16, 32, 64)},
    "uint16": datasets.List(datasets.Value("uint16")),
    "large": datasets.LargeList(datasets.Value("int32")),
    "fixed": datasets.List(datasets.Value("int64"), length=3),
}


@pytest.mark.parametrize("kind", TOKENS_AS)
@pytest.mark.parametrize("bad", [None, 61, 127])
def test_columns_of_every_integer(model, kind, bad):
    rows = [[3, 4, 60]] * 1500 + [[5, 6, bad or 7]] + [[3, 99, 5]] * (bad is not None)
    data = datasets.Dataset.from_dict({"input_ids": rows}, datasets.Features({"input_ids": TOKENS_AS[kind]}))
    if bad is None:
        assert said(data, model) is None
        assert list(_suspects(data, 61, 48)) == []
    else:
        assert said(data, model).startswith(f"DataError: the dataset has the token id {bad}, the model 61 tokens.")
        assert [len(rows) for rows in _suspects(data, 61, 48)] == [502]


@given(st.lists(st.lists(st.sampled_from([3, 60, 3, 60, 3, 60, 61, -1]), max_size=7), min_size=1, max_size=4))
def test_errors_are_those_of_a_look_at_each_row(rows):
    model = SimpleNamespace(cfg=SimpleNamespace(d_vocab=61, n_ctx=5))
    data = datasets.Dataset.from_dict({"input_ids": rows}, datasets.Features({"input_ids": TOKENS_AS["int16"]}))
    assert said(data, model) == said(Rows(rows), model)


@pytest.mark.parametrize("rows", [[[3, 4], None], [[3, 4], [3, None]], [[3, 4], []], [[], []]], ids=str)
def test_what_is_missing_is_found_as_before(model, rows):
    data = datasets.Dataset.from_dict({"input_ids": rows}, datasets.Features({"input_ids": TOKENS_AS["int64"]}))
    assert said(data, model) == said(Rows(rows), model)
    assert said(data, model) is not None


def test_rows_that_an_index_picks(model):
    data = datasets.Dataset.from_dict({"input_ids": [[3, 4], [3, 61], [5, 6], [7], [8, 9]] * 600})
    good = [i for i in range(3000) if i % 5 not in (1, 3)]
    assert said(data.select(good), model) is None
    assert said(data.select(good).shuffle(seed=1), model) is None
    assert said(data.select([*good[:1200], 8]), model) == said(Rows([[7]]), model)
    assert said(data.select([*good, 1]).shuffle(seed=1), model) == said(Rows([[3, 61]]), model)
    assert said(data.select(range(2, 3)), model) is None


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_format_of_its_own(model, form):
    data = datasets.Dataset.from_dict({"input_ids": [[3, 4], [3, 61]]}).with_format(form)
    assert said(data, model) == said(Rows([[3, 61]]), model)
    got = tokenize_dataset(data.select([0]), model)
    assert got.format["type"] == form


def test_a_transform_is_what_is_looked_at(model):
    data = datasets.Dataset.from_dict({"input_ids": [[3, 4]]})
    changed = data.with_transform(lambda batch: {"input_ids": [[token + 58 for token in row] for row in batch["input_ids"]]})
    assert said(changed, model) == said(Rows([[61, 62]]), model)


def test_ids_that_are_no_integers_are_looked_at_one_by_one(model):
    data = datasets.Dataset.from_dict({"input_ids": [[3.0, 61.5]]})
    assert said(data, model) == said(Rows([[3.0, 61.5]]), model)


# --- batches ---


def test_collate_by_hand():
    batch = collate(
        [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [7, 8], "attention_mask": None}, {"input_ids": [9, 3, 0], "attention_mask": [1, 1, 0]}]
    )
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [7, 8, 0, 0], [9, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 5, 6], [-100, 8, -100, -100], [-100, 3, -100, -100]]


def test_collate_rows_that_are_padded_on_the_left():
    batch = collate([{"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}])
    assert batch["labels"].tolist() == [[-100, -100, -100, 6]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
