"""Run a model over many texts and write down which codes fire where."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32
from tqdm.auto import tqdm

from tl_codebook import files
from tl_codebook.attachment import match_sites
from tl_codebook.base_model import describe
from tl_codebook.characters import escaped
from tl_codebook.errors import AttachError, CheckpointError, CheckpointExistsError, CheckpointWarning, ConfigError, DataError, check_whole
from tl_codebook.hosts import as_host
from tl_codebook.points import CodebookPoint
from tl_codebook.store.index import build_index
from tl_codebook.store.manifest import FORMAT, MANIFEST, PROGRESS, VERSION, codes_sha256, differences, holds_store
from tl_codebook.store.processes import Processes
from tl_codebook.store.reader import CodeReader
from tl_codebook.store.sequences import Place, SequenceSource, open_documents
from tl_codebook.store.store import CodeStore
from tl_codebook.store.text import check_text, save_vocabulary, vocabulary_of
from tl_codebook.store.writing import LOCK, GrowingStore, check_links, is_leftover, remove_store, shard_folder, sole_writer

__all__ = ["collect_codes"]

_WINDOW_BYTES, _WINDOW_TOKENS = 1 << 26, 1 << 17
"""Most bytes of ids, and most tokens, that are collected before they are written (four batches at least)."""


def collect_codes(
    model: Any,
    dataset: Any,
    path: str | Path,
    *,
    n_tokens: int | None = None,
    sites: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    column: str = "text",
    context_length: int | None = None,
    batch_size: int = 8,
    resume: bool = False,
    progress: bool = True,
    overwrite: bool = False,
) -> CodeStore:
    """Run a model over texts and write the ids of its codes, and an index of them, to a folder; return it opened.

    A document becomes sequences of at most `context_length` tokens, each with its BOS; rows of token ids stay as they are. The model runs
    no layer above the last site, nothing but ids is kept, and padding neither counts nor is stored. Every now and then what there is so far
    is made good: a process killed at any step goes on from there with ``resume=True`` and writes the very bytes that it would have written.
    Under `accelerate launch` the processes share the work, and the files are those of a single one.

    Args:
        model: A host with codebooks, on the device that it is to run on.
        dataset: A `datasets.Dataset` or `IterableDataset`, the path of a text or .jsonl file or whatever else `load_dataset_from` reads,
            texts, or rows of token ids (a tensor [row pos], lists). A text file of more than a MiB is taken for several documents.
        path: Folder of the store: new, empty, or with `resume` or `overwrite` one of an earlier collection.
        n_tokens: Positions to collect, BOS among them; by default, and at most, what the dataset has.
        sites: Hook names, addresses or sites (``z``) to collect; all by default.
        tokenizer: By default the model's own.
        column: Column of the texts; where there is one, ``input_ids`` (with ``attention_mask``) is read instead of ``text``.
        context_length: Most tokens of a sequence; by default the model's context, at most 512.
        batch_size: Sequences of full length that run at a time; of shorter ones more.
        resume: Go on with an unfinished collection of the same things, or begin one; a finished one is opened.
        progress: Show a bar, with the size of the store to come.
        overwrite: Remove the store that is there first.

    Raises:
        ConfigError, UnknownHookError, AttachError: arguments that cannot be, a site without a codebook, or with one that is off.
        DataError: a dataset that holds nothing, no text, a token that the model does not know, or another one than before (`resume`).
        CheckpointExistsError: the folder is not empty.
        CheckpointError: it cannot be written to, is too small, in use by another process, or an unfinished collection of something else.

    Source: Tamkin et al. 2023, section 4 (which activations a code stands for).

    >>> from tl_codebook import attach
    >>> _ = attach(model, ["z", "mlp_out"], n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w7"], tmp_path / "store", progress=False)
    >>> store.ids("L1.z").shape, store.ids("L1.z").dtype  # 4 heads, k=2; two texts and a BOS each
    ((7, 4, 2), dtype('uint8'))
    """
    host = as_host(model)
    points = match_sites(host, sites)
    _check_points(points)
    check_whole("batch_size", batch_size, least=1)
    if n_tokens is not None:
        check_whole("n_tokens", n_tokens, least=1)
    if resume and overwrite:
        raise ConfigError("resume=True and overwrite=True were both asked for: go on with what is there, or remove it? Give one.")
    tokenizer = getattr(host, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "get_vocab")):
        raise ConfigError(f"tokenizer={str(tokenizer)[:60]!r} was given. Give a Hugging Face tokenizer, as from AutoTokenizer.")
    length = _length(host, context_length)
    folder, documents = files.as_path(path), open_documents(dataset, column)
    reader = CodeReader(host, points, batch_size * length)
    asked = _asked(host, reader, tokenizer, length) | {"n_tokens_asked": n_tokens, "column": column}
    source = SequenceSource(documents, length=length, tokenizer=tokenizer, vocabulary=int(host.cfg.d_vocab), n_tokens=n_tokens)
    return _Job(reader, source, asked, tokenizer, progress).run(folder, resume=resume, overwrite=overwrite)


def _check_points(points: Sequence[CodebookPoint]) -> None:
    if not points:
        raise AttachError("the model has no codebooks whose codes could be collected. Call attach(model, sites=...) first.")
    off = [point.site for point in points if not point.enabled]
    if off:
        raise AttachError(
            f"the codebook at {off[0]!r} is off, so no code fires there. Leave the bypassed(...) block, or leave the site out."
        )


def _length(host: Any, asked: int | None) -> int:
    limit = int(getattr(host.cfg, "n_ctx", 0) or 0)
    length = min(limit or 512, 512) if asked is None else asked
    check_whole("context_length", length, least=2)
    if limit and length > limit:
        raise DataError(f"sequences of {length} tokens were asked for, and the model's context is {limit}. Give 2 to {limit}.")
    return length


def _asked(host: Any, reader: CodeReader, tokenizer: Any, length: int) -> dict[str, Any]:
    """Return what the manifest says of the model and its codes."""
    try:
        model = describe(host)
    except CheckpointError:  # processed weights, which no description names
        model = {"host": "bridge", "processed": True}
    about: dict[str, Any] | None = None
    if tokenizer is not None:
        words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        name = str(getattr(tokenizer, "name_or_path", "") or "")
        about = {"class": type(tokenizer).__name__, "name": "" if Path(name).exists() else name, "n_tokens": len(tokenizer)}
        about |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
        about["vocabulary_sha256"] = hashlib.sha256(words).hexdigest()
    found = {"format": FORMAT, "version": VERSION, "context_length": length, "model": model, "tokenizer": about}
    found["codes_sha256"] = {point.site: codes_sha256(point.codebook.codes) for point in reader.points}
    found["sites"] = {book.hook_name: book.described() for book in reader.books}
    return dict(json.loads(json.dumps(found)))


@dataclass
class _Job:
    """One collection, in one process of those that share it."""

    reader: CodeReader
    source: SequenceSource
    asked: dict[str, Any]
    tokenizer: Any
    progress: bool

    def __post_init__(self) -> None:
        self.processes = Processes.current(self.reader.device.type)
        self.locked = False  # whether this process holds the lock of the folder
        per_token = sum(book.bytes_per_token for book in self.reader.books)
        self.window = max(min(_WINDOW_TOKENS, _WINDOW_BYTES // per_token), 4 * self.reader.batch_tokens)
        n_slots = sum(book.n_groups * book.k for book in self.reader.books)
        self.per_token = per_token + 4 * n_slots + 6  # the index; the token, its flag and its share of the rest

    def run(self, folder: Path, *, resume: bool, overwrite: bool) -> CodeStore:
        """Collect what is not there yet, and open it."""
        together = self.processes.together
        with contextlib.ExitStack() as stack:
            state = together(lambda: self._state(folder, resume=resume, overwrite=overwrite))
            if state == "finished":
                return CodeStore(folder)
            first = together(self._first) if state == "new" else None
            again = partial(self._state, folder, resume=resume, overwrite=overwrite)
            together(lambda: self._prepare(folder, str(state), again, stack), main_only=True)
            own = GrowingStore(shard_folder(folder, self.processes.index, self.processes.count), self.reader.books, self._noted())
            stack.callback(own.close)
            together(lambda: self._open(own, state == "new", stack))
            bar = tqdm(total=self.source.expected, initial=own.taken, unit="token", unit_scale=True, disable=not self._shown)
            stack.callback(bar.close)
            bar.set_description(f"collecting codes, {self._size() or 'size unknown'}")
            together(lambda: self._collect(own, first, bar))
            together(lambda: self._finish(folder, own, bar), main_only=True)
        return CodeStore(folder)

    @property
    def _shown(self) -> bool:
        return self.progress and self.processes.main

    def _noted(self) -> dict[str, Any]:
        return self.asked | {"window_tokens": self.window, "processes": self.processes.count}

    def _state(self, folder: Path, *, resume: bool, overwrite: bool) -> str:
        """Say whether the folder is ``new``, ``unfinished`` or ``finished``, and refuse what must not be touched; nothing is changed."""
        try:
            held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({error.strerror or error}). Choose another folder.") from error
        if LOCK in held and self.processes.main and not self.locked:
            with sole_writer(folder):
                pass
        held = {name for name in held if name != LOCK and not is_leftover(name)}
        if not held:
            return "new"
        if not holds_store(folder):
            raise CheckpointExistsError(f"{folder} is not empty, and holds no store of codes. Choose another folder; nothing was changed.")
        if overwrite:
            return "new"
        finished = MANIFEST in held
        if not resume:
            what = "a store" if finished else "an unfinished collection"
            also = "overwrite=True" if finished else "resume=True to go on with it, or overwrite=True"
            raise CheckpointExistsError(f"{folder} holds {what} already. Choose another folder, or say {also}; nothing was changed.")
        if finished:
            self._compare(folder, files.read_json(folder / MANIFEST), self.asked)
            if self.processes.main and PROGRESS in held and not self.locked:  # killed after its last word, before it had cleaned up
                with sole_writer(folder):
                    GrowingStore(folder, self.reader.books, {}).clean()
            return "finished"
        note = GrowingStore(folder, self.reader.books, {}).read_progress()
        self.window = int(note["asked"].get("window_tokens") or self.window)
        self._compare(folder, note["asked"], self._noted())
        return "unfinished"

    def _compare(self, folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        found = [line for line in differences(then, now, now) if not line.startswith("tokenizer.name:")]
        if found:
            raise CheckpointError(
                f"{folder} was collected otherwise: {'; '.join(found[:6])}. Collect the same things to go on, or say overwrite=True."
            )

    def _first(self) -> list[Int32[np.ndarray, " _"]]:
        """Take the first sequences, so that a dataset that cannot be used is refused before anything is written."""
        first = self.source.take(self.window)
        if not first:
            raise DataError("the dataset holds no text: every document is empty. Give one with text.")
        return first

    def _prepare(self, folder: Path, state: str, again: Callable[[], str], stack: contextlib.ExitStack) -> None:
        """Take hold of the folder, and of the room on its disk; what an earlier collection wrote goes, where this one is new."""
        files.check_writable(folder, overwrite=True)
        stack.enter_context(sole_writer(folder))
        self.locked = True
        if again() != state:  # a whole collection of another process fits between the first look and the lock
            raise CheckpointError(f"another process collected into {folder} in the meantime. Look at what is there, and call again.")
        if state == "new":
            size = self._bytes()
            free = shutil.disk_usage(folder).free
            if size > free:
                raise CheckpointError(
                    f"the store would take about {_human(size)}, and {folder} has {_human(free)} free. Free space, choose another "
                    "folder, or give a smaller n_tokens."
                )
            remove_store(folder)
        else:
            check_links(folder)
        if self._shown and self._size():
            tqdm.write(f"{escaped(str(folder))}: {self._size()}, {self.per_token:,} bytes a token", file=sys.stderr)
        if state == "new" and self.processes.count > 1:
            whole = GrowingStore(folder, self.reader.books, self._noted())
            whole.start()
            whole.close()

    def _bytes(self) -> int:
        return (self.source.expected or 0) * self.per_token

    def _size(self) -> str:
        expected = self.source.expected
        return "" if expected is None else f"about {expected:,} tokens and {_human(self._bytes())}"

    def _open(self, own: GrowingStore, new: bool, stack: contextlib.ExitStack) -> None:
        own.folder.mkdir(parents=True, exist_ok=True)
        if self.processes.count > 1:
            stack.enter_context(sole_writer(own.folder))
        if new or not (own.folder / PROGRESS).is_file():
            own.start()
        else:
            note = own.read_progress()
            self.source.resume(Place(note["documents"], note["pieces"], note["digest"]), note["taken"])
            own.reopen()

    def _collect(self, own: GrowingStore, first: list[Int32[np.ndarray, " _"]] | None, bar: Any) -> None:
        """Run the model over the windows that are this process's, each made good before the next."""
        number = own.window
        rows = self.source.take(self.window) if first is None else first
        with self.reader.listening():
            while rows:
                if number % self.processes.count == self.processes.index:
                    own.append(rows, self._special(rows), self.reader.read(rows))
                    own.window, own.taken, own.place = number + 1, self.source.taken, self.source.place
                    own.commit()
                number += 1
                bar.update(sum(map(len, rows)))
                rows = self.source.take(self.window)

    def _special(self, rows: Sequence[Int32[np.ndarray, " _"]]) -> Bool[np.ndarray, " token"]:
        special = [] if self.tokenizer is None else list(self.tokenizer.all_special_ids)
        return np.isin(np.concatenate(rows), special)

    def _finish(self, folder: Path, own: GrowingStore, bar: Any) -> None:
        """Bring the parts together, make the index, and say at last that all is there."""
        whole = own
        if self.processes.count > 1:
            whole = GrowingStore(folder, self.reader.books, self._noted())
            whole.start()
            whole.join([shard_folder(folder, index, self.processes.count) for index in range(self.processes.count)])
        whole.seal()
        for book in whole.books:
            bar.set_description(f"indexing {book.label}")
            build_index(folder, book, whole.n_tokens)
        manifest = self.asked | {"n_sequences": whole.n_sequences, "n_tokens": whole.n_tokens}
        manifest |= {"vocabulary_bytes": self._save_vocabulary(folder, whole.sample()), "complete": True}
        files.replace_json(folder / MANIFEST, manifest)
        whole.clean()

    def _save_vocabulary(self, folder: Path, tokens: Int32[np.ndarray, " token"]) -> bool:
        """Write the bytes of each token beside the store, unless they do not make the text that the tokenizer makes of tokens."""
        if self.tokenizer is None:
            return False
        vocabulary = vocabulary_of(self.tokenizer, self.reader.vocabulary)
        try:
            check_text(vocabulary, self.tokenizer, tokens)
        except DataError as error:
            warnings.warn(f"the store will have no text, only token ids: {error}", CheckpointWarning, stacklevel=2)
            return False
        save_vocabulary(folder, vocabulary)
        return True


def _human(n_bytes: int) -> str:
    size, units = float(n_bytes), ["bytes", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
