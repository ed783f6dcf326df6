"""Tables of result rows: what is written is read back, and a spreadsheet runs nothing of it."""

import csv
import dataclasses
import os

import numpy as np
import pytest

from tl_codebook.describe.label_files import CodeLabel
from tl_codebook.errors import CheckpointError, CheckpointExistsError, DataError
from tl_codebook.store.search import CodeHit
from tl_codebook.store.tables import write_csv


@dataclasses.dataclass
class Row:
    text: object
    number: object = 0


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def written(tmp_path, *values):
    write_csv([Row(value, -1.5) for value in values], tmp_path / "rows.csv", overwrite=True)
    return [row[0] for row in read(tmp_path / "rows.csv")[1:]]


def test_hits(tmp_path):
    hits = [
        CodeHit("L0.z.1:3", 0, "z", 1, 0.1, 1 / 3, 0.2, 1e-20, 3, 30, 9),
        CodeHit("L0.mlp_out:7", 0, "mlp_out", None, 1.0, 0.5, 2 / 3, 0.0, 3, 3, 6),
    ]
    write_csv(hits, tmp_path / "hits.csv")
    head, *rows = read(tmp_path / "hits.csv")
    assert head == [field.name for field in dataclasses.fields(CodeHit)]
    assert rows[0][:4] == ["L0.z.1:3", "0", "z", "1"]
    assert rows[1][3] == ""  # no group
    assert [tuple(map(float, row[4:])) for row in rows] == [dataclasses.astuple(hit)[4:] for hit in hits]  # in full
    assert (tmp_path / "hits.csv").read_bytes().count(b"\n") == 3


def test_labels(tmp_path):
    write_csv([CodeLabel("L0.mlp_out:7", "comma", "token", 0.95, tokens=(3, 14))], tmp_path / "labels.csv")
    (row,) = (dict(zip(*pair, strict=True)) for pair in [read(tmp_path / "labels.csv")])
    assert (row["label"], row["text"], row["precision"], row["recall"], row["tokens"]) == ("L0.mlp_out:7", "comma", "0.95", "", "3 14")


@pytest.mark.parametrize(
    "text",
    [
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        '=HYPERLINK("http://x","y")',
        "=",
        "\uff1d1",
        "\uff0b1",
        "-",
    ],
)
def test_no_cell_begins_like_a_formula(text, tmp_path):
    assert written(tmp_path, text) == ["'" + text]
    assert written(tmp_path, [text]) == ["'" + text]


def test_heads_of_columns_are_the_fields(tmp_path):
    odd = dataclasses.make_dataclass("Odd", ["a", "b"])
    write_csv([odd("=1", [1, None])], tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv") == [["a", "b"], ["'=1", "1 "]]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (-3, "-3"),
        (-0.25, "-0.25"),
        (np.float32(-0.5), "-0.5"),
        (np.int64(-7), "-7"),
        (1e-300, "1e-300"),
        (0.1 + 0.2, "0.30000000000000004"),
        (float("inf"), "inf"),
        (None, ""),
        (True, "True"),
        ("-3", "'-3"),
        ("3", "3"),
        ((1, 2), "1 2"),
        ((-1, 2), "'-1 2"),
        ("", ""),
    ],
)
def test_numbers_stay_numbers(value, cell, tmp_path):
    assert written(tmp_path, value) == [cell]


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        '"><svg onload>',
        "a,b;c",
        'say "it"',
        "two\nlines",
        "cr\rlf\r\n.",
        "{{7*7}}",
        "naïve 汉字 🎉",
        " = 1",
        "no\u00a0break\u3000wide",
    ],
)
def test_other_text_is_kept(text, tmp_path):
    assert written(tmp_path, text, "next") == [text, "next"]


@pytest.mark.parametrize(
    ("text", "cell"),
    [("\x1b[31mred", r"\x1b[31mred"), ("a\0b", r"a\x00b"), ("\ud800", r"\ud800"), ("\x9b", r"\x9b"), ("a\u202eb\u200b", r"a\u202eb\u200b")],
)
def test_control_characters_are_written_out(text, cell, tmp_path):
    assert written(tmp_path, text) == [cell]


def test_no_rows(tmp_path):
    with pytest.raises(DataError, match="of=CodeHit"):
        write_csv([], tmp_path / "rows.csv")
    write_csv([], tmp_path / "rows.csv", of=Row)
    assert (tmp_path / "rows.csv").read_text() == "text,number\n"


def test_a_row_of_one_empty_cell_is_a_row(tmp_path):
    one = dataclasses.make_dataclass("One", ["a"])
    write_csv([one(None), one("x"), one("")], tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv") == [["a"], [""], ["x"], [""]]


@pytest.mark.parametrize("rows", [[{"a": 1}], [1], [Row("a"), CodeLabel("L0.z.0:1", "a")], [Row]])
def test_rows_that_are_none(rows, tmp_path):
    with pytest.raises(DataError, match="dataclasses of one type"):
        write_csv(rows, tmp_path / "rows.csv")
    assert not list(tmp_path.iterdir())


def test_paths(tmp_path):
    (tmp_path / "there.csv").write_text("old")
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        write_csv([Row("a")], tmp_path / "there.csv")
    for path in (tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300), tmp_path / "there.csv" / "inside.csv"):
        with pytest.raises(CheckpointError):
            write_csv([Row("a")], path)
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "there.csv")
    write_csv([Row("a")], link, overwrite=True)
    assert not link.is_symlink()
    assert (tmp_path / "there.csv").read_text() == "old"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_csv([Row("a")], tmp_path / "rows.csv")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_csv([Row("b")], tmp_path / "rows.csv", overwrite=True)
    assert read(tmp_path / "rows.csv")[1] == ["a", "0"]
    assert len(list(tmp_path.iterdir())) == 1
