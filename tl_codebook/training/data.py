"""From texts to rows of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_codebook.errors import DataError

__all__ = ["collate", "load_dataset_from", "tokenize_dataset"]


def load_dataset_from(source: str | Path, split: str = "train") -> Any:
    """Load a Hugging Face dataset from a hub name, a folder, or a .jsonl, .json, .csv, .parquet or .txt file.

    A .txt file is one document; in a folder of .txt files each file is one.

    Raises:
        DataError: there is no such file, or nothing in it.

    >>> _ = (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time"}')
    >>> load_dataset_from(tmp_path / "texts.jsonl")["text"][0]
    'Once upon a time'
    """
    import datasets

    path = Path(source)
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_file() and path.suffix == ".txt":
            data = datasets.Dataset.from_dict({"text": [path.read_text(encoding="utf-8")]})
        elif path.is_file():
            if path.suffix not in readers:
                raise DataError(f"{path} is of a kind that is not read. Give .txt, .jsonl, .json, .csv or .parquet.")
            data = datasets.load_dataset(readers[path.suffix], data_files=str(path), split="train")
        elif path.is_dir() and (path / "dataset_info.json").is_file():
            data = datasets.load_from_disk(str(path))
        elif path.is_dir() and any(path.glob("*.txt")):
            texts = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
            data = datasets.Dataset.from_dict({"text": texts})
        else:
            data = datasets.load_dataset(str(source), split=split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"no dataset could be loaded from {str(source)!r} ({error}). Give a file, a folder or a hub name.") from error
    if len(data) == 0:
        raise DataError(f"the dataset {str(source)!r} is empty.")
    return data


def tokenize_dataset(data: Any, model: Any, *, context_length: int | None = None, text_column: str = "text") -> Any:
    """Turn texts, or token ids, into a dataset of rows of `context_length` tokens, documents end to end, each with its BOS.

    Args:
        data: A Hugging Face dataset with a text column or an ``input_ids`` column, a list of strings, or a list of rows.
        model: The host whose tokenizer, vocabulary and context length count.
        context_length: Tokens in a row; by default the model's context, at most 512.
        text_column: Where the texts are.

    Returns:
        A `datasets.Dataset` with ``input_ids`` and ``attention_mask``; rows of given ``input_ids`` stay as they are.

    Raises:
        DataError: no text, no tokens, a token id outside the vocabulary, a row longer than the context.

    >>> tokenize_dataset(["w3 w4", "w5 w6 w7"], model, context_length=4)["input_ids"][0]  # 1 is the BOS
    [1, 3, 4, 1]
    """
    import datasets

    limit = int(getattr(model.cfg, "n_ctx", 0) or 0)
    length = min(limit or 512, 512) if context_length is None else context_length
    if length < 2 or (limit and length > limit):
        raise DataError(f"rows of {length} tokens were asked for, and the model's context is {limit}. Give 2 to {limit}.")
    if isinstance(data, Sequence) and data and isinstance(data[0], str):
        data = datasets.Dataset.from_dict({text_column: list(data)})
    elif isinstance(data, Sequence) and data and isinstance(data[0], Mapping):
        data = datasets.Dataset.from_list([dict(row) for row in data])
    columns = getattr(data, "column_names", None)
    if columns is None or len(data) == 0:
        raise DataError(
            f"a {type(data).__name__} of {len(data) if hasattr(data, '__len__') else '?'} rows was given. Give a dataset or texts."
        )
    if "input_ids" in columns:
        return _checked(data.select_columns([c for c in columns if c in ("input_ids", "attention_mask")]), model, limit)
    if text_column not in columns:
        raise DataError(f"the dataset has no column {text_column!r}; its columns are {columns}. Say text_column=...")
    if getattr(model, "tokenizer", None) is None:
        raise DataError(
            "the model has no tokenizer, so texts cannot be read. Give a dataset with input_ids, or load one with its tokenizer."
        )

    def rows() -> Iterator[dict[str, list[int]]]:
        buffer: list[int] = []
        for document in _tokenized(data[text_column], model.tokenizer):
            buffer += document
            while len(buffer) >= length:
                yield {"input_ids": buffer[:length], "attention_mask": [1] * length}
                buffer = buffer[length:]
        if len(buffer) > 1:
            pad = getattr(model.tokenizer, "pad_token_id", None) or 0
            missing = length - len(buffer)
            yield {"input_ids": buffer + [pad] * missing, "attention_mask": [1] * len(buffer) + [0] * missing}

    packed = datasets.Dataset.from_list(list(rows()))
    if len(packed) == 0:
        raise DataError("the dataset holds no text of two tokens or more.")
    return _checked(packed, model, limit)


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [] if bos is None else [bos]
    for batch in itertools.batched(texts, 256) if hasattr(itertools, "batched") else _batched(texts, 256):
        wrong = [text for text in batch if not isinstance(text, str)]
        if wrong:
            raise DataError(f"a text column holds a {type(wrong[0]).__name__}. Give strings.")
        for ids in tokenizer(list(batch), add_special_tokens=False, verbose=False)["input_ids"]:
            if ids:
                yield start + list(ids)


def _batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _checked(data: Any, model: Any, limit: int) -> Any:
    vocabulary = int(model.cfg.d_vocab)
    for rows in _suspects(data, vocabulary, limit):
        for row in rows:
            if len(row) < 2:
                raise DataError(
                    f"the dataset has a row of {len(row)} tokens, in which nothing predicts anything. Give rows of two or more."
                )
            if max(row) >= vocabulary or min(row) < 0:
                bad = max(row) if max(row) >= vocabulary else min(row)
                raise DataError(
                    f"the dataset has the token id {bad}, the model {vocabulary} tokens. Tokenise with the model's own tokenizer."
                )
            if limit and len(row) > limit:
                raise DataError(f"the dataset has a row of {len(row)} tokens, the model's context is {limit}. Cut the rows.")
    return data


def _suspects(data: Any, vocabulary: int, limit: int, n_rows: int = 1000) -> Iterator[Iterable[Any]]:
    """Return the rows that have to be looked at one by one: of a dataset in Arrow only the batches in which something is wrong."""
    import datasets

    # A transform makes the rows when they are read; what lies in Arrow is something else.
    if not isinstance(data, datasets.Dataset) or data.format["type"] == "custom":
        yield data["input_ids"]
        return
    table = data.select_columns(["input_ids"]).with_format("arrow")
    for start in range(0, len(table), n_rows):
        column = table[start : start + n_rows].column("input_ids")
        if not _sound(column, vocabulary, limit):
            yield column.to_pylist()


def _sound(column: Any, vocabulary: int, limit: int) -> bool:
    """Tell whether a column of Arrow holds nothing but lists of two tokens to `limit`, every one in the vocabulary."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type) or column.null_count:
        return False
    tokens, lengths = pc.list_flatten(column), pc.min_max(pc.list_value_length(column))
    ids = pc.min_max(tokens)
    if tokens.null_count or not ids["min"].is_valid:
        return False
    longest = lengths["max"].as_py()
    return bool(
        lengths["min"].as_py() >= 2 and (not limit or longest <= limit) and 0 <= ids["min"].as_py() <= ids["max"].as_py() < vocabulary
    )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows, padded on the right; labels are the tokens, with -100 at padding and at the first position (nothing predicts it)."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.as_tensor(row["input_ids"])
        mask[i, :n] = torch.as_tensor(row["attention_mask"]) if row.get("attention_mask") is not None else 1
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(-1, keepdim=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.scatter(1, first, -100)}
