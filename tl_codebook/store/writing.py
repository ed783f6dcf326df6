"""An unfinished store: files that only grow, and a note of how far each is good.

Every window of sequences is appended to the files, then ``progress.json`` is replaced in one step. A process killed in between leaves bytes
after the noted end, which the next one cuts off; so an interrupted collection that goes on writes the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, Int32

from tl_codebook import files
from tl_codebook.errors import CheckpointError
from tl_codebook.store.manifest import FLAGS, FORMAT, PROGRESS, STARTS, STATE, StoredBook
from tl_codebook.store.sequences import Place

__all__ = ["ARROW", "LOCK", "GrowingStore", "check_links", "is_leftover", "remove_store", "shard_folder", "sole_writer"]

ARROW = "tokens/data-00000-of-00001.arrow"
WINDOWS, SHARDS, LOCK = "windows.bin", "shards", "writing.lock"
_LEFTOVER = re.compile(r"\.(.+\.(json|npy)(\..+)?\.tmp|trial-[0-9a-f]+)")
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the lock file of a folder, or raise at once where another process holds it; the system ends the lock of one that was killed.

    Raises:
        CheckpointError: another process collects into the folder, or the lock file is none.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:  # a folder or a link of that name among them
            raise CheckpointError(f"{path} cannot be used as a lock ({error.strerror or error}). Remove it, or choose another.") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{path} is no ordinary file, which a lock has to be. Remove it, or choose another folder.")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise CheckpointError(
                f"{folder} is in use: process {holder or '(unknown)'} collects into it. Wait until it has ended, or choose another folder."
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its holder removed the file between our open and our lock: this is not the file of that name any more
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Tell whether a file is a temporary one that a killed process has left."""
    return _LEFTOVER.fullmatch(name) is not None


def _remove_leftovers(folder: Path) -> None:
    for place in (folder, folder / "tokens", folder / "index"):
        for path in place.iterdir() if place.is_dir() and not place.is_symlink() else ():
            if is_leftover(path.name):
                path.unlink(missing_ok=True)


def remove_store(folder: Path) -> None:
    """Remove the files of a store, finished or not, its manifest first; other files in the folder stay."""
    _remove_leftovers(folder)
    for name in ("manifest.json", PROGRESS, STARTS, FLAGS, WINDOWS, "vocabulary.bytes.npy", "vocabulary.offsets.npy"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tokens", "ids", "index", SHARDS):
        path = folder / name
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def check_links(folder: Path) -> None:
    """Raise where a folder of an unfinished store leads elsewhere: going on with it would write there.

    Raises:
        CheckpointError: one does.
    """
    for name in ("tokens", "ids", "index", SHARDS):
        if os.path.lexists(folder / name):
            files.resolve(folder, name)


def shard_folder(folder: Path, index: int, count: int) -> Path:
    """Return where one of several processes collects its windows; a single one does it in the store's own folder."""
    return folder if count == 1 else folder / SHARDS / f"{index}-of-{count}"


class GrowingStore:
    """The files of an unfinished store, open for appending.

    Args:
        folder: Where they are.
        books: The codebooks whose ids are collected.
        asked: What is being collected, as the manifest will say.
    """

    def __init__(self, folder: Path, books: Sequence[StoredBook], asked: Mapping[str, Any]) -> None:
        self.folder, self.books, self.asked = folder, list(books), dict(asked)
        self.n_sequences = self.n_tokens = 0
        self.window, self.taken, self.place = 0, 0, Place()
        """The window that comes next, the tokens before it (of all processes), and where the source stood."""
        self._files: dict[str, BinaryIO] = {}

    @property
    def _arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return the dtype and shape of each array file as it is now."""
        arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            STARTS: (np.dtype(np.int64), (self.n_sequences + 1,)),
            FLAGS: (np.dtype(np.uint8), (self.n_tokens,)),
        }
        return arrays | {book.ids_file: (book.dtype, (self.n_tokens, book.n_groups, book.k)) for book in self.books}

    def start(self) -> None:
        """Begin with empty files; the note comes first, for by it the folder is known to be ours."""
        self._note({})
        with self._told():
            for name in ("ids", "tokens"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            for name, (dtype, shape) in self._arrays.items():
                self._files[name] = self._new(name, _header(dtype, shape))
            self._files[STARTS].write(np.zeros(1, dtype=np.int64).tobytes())
            self._files[ARROW] = self._new(ARROW, _schema().serialize().to_pybytes())
            self._files[WINDOWS] = self._new(WINDOWS, b"")
        self.commit()

    def _new(self, name: str, start: bytes) -> BinaryIO:
        (self.folder / name).unlink(missing_ok=True)
        file = open(self.folder / name, "x+b")  # noqa: SIM115
        file.write(start)
        return file

    def read_progress(self) -> dict[str, Any]:
        """Return the note of how far the files are good.

        Raises:
            CheckpointError: there is none that can be used.
        """
        path = self.folder / PROGRESS
        note = files.read_json(path, again="Start again with overwrite=True.")
        kinds = {"format": str, "version": int, "asked": dict, "window": int, "taken": int, "documents": int, "pieces": int}
        kinds |= {"digest": str, "n_sequences": int, "n_tokens": int, "bytes": dict}
        wrong = [key for key, kind in kinds.items() if type(note.get(key)) is not kind or (kind is int and note[key] < 0)]
        if not wrong:
            wrong = [name for name, size in note["bytes"].items() if type(size) is not int or size < 0]
            window = note["asked"].get("window_tokens", 1)
            wrong += ["window_tokens"] if type(window) is not int or window < 1 else []
        if wrong or note["format"] != f"{FORMAT}.unfinished" or note["version"] != 1:
            raise CheckpointError(f"{path} cannot be used ({f'wrong: {wrong}' if wrong else 'another format'}). Use overwrite=True.")
        return note

    def reopen(self) -> None:
        """Go on with the files that are there, cut to where they are good.

        Raises:
            CheckpointError: a file is missing, or shorter than it was.
        """
        note = self.read_progress()
        if not note["bytes"]:  # killed before the first files were there
            self.start()
            return
        self.n_sequences, self.n_tokens = note["n_sequences"], note["n_tokens"]
        self.window, self.taken = note["window"], note["taken"]
        self.place = Place(note["documents"], note["pieces"], note["digest"])
        names = {*self._arrays, ARROW, WINDOWS}
        if set(note["bytes"]) != names:
            raise CheckpointError(f"{self.folder / PROGRESS} speaks of other files than there should be. Start again with overwrite=True.")
        for name in sorted({name.split("/")[0] for name in names}):
            files.resolve(self.folder, name)
        with self._told():
            for name in names:
                path = self.folder / name
                size = path.stat().st_size if path.is_file() else 0
                if not path.is_file() or size < note["bytes"][name]:
                    raise CheckpointError(
                        f"{path} has {size} bytes, and had {note['bytes'][name]} already. Start again with overwrite=True."
                    )
                file = open(path, "r+b")  # noqa: SIM115
                file.truncate(note["bytes"][name])
                file.seek(0, os.SEEK_END)
                self._files[name] = file

    def append(self, rows: Sequence[Int32[np.ndarray, " _"]], special: Bool[np.ndarray, " token"], ids: Mapping[str, np.ndarray]) -> None:
        """Append sequences, which of their positions are special tokens, and their ids by hook name."""
        import pyarrow as pa

        flat = np.concatenate(rows)
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        column = pa.ListArray.from_arrays(offsets, pa.array(flat, pa.int32()))
        batch = pa.record_batch([column], schema=_schema()).serialize().to_pybytes()
        parts = {book.ids_file: ids[book.hook_name].tobytes() for book in self.books}
        parts |= {FLAGS: special.astype(np.uint8).tobytes(), ARROW: batch}
        self._append(parts, ends, len(flat))

    def _append(self, parts: Mapping[str, bytes], ends: np.ndarray, n_tokens: int) -> None:
        window = np.array([len(ends), n_tokens, len(parts[ARROW])], dtype=np.int64)
        with self._told():
            for name, part in parts.items():
                self._files[name].write(part)
            self._files[STARTS].write((ends + self.n_tokens).tobytes())
            self._files[WINDOWS].write(window.tobytes())
        self.n_sequences += len(ends)
        self.n_tokens += n_tokens

    def commit(self) -> None:
        """Note that the files are good up to here; only now is it so."""
        with self._told():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        self._note({name: file.tell() for name, file in self._files.items()})

    def _note(self, sizes: Mapping[str, int]) -> None:
        note = {"format": f"{FORMAT}.unfinished", "version": 1, "asked": self.asked, "window": self.window, "taken": self.taken}
        note |= {"documents": self.place.documents, "pieces": self.place.pieces, "digest": self.place.digest}
        note |= {"n_sequences": self.n_sequences, "n_tokens": self.n_tokens}
        with self._told():
            files.replace_json(self.folder / PROGRESS, note | {"bytes": dict(sizes)})

    def join(self, shards: Sequence[Path]) -> None:
        """Append the windows of several processes in the order in which a single one would have made them."""
        parts = [GrowingStore(folder, self.books, self.asked) for folder in shards]
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.callback(part.close)
                part.reopen()
            windows = [np.fromfile(part.folder / WINDOWS, dtype=np.int64).reshape(-1, 3) for part in parts]
            for part in parts:
                for name, (dtype, shape) in part._arrays.items():
                    part._files[name].seek(len(_header(dtype, shape)))
                part._files[ARROW].seek(len(_schema().serialize()))
            for number in range(sum(map(len, windows))):
                part, local = parts[number % len(parts)], number // len(parts)
                n_sequences, n_tokens, n_bytes = windows[number % len(parts)][local].tolist()
                first = np.frombuffer(part._files[STARTS].read(8 * (n_sequences + 1)), dtype=np.int64)
                part._files[STARTS].seek(-8, os.SEEK_CUR)  # the last is the first of the next window
                sizes = {book.ids_file: n_tokens * book.bytes_per_token for book in self.books} | {FLAGS: n_tokens, ARROW: n_bytes}
                self._append({name: part._files[name].read(size) for name, size in sizes.items()}, first[1:] - first[0], n_tokens)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def seal(self) -> None:
        """Make the files what readers expect: shapes in the headers, an end of the tokens, and what a dataset says of itself."""
        from datasets import DatasetInfo, Features

        with self._told():
            for name, (dtype, shape) in self._arrays.items():
                self._files[name].seek(0)
                self._files[name].write(_header(dtype, shape))
            self._files[ARROW].write(_END_OF_STREAM)
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            self.close()
            DatasetInfo(features=Features.from_arrow_schema(_schema())).write_to_directory(str(self.folder / "tokens"))
            with open(self.folder / ARROW, "rb") as file:
                fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            state: dict[str, Any] = {"_data_files": [{"filename": Path(ARROW).name}], "_fingerprint": fingerprint, "_format_columns": None}
            state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
            files.replace_json(self.folder / STATE, state)

    def sample(self, n: int = 512) -> Int32[np.ndarray, " token"]:
        """Return the first tokens of a sealed store."""
        import pyarrow as pa

        with pa.memory_map(str(self.folder / ARROW)) as source:
            first = pa.ipc.open_stream(source).read_next_batch()
            return np.array(first.column("input_ids").flatten()[:n].to_numpy(), dtype=np.int32)

    def clean(self) -> None:
        """Remove what only an unfinished store has."""
        (self.folder / WINDOWS).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SHARDS, ignore_errors=True)
        _remove_leftovers(self.folder)
        (self.folder / PROGRESS).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} could not be written ({error.strerror or error}). What was collected before is kept: free space, and go on "
                "with resume=True."
            ) from error


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of an array file; numpy leaves room in it, so that it has the same length whatever the first axis is."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _schema() -> Any:
    import pyarrow as pa
    from datasets import Features, Value

    features = Features({"input_ids": [Value("int32")]})
    schema = features.arrow_schema
    assert schema.field("input_ids").type == pa.list_(pa.int32())
    return schema
