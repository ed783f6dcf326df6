"""The inverted index: for each code of a codebook, the positions at which it fires."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt, UInt32

from tl_codebook.store.counting import firing_counts
from tl_codebook.store.manifest import StoredBook, open_array

__all__ = ["build_index", "replace_array"]

_ENTRIES = 1 << 22
"""Slots of one group that are sorted at a time; each takes about 20 bytes of memory."""


def _runs(ids: UInt[np.ndarray, "token k"], n_codes: int) -> tuple[Int64[np.ndarray, " code_and_one"], UInt32[np.ndarray, " entry"]]:
    """Return the tokens at which each code fires, code after code and ascending, and where those of each code begin."""
    keys = ids.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(ids), dtype=np.uint64)[:, None]
    keys = keys.reshape(-1)
    keys.sort()
    fresh = np.empty(len(keys), dtype=bool)  # not the second slot of the position that holds the same code
    fresh[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=fresh[1:])
    keys = keys[fresh]
    offsets = np.searchsorted(keys, np.arange(n_codes + 1, dtype=np.uint64) << np.uint64(32)).astype(np.int64)
    return offsets, keys[: offsets[-1]].astype(np.uint32)  # n_codes itself stands for no code, and is left out


def build_index(folder: Path, book: StoredBook, n_tokens: int, *, entries: int = _ENTRIES) -> None:
    """Write the inverted index of one codebook from its ids, in bounded memory, each file in one step.

    Tokens are taken in parts. Where one part is all, its sorted slots are the index; otherwise the parts are counted first, and then what
    each part adds to each code goes to where the parts before it have left off.
    """
    shape = (n_tokens, book.n_groups, book.k)
    step = max(1, entries // book.k)
    parts = [(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step)]

    def part(start: int, stop: int, group: int) -> UInt[np.ndarray, "token k"]:
        # Opened anew each time: the pages of a map that stays open would count as memory of this process.
        return np.ascontiguousarray(open_array(folder / book.ids_file, book.dtype, shape)[start:stop, group])

    counts = np.zeros((book.n_groups, book.n_codes), dtype=np.int64)
    for group in range(book.n_groups):
        for start, stop in parts:
            counts[group] += firing_counts(part(start, stop, group)[:, None], book.n_codes)[0]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts.reshape(-1))])
    dtype = np.uint32 if n_tokens <= 1 << 32 else np.uint64
    begins = offsets[:-1].reshape(counts.shape).copy()

    def write(path: Path) -> None:
        for group in range(book.n_groups):
            for start, stop in parts:
                runs, tokens = _runs(part(start, stop, group), book.n_codes)
                _place(path, dtype, int(offsets[-1]), begins[group], runs, tokens, start)

    (folder / "index").mkdir(exist_ok=True)
    replace_array(folder / book.positions_file, dtype, (int(offsets[-1]),), write)
    replace_array(folder / book.offsets_file, np.int64, offsets.shape, lambda path: _fill(path, offsets))


def _place(
    path: Path,
    dtype: Any,
    n_entries: int,
    begins: Int64[np.ndarray, " code"],
    runs: Int64[np.ndarray, " code_and_one"],
    tokens: UInt32[np.ndarray, " entry"],
    first: int,
) -> None:
    """Write the positions of one part where those of each code go on, and move these places (`begins`) along."""
    if not len(tokens):
        return
    out = np.lib.format.open_memmap(path, mode="r+")
    lengths = np.diff(runs)
    for code in np.flatnonzero(lengths):
        at = int(begins[code])
        out[at : at + int(lengths[code])] = tokens[runs[code] : runs[code + 1]].astype(dtype) + dtype(first)
    begins += lengths


def _fill(path: Path, array: np.ndarray) -> None:
    np.lib.format.open_memmap(path, mode="r+")[...] = array


def replace_array(target: Path, dtype: Any, shape: tuple[int, ...], write: Any) -> None:
    """Let `write` fill a new array file of a size known beforehand, and put it in place in one step."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
        if np.prod(shape):
            write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
