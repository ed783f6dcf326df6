"""What a store holds, file by file, and how its files are opened without believing them.

A store is a folder: ``manifest.json``, the tokens as a Hugging Face dataset (``tokens/``), one memory-mapped array of ids a site
(``ids/``), where each sequence starts (``starts.npy``), which positions are no text (``flags.npy``), and an inverted index (``index/``).
The manifest is written last: a folder without it is an unfinished collection.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_codebook import files
from tl_codebook.errors import CheckpointError, ConfigError, UnknownHookError, nearest
from tl_codebook.names import Address, hook_name, split_hook_name

__all__ = [
    "AGAIN",
    "FLAGS",
    "FORMAT",
    "MANIFEST",
    "PROGRESS",
    "STARTS",
    "STATE",
    "TOKENS",
    "VERSION",
    "StoredBook",
    "check_files",
    "codes_sha256",
    "differences",
    "expected_files",
    "find_book",
    "holds_store",
    "open_array",
    "read_manifest",
    "stored_book",
]

FORMAT, VERSION = "tl_codebook.store", 1
MANIFEST, PROGRESS, STARTS, FLAGS, TOKENS = "manifest.json", "progress.json", "starts.npy", "flags.npy", "tokens"
STATE, INFO = f"{TOKENS}/state.json", f"{TOKENS}/dataset_info.json"
AGAIN = "Copy the store again, or collect it again."
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,47}")
_FIELDS = {"format", "version", "n_sequences", "n_tokens", "context_length", "model", "codes_sha256", "sites", "tokenizer", "complete"}


@dataclass(frozen=True)
class StoredBook:
    """One codebook of a store: its sizes, and what its files are called."""

    hook_name: str
    n_codes: int
    n_groups: int
    k: int
    label: str
    """Its address, such as ``L3.mlp_out``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the smallest unsigned integer that holds every id, and `n_codes` for no code."""
        return np.dtype(np.min_scalar_type(self.n_codes))

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes that the ids of one position take."""
        return self.n_groups * self.k * self.dtype.itemsize

    @property
    def ids_file(self) -> str:
        """Return the file of the ids, [token, group, k]."""
        return f"ids/{self.label}.npy"

    @property
    def offsets_file(self) -> str:
        """Return the file that says where the positions of each code begin."""
        return f"index/{self.label}.offsets.npy"

    @property
    def positions_file(self) -> str:
        """Return the file of the positions, code after code."""
        return f"index/{self.label}.positions.npy"

    def described(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {"n_codes": self.n_codes, "n_groups": self.n_groups, "k": self.k, "dtype": self.dtype.name}


def stored_book(hook_name: str, n_codes: int, n_groups: int, k: int) -> StoredBook:
    """Describe the codebook of a hook point, refusing names and sizes that no store may have.

    >>> stored_book("blocks.3.hook_mlp_out", 256, 1, 8).label
    'L3.mlp_out'
    """
    layer, site = split_hook_name(hook_name)
    label = str(Address(layer, site))
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"a codebook sits at {hook_name!r}, which no file may name: A-Z a-z 0-9 . _ - and at most 48 characters.")
    return StoredBook(hook_name, n_codes, n_groups, k, label)


def codes_sha256(codes: torch.Tensor) -> str:
    """Return the hash of the bytes of a codes tensor.

    >>> codes_sha256(torch.zeros(1, 2, 3))[:12]
    '9d908ecfb6b2'
    """
    raw = codes.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def holds_store(folder: Path) -> bool:
    """Tell whether a folder holds a store, finished or not, that an earlier collection wrote and that may be replaced."""
    for name, of in ((MANIFEST, FORMAT), (PROGRESS, f"{FORMAT}.unfinished")):
        if (folder / name).is_file():
            try:
                return files.read_json(folder / name, again=AGAIN).get("format") == of
            except CheckpointError:
                return False
    return False


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """List in what two descriptions of a collection differ, a line each; of nested ones only the parts that do."""
    found = []
    for key in keys:
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{key}.{line}" for line in differences(before, after, sorted(before.keys() | after.keys()))]
        elif before != after:
            found.append(f"{key}: {str(before)[:60]} then, {str(after)[:60]} now")
    return found


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, StoredBook]]:
    """Read the manifest of a store and check every field that the files depend on.

    Raises:
        CheckpointError: there is no store, an unfinished one, one of a newer release, or a damaged manifest.
    """
    path = folder / MANIFEST
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{str(folder)[:200]!r} is no name of a folder ({error.strerror}). Choose another.") from error
    if not is_folder:
        raise CheckpointError(f"{folder} is no folder. Give one that collect_codes wrote.")
    if not path.is_file():
        if (folder / PROGRESS).is_file():
            raise CheckpointError(f"{folder} is an unfinished collection. Finish it with collect_codes(..., resume=True).")
        raise CheckpointError(f"{folder} holds no {MANIFEST}, so it is no store. Give a folder that collect_codes wrote.")
    files.resolve(folder, MANIFEST)
    manifest = files.read_json(path, again=AGAIN)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of the format {manifest.get('format')!r:.60}, not {FORMAT!r}. Give a folder of collect_codes.")
    version: Any = manifest.get("version")
    if not _whole(version, 1):
        raise CheckpointError(f"{path}: its version is {version!r:.60}. {AGAIN}")
    if version > VERSION:
        raise CheckpointError(f"{path} is of version {version}, this release reads {VERSION}. Use the release that wrote it.")
    missing = sorted(_FIELDS - manifest.keys())
    if missing or manifest["complete"] is not True:
        raise CheckpointError(f"{path} is not complete ({f'missing: {missing}' if missing else 'it says so itself'}). {AGAIN}")
    for key, least in (("n_sequences", 1), ("n_tokens", 1), ("context_length", 1)):
        if not _whole(manifest[key], least):
            raise CheckpointError(f"{path}: {key} is {manifest[key]!r:.60}, not a whole number >= {least}. {AGAIN}")
    sites = manifest["sites"]
    if not isinstance(sites, dict) or not sites:
        raise CheckpointError(f"{path}: its sites are {sites!r:.60}. {AGAIN}")
    books = {name: _read_book(path, name, entry) for name, entry in sites.items()}
    hashes = manifest["codes_sha256"]
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise CheckpointError(f"{path}: codes_sha256 is {hashes!r:.60}, not a hash for each site. {AGAIN}")
    return manifest, books


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _read_book(path: Path, name: str, entry: Any) -> StoredBook:
    if not isinstance(entry, dict) or not all(_whole(entry.get(key), 1) for key in ("n_codes", "n_groups", "k")):
        raise CheckpointError(f"{path}: the site {name!r:.80} is described as {entry!r:.120}. {AGAIN}")
    try:
        book = stored_book(name, entry["n_codes"], entry["n_groups"], entry["k"])
        layer, site = split_hook_name(name)
    except ValueError as error:  # LabelError, ConfigError: a name that reaches out of the folder among them
        raise CheckpointError(f"{path}: {error} {AGAIN}") from None
    if hook_name(layer, site) != name:  # blocks.00: another name for the files of blocks.0
        raise CheckpointError(f"{path}: the site {name!r:.80} is written {hook_name(layer, site)!r}. {AGAIN}")
    if entry.get("dtype") != book.dtype.name:
        raise CheckpointError(
            f"{path}: the ids of {name!r} are {entry.get('dtype')!r:.20}, {book.n_codes} codes need {book.dtype}. {AGAIN}"
        )
    return book


def expected_files(manifest: Mapping[str, Any], books: Mapping[str, StoredBook]) -> dict[str, int | None]:
    """Return the files of a store, and the bytes of the array in each where the manifest says them."""
    n_tokens = int(manifest["n_tokens"])
    expected: dict[str, int | None] = {STARTS: 8 * (int(manifest["n_sequences"]) + 1), FLAGS: n_tokens, STATE: None, INFO: None}
    for book in books.values():
        expected[book.ids_file] = n_tokens * book.bytes_per_token
        expected[book.offsets_file] = 8 * (book.n_groups * book.n_codes + 1)
        expected[book.positions_file] = None
    return expected


def check_files(folder: Path, expected: Mapping[str, int | None]) -> None:
    """Raise unless every file is there, inside the folder, and as long as its array at least."""
    for top in sorted({name.split("/")[0] for name in expected}):
        files.resolve(folder, top)
    for name, n_bytes in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. The copy is incomplete: copy it again.")
        size = path.stat().st_size
        if n_bytes is not None and size <= n_bytes:
            raise CheckpointError(f"{path} is incomplete: it has {size} bytes, its array alone takes {n_bytes}. {AGAIN}")


def open_array(path: Path, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Map an array file into memory, read-only; whatever is not the expected array is refused before anything is allocated.

    Raises:
        CheckpointError: no file, a truncated one, one that would need a pickle, another dtype or shape (None stands for any length).

    >>> np.save(tmp_path / "a.npy", np.arange(3, dtype=np.uint8))
    >>> open_array(tmp_path / "a.npy", np.uint8, (3,))
    memmap([0, 1, 2], dtype=uint8)
    """
    if not path.is_file():  # a pipe of that name would be waited for
        raise CheckpointError(f"{path} is missing. The copy is incomplete: copy it again.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what numpy raises for a header it cannot read is not documented
        raise CheckpointError(f"{path} is damaged or incomplete ({error}; {path.stat().st_size} bytes). {AGAIN}") from error
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"{path} is an archive, not an array. {AGAIN}")
    fits = array.ndim == len(shape) and all(length in (None, found) for length, found in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise CheckpointError(f"{path} holds {array.dtype} {array.shape}, the manifest asks for {np.dtype(dtype)} ({wanted}). {AGAIN}")
    return array


def find_book(books: Mapping[str, StoredBook], site: Any) -> StoredBook:
    """Return the codebook that a hook name or an address without a group (``L3.mlp_out``) means."""
    for book in books.values():
        if site in (book.hook_name, book.label):
            return book
    known = [book.label for book in books.values()]
    raise UnknownHookError(f"no codebook of {str(site)[:80]!r} is in the store. {nearest(str(site), known)}It has: {', '.join(known)}.")
