"""From datasets, files and iterables to sequences of tokens, in an order that an interrupted collection finds again."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32

from tl_codebook.errors import DataError

__all__ = ["Documents", "Place", "SequenceSource", "open_documents"]

_TEXT_PIECE = 1 << 20
"""Characters of a text file that make one document, if it has more: its tokens are made in memory."""
_BATCH, _BATCH_CHARACTERS = 256, 1 << 20
"""Documents, and characters, that the tokenizer gets at a time."""


@dataclass
class Documents:
    """Texts or rows of token ids, one after the other, and how many there are (None where nobody knows)."""

    items: Iterable[Any]
    n: int | None


def open_documents(dataset: Any, column: str = "text") -> Documents:
    """Return the documents of a dataset, a file, or an iterable of texts or of rows of token ids.

    Raises:
        DataError: something else; a dataset of several splits, without the column, or empty.

    >>> list(open_documents(["w3 w4", "w5"]).items)
    ['w3 w4', 'w5']
    """
    if isinstance(dataset, str | Path):
        return _of_file(Path(dataset).expanduser(), dataset, column)
    if isinstance(dataset, Mapping):
        known = ", ".join(map(repr, list(dataset)[:5]))
        raise DataError(f"a {type(dataset).__name__} of {known} was given. Give one of them, such as dataset[{next(iter(dataset), '')!r}].")
    if isinstance(dataset, torch.Tensor | np.ndarray):
        if isinstance(dataset, torch.Tensor) and (dataset.layout != torch.strided or dataset.is_meta):
            raise DataError(f"a tensor of the layout {dataset.layout} on {dataset.device} was given. Give a dense one that holds its ids.")
        n_rows = len(dataset) if dataset.ndim else 1
        whole = dataset.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) or str(dataset.dtype).startswith(("int", "uint"))
        if dataset.ndim != 2 or not whole:
            raise DataError(f"{dataset.dtype} {tuple(dataset.shape)} was given. Give whole token ids, [row pos].")
        rows = dataset.detach().cpu() if isinstance(dataset, torch.Tensor) else dataset
        return Documents((np.asarray(row) for row in rows), _some(n_rows, dataset))
    if hasattr(dataset, "iter") and hasattr(dataset, "features"):
        return _of_dataset(dataset, column)
    if not isinstance(dataset, Iterable) or isinstance(dataset, bytes):
        raise DataError(f"a {type(dataset).__name__} was given. Give a dataset, the path of a text file, texts, or rows of token ids.")
    n = _some(len(dataset), dataset) if isinstance(dataset, Sized) else None
    return Documents((_item(item, column, i) for i, item in enumerate(dataset)), n)


def _some(n: int, what: Any) -> int:
    if n == 0:
        raise DataError(f"the {type(what).__name__} is empty. Give at least one document.")
    return n


def _of_file(path: Path, given: Any, column: str) -> Documents:
    from tl_codebook.training.data import load_dataset_from

    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        raise DataError(
            f"{str(given)[:80]!r} is no name of a file ({error}). Give a file, a folder, a hub name, or a list of texts."
        ) from error
    if is_file and path.suffix in (".txt", ".jsonl") and path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Give a file with text.")
    if is_file and path.suffix == ".txt":
        return Documents(_text_pieces(path), max(1, path.stat().st_size // _TEXT_PIECE))
    if is_file and path.suffix == ".jsonl":
        with open(path, "rb") as file:
            n = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return Documents(_json_lines(path, column), max(1, n))
    return _of_dataset(load_dataset_from(given), column)


def _text_pieces(path: Path) -> Iterator[str]:
    """Read a text file as one document, or as several that end with a line where it is long."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while piece := file.read(_TEXT_PIECE):
                yield piece + (file.readline() if len(piece) == _TEXT_PIECE else "")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}). Give a text in UTF-8.") from error


def _json_lines(path: Path, column: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number + 1} is no JSON ({error}). Give one JSON object a line.") from error
            yield _item(row, column, number)


def _of_dataset(dataset: Any, column: str) -> Documents:
    columns = dataset.column_names
    if columns is not None:
        _column_of(columns, column)
    n = _some(len(dataset), dataset) if hasattr(dataset, "__len__") else None

    def rows() -> Iterator[Any]:
        number = 0
        for batch in dataset.iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield _item(dict(zip(batch, values, strict=True)), column, number)
                number += 1

    return Documents(rows(), n)


def _column_of(columns: Iterable[str], column: str) -> str:
    """Return the column to read: token ids come before texts, unless another column than ``text`` was asked for."""
    columns = list(columns)
    chosen = "input_ids" if column == "text" and "input_ids" in columns else column
    if chosen not in columns:
        raise DataError(f"the dataset has no column {column!r}; its columns are {columns}. Say column=...")
    return chosen


def _item(item: Any, column: str, number: int) -> Any:
    mask = None
    if isinstance(item, Mapping):
        chosen = _column_of(item, column)
        mask = item.get("attention_mask") if chosen == "input_ids" else None
        item = item[chosen]
    if isinstance(item, str):
        return item
    try:
        ids = np.asarray(item)
    except (TypeError, ValueError, RuntimeError):
        ids = np.empty(0, dtype=object)
    if item is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        kind = type(item).__name__ if ids.ndim == 0 or ids.dtype.kind == "O" else f"{ids.dtype} {ids.shape}"
        raise DataError(f"document {number} is a {kind}. Give texts, or rows of whole token ids.")
    return ids if mask is None else _without_padding(ids, mask, number)


def _without_padding(ids: np.ndarray, mask: Any, number: int) -> np.ndarray:
    """Take off what the mask marks by 0 at either end; an additive mask (0 for text) or one with a hole is no mask of padding."""
    try:
        values = np.asarray(mask)
    except (TypeError, ValueError, RuntimeError):
        values = np.empty(0, dtype=object)
    if values.shape != ids.shape or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise DataError(
            f"document {number} has {len(ids)} tokens and the attention_mask {str(mask)[:60]!r}. Give 1 for each token, 0 for padding."
        )
    kept = np.flatnonzero(values)
    if len(kept) and kept[-1] - kept[0] >= len(kept):
        raise DataError(
            f"document {number} has an attention_mask with 0 between tokens, which would put tokens together that are not. Give padding "
            "at the ends only."
        )
    return ids[kept]


@dataclass
class Place:
    """How far a source was read: documents used up, sequences made of the next one, and the hash of the documents so far."""

    documents: int = 0
    pieces: int = 0
    digest: str = ""


class SequenceSource:
    """Makes sequences of at most `length` tokens from documents, each with its BOS, none with parts of two documents.

    Args:
        documents: What `open_documents` gave.
        length: Most tokens of a sequence.
        tokenizer: What turns texts into tokens; None where documents are rows of token ids.
        vocabulary: Number of tokens that the model knows.
        n_tokens: Tokens to make in all, the last sequence cut to measure; None for all.
    """

    def __init__(self, documents: Documents, *, length: int, tokenizer: Any, vocabulary: int, n_tokens: int | None) -> None:
        self.documents, self.length, self.tokenizer, self.vocabulary, self.n_tokens = documents, length, tokenizer, vocabulary, n_tokens
        self.place, self.taken, self.pending = Place(), 0, 0
        self._items = iter(documents.items)
        self._stream: Iterator[Int32[np.ndarray, " _"]] | None = None

    def resume(self, place: Place, taken: int) -> None:
        """Go on where an earlier source had come to, after proving that the documents up to there are the same.

        Raises:
            DataError: they are not.
        """
        before = digest = ""
        item: Any = None
        for number in range(place.documents + (place.pieces > 0)):
            item = next(self._items, None)
            before, digest = digest, "" if item is None else _chained(digest, item, number)
            if item is None:
                break
        if digest != place.digest:
            raise DataError(
                f"the dataset is not the one that was being collected: its first {place.documents + (place.pieces > 0)} documents differ. "
                "Give the same dataset, or start again with overwrite=True."
            )
        self.taken, self.place = taken, Place(place.documents, 0, digest)
        if place.pieces:  # the last of them was begun only
            self.place, self._items = Place(place.documents, 0, before), itertools.chain([item], self._items)
        self._stream = self._pieces(skip=place.pieces)

    def take(self, n: int) -> list[Int32[np.ndarray, " _"]]:
        """Return the next sequences, `n` tokens of them or a few more; none where there are no more.

        Raises:
            DataError: a document that cannot be read, or a token that the model does not know.
        """
        self._stream = self._pieces() if self._stream is None else self._stream
        rows: list[Int32[np.ndarray, " _"]] = []
        total = 0
        while total < n and (self.n_tokens is None or self.taken < self.n_tokens):
            row = next(self._stream, None)
            if row is None:
                break
            if self.n_tokens is not None:
                row = row[: self.n_tokens - self.taken]
            rows.append(row)
            total += len(row)
            self.taken += len(row)
        return rows

    @property
    def expected(self) -> int | None:
        """Return about how many tokens there will be in all, judged by those taken so far; None where nobody knows."""
        if self.documents.n is None or not self.taken:
            return self.n_tokens
        begun = self.place.documents + (self.pending > 0)
        about = int((self.taken + self.pending) * max(1.0, self.documents.n / max(begun, 1)))
        return about if self.n_tokens is None else min(about, self.n_tokens)

    def _pieces(self, skip: int = 0) -> Iterator[Int32[np.ndarray, " _"]]:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        for item, ids in self._tokenized():
            if isinstance(item, str) and bos is not None and (not isinstance(bos, int) or not 0 <= bos < self.vocabulary):
                raise DataError(
                    f"the tokenizer begins texts with the token {bos!r}, the model has {self.vocabulary}. Give the model's own tokenizer."
                )
            start = [] if bos is None or not isinstance(item, str) else [bos]
            room = self.length - len(start)
            number = self.place.documents
            if not isinstance(item, str):
                self._check_row(ids, number)
            self._check_vocabulary(ids, number)
            digest = _chained(self.place.digest, item, number)
            n_pieces = -(-len(ids) // room)
            for piece in range(n_pieces):
                self.place = Place(number + 1, 0, digest) if piece == n_pieces - 1 else Place(number, piece + 1, digest)
                self.pending = max(0, len(ids) - (piece + 1) * room)
                if piece >= skip:
                    yield np.concatenate([np.array(start, dtype=np.int32), ids[piece * room : (piece + 1) * room]]).astype(np.int32)
            if not n_pieces:
                self.place = Place(number + 1, 0, digest)
            skip = 0

    def _tokenized(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Give documents with their tokens; texts go through the tokenizer many at a time."""
        batch: list[str] = []
        characters = 0
        for item in self._items:
            if isinstance(item, str):
                batch.append(item)
                characters += len(item)
                if len(batch) < _BATCH and characters < _BATCH_CHARACTERS:
                    continue
            yield from self._encoded(batch)
            batch, characters = [], 0
            if not isinstance(item, str):
                yield item, np.asarray(item)
        yield from self._encoded(batch)

    def _encoded(self, texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        if texts and self.tokenizer is None:
            raise DataError("texts were given, but the model has no tokenizer. Give tokenizer=..., or rows of token ids.")
        for number, text in enumerate(texts, start=self.place.documents):
            _text_bytes(text, number)
        if texts:
            rows = self.tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]
            for text, ids in zip(texts, rows, strict=True):
                yield text, np.asarray(ids, dtype=np.int64)

    def _check_row(self, ids: np.ndarray, number: int) -> None:
        if not len(ids):
            raise DataError(f"document {number} has no tokens. Leave such rows out.")
        if len(ids) > self.length:
            raise DataError(f"document {number} has {len(ids)} tokens, a sequence at most {self.length}. Cut the rows.")

    def _check_vocabulary(self, ids: np.ndarray, number: int) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary):
            bad = int(ids.max()) if ids.max() >= self.vocabulary else int(ids.min())
            raise DataError(
                f"document {number} has the token id {bad}, the model {self.vocabulary} tokens. Tokenise with the model's own tokenizer."
            )


def _text_bytes(text: str, number: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"document {number} has {text[error.start]!r} at character {error.start}, half of a surrogate pair, which is no text. Decode "
            "it properly, or with errors='replace'."
        ) from None


def _chained(digest: str, item: Any, number: int) -> str:
    """Return the hash of the documents so far and one more."""
    raw = _text_bytes(item, number) if isinstance(item, str) else np.asarray(item).astype(np.int64).tobytes()
    kind = b"text" if isinstance(item, str) else b"ids"
    return hashlib.sha256(digest.encode() + kind + hashlib.sha256(raw).digest()).hexdigest()
