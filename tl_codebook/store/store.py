"""Read a store: which codes fire where, in which contexts, how often."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt, UInt8

from tl_codebook import files, hosts
from tl_codebook.errors import BasisMismatchError, CheckpointError, ConfigError, PositionError, check_whole
from tl_codebook.names import Address, Code, CodeLike, as_code
from tl_codebook.store.counting import firing_counts
from tl_codebook.store.manifest import (
    AGAIN,
    FLAGS,
    MANIFEST,
    STARTS,
    STATE,
    TOKENS,
    StoredBook,
    check_files,
    codes_sha256,
    expected_files,
    find_book,
    open_array,
    read_manifest,
)
from tl_codebook.store.sites import stored_code
from tl_codebook.store.text import Vocabulary, load_vocabulary

__all__ = ["CodeStore", "Context"]


@dataclass(frozen=True)
class Context:
    """One place at which a code fires, with the tokens around it, none of another sequence."""

    sequence: int
    """Number of the sequence."""
    position: int
    """Flat position at which the code fires."""
    start: int
    """Flat position of the first of `tokens`."""
    tokens: Int64[np.ndarray, " token"]

    @property
    def index(self) -> int:
        """Return where in `tokens` the code fires."""
        return self.position - self.start


class CodeStore:
    """What `collect_codes` wrote, opened in milliseconds: everything is mapped into memory and read when it is asked for.

    Positions are *flat*: sequence after sequence, without padding, 0 to `n_tokens` - 1. Codes are given as a `Code` or as a label.

    Args:
        path: The folder.

    Raises:
        CheckpointError: no store, an unfinished one, one of a newer release, or files that are damaged or lie elsewhere.

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> _ = collect_codes(model, ["w3 w4 w5", "w6 w7"], tmp_path / "store", progress=False)
    >>> store = CodeStore(tmp_path / "store")
    >>> store.tokens(0, 4), store.sequence(1)  # 1 is the BOS
    (array([1, 3, 4, 5]), slice(4, 7, None))
    >>> int(store.counts("L0.mlp_out").sum()) <= 2 * store.n_tokens  # k=2
    True
    """

    def __init__(self, path: str | Path) -> None:
        self.path = files.as_path(path)
        self.manifest, self.sites = read_manifest(self.path)
        """What the manifest says, and the codebooks by hook name."""
        self.n_tokens, self.n_sequences = int(self.manifest["n_tokens"]), int(self.manifest["n_sequences"])
        check_files(self.path, expected_files(self.manifest, self.sites))
        unhashed = sorted(self.sites.keys() - self.manifest["codes_sha256"].keys())
        if unhashed:
            raise CheckpointError(f"{self.path / MANIFEST}: codes_sha256 has no hash for {unhashed[0]!r}. {AGAIN}")
        self.starts: Int64[np.ndarray, " sequence_and_one"] = open_array(self.path / STARTS, np.int64, (self.n_sequences + 1,))
        """First position of each sequence, and `n_tokens`."""
        if self.starts[0] != 0 or self.starts[-1] != self.n_tokens:
            raise CheckpointError(f"{self.path / STARTS} does not go from 0 to {self.n_tokens}, the number of tokens. {AGAIN}")
        if (self.starts[1:] < self.starts[:-1]).any():
            raise CheckpointError(f"{self.path / STARTS} does not ascend. {AGAIN}")
        self._index: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __repr__(self) -> str:
        labels = ", ".join(book.label for book in self.sites.values())
        return f"CodeStore({str(self.path)!r}: {self.n_tokens:,} tokens in {self.n_sequences:,} sequences; {labels})"

    def check_model(self, model: Any) -> None:
        """Raise unless the model's codes are those that were collected, site by site.

        Raises:
            UnknownHookError: a site of the store at which the model has no codebook.
            BasisMismatchError: its codes are others.

        >>> from tl_codebook import attach, collect_codes
        >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
        >>> collect_codes(model, ["w3 w4 w5"], tmp_path / "store", progress=False).check_model(model)
        """
        from tl_codebook.attachment import match_sites

        points = match_sites(hosts.as_host(model), list(self.sites))
        other = [point.site for point in points if codes_sha256(point.codebook.codes) != self.manifest["codes_sha256"].get(point.site)]
        if other:
            raise BasisMismatchError(
                f"the codes of {', '.join(other)} are not those that {self.path} was collected with. Load the model of then, or collect "
                "its codes again."
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes that all files take."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The bytes of each token; None where the store was collected without a tokenizer."""
        found = load_vocabulary(self.path)
        if found is None and self.manifest.get("vocabulary_bytes") is True:
            raise CheckpointError(f"{self.path} was collected with the bytes of its tokens, and they are missing. {AGAIN}")
        return found

    @cached_property
    def dataset(self) -> Any:
        """The tokens as a `datasets.Dataset`, a row of ``input_ids`` a sequence."""
        from datasets import load_from_disk

        _ = self._columns  # names of files that lie elsewhere are refused here, and columns of anything but token ids
        try:
            return load_from_disk(str(self.path / TOKENS)).with_format(None)
        except Exception as error:  # keys that are not there, features and formats that are none
            raise CheckpointError(f"{self.path / TOKENS} cannot be read ({error}). {AGAIN}") from error

    @cached_property
    def _columns(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The tokens of each part of the Arrow files, none read yet, and the flat position at which each part begins."""
        import pyarrow as pa

        state = files.read_json(self.path / STATE, again=AGAIN)
        parts: list[np.ndarray] = []
        lengths = [np.zeros(1, dtype=np.int64)]
        try:
            for entry in state["_data_files"]:
                path = files.resolve(self.path / TOKENS, entry["filename"])
                if not path.is_file():
                    raise ValueError(f"{path.name} is no file")
                with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                    kinds = {field.name: field.type for field in stream.schema}
                    if kinds != {"input_ids": pa.list_(pa.int32())} or len(stream.schema) != 1:
                        raise ValueError(f"its columns are {kinds}, not input_ids of list<int32>")
                    for batch in stream:
                        batch.validate(full=True)  # of the offsets: nothing else would keep them inside the file
                        rows = batch.column(0)
                        if rows.null_count:
                            raise ValueError("rows without tokens")
                        lengths.append(np.diff(rows.offsets.to_numpy()))
                        parts.append(rows.flatten().to_numpy(zero_copy_only=True))
        except CheckpointError:
            raise
        except Exception as error:  # Arrow's own errors, and keys that are not there
            raise CheckpointError(f"{self.path / TOKENS} cannot be read ({error}). {AGAIN}") from error
        begins = np.cumsum([0, *map(len, parts)])
        if begins[-1] != self.n_tokens:
            raise CheckpointError(f"{self.path / TOKENS} holds {begins[-1]} tokens, the manifest says {self.n_tokens}. {AGAIN}")
        if not np.array_equal(np.cumsum(np.concatenate(lengths)), self.starts):
            raise CheckpointError(f"the rows of {self.path / TOKENS} are not the sequences of {STARTS}. {AGAIN}")
        return begins, parts

    def tokens(self, start: int, stop: int) -> Int64[np.ndarray, " token"]:
        """Return the token ids at the flat positions from `start` to before `stop`.

        Raises:
            PositionError: outside the store.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise PositionError(f"positions {start} to {stop} were asked for, the store has 0 to {self.n_tokens}.")
        begins, parts = self._columns
        first = int(np.searchsorted(begins, start, side="right")) - 1
        found = [np.empty(0, dtype=np.int64)]
        while start < stop:
            upto = min(stop, int(begins[first + 1]))
            found.append(parts[first][start - begins[first] : upto - begins[first]])
            start, first = upto, first + 1
        return np.concatenate(found).astype(np.int64)

    def sequence(self, number: int) -> slice:
        """Return the flat positions of a sequence.

        Raises:
            PositionError: there is no such sequence.
        """
        if not 0 <= number < self.n_sequences:
            raise PositionError(f"sequence {number} was asked for, the store has 0 to {self.n_sequences - 1}.")
        return slice(int(self.starts[number]), int(self.starts[number + 1]))

    def sequence_of(self, positions: Any) -> Int64[np.ndarray, "*shape"]:
        """Return the number of the sequence that each flat position lies in.

        Raises:
            PositionError: a position outside the store.
        """
        positions = np.asarray(positions)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n_tokens):
            raise PositionError(
                f"positions from {positions.min()} to {positions.max()} were given, the store has 0 to {self.n_tokens - 1}."
            )
        return np.asarray(np.searchsorted(self.starts, positions, side="right") - 1, dtype=np.int64)

    @cached_property
    def _flags(self) -> UInt8[np.ndarray, " token"]:
        return open_array(self.path / FLAGS, np.uint8, (self.n_tokens,))

    def is_special(self) -> Bool[np.ndarray, " token"]:
        """Tell of each position whether its token is a BOS or another special one, and no text."""
        return (self._flags & 1).astype(bool) if bool(self._flags.max() > 1) else self._flags.view(bool)

    def book(self, site: str | Address | Code) -> StoredBook:
        """Return the codebook that a hook name, an address such as ``L3.mlp_out``, or a code belongs to.

        Raises:
            UnknownHookError: none of the store.
        """
        return find_book(self.sites, site.hook_name if isinstance(site, Address | Code) else site)

    def ids(self, site: str | Address) -> UInt[np.ndarray, "token group k"]:
        """Return the ids of a site at every position, mapped into memory; the value `n_codes` stands for no code."""
        book = self.book(site)  # opened anew each time: what was read of a map that nobody holds takes no memory
        return open_array(self.path / book.ids_file, book.dtype, (self.n_tokens, book.n_groups, book.k))

    def _index_of(self, book: StoredBook) -> tuple[Int64[np.ndarray, " code_and_one"], UInt[np.ndarray, " entry"]]:
        if book.label not in self._index:
            path = self.path / book.offsets_file
            offsets = open_array(path, np.int64, (book.n_groups * book.n_codes + 1,))
            dtype = np.uint32 if self.n_tokens <= 1 << 32 else np.uint64
            if offsets[0] != 0 or (np.diff(offsets) < 0).any():
                raise CheckpointError(f"{path} does not ascend from 0. {AGAIN}")
            self._index[book.label] = offsets, open_array(self.path / book.positions_file, dtype, (int(offsets[-1]),))
        return self._index[book.label]

    def _slot(self, code: CodeLike) -> tuple[StoredBook, int, int]:
        """Return the codebook, group and number of a code, refusing those that there are not."""
        code = as_code(code)
        book = self.book(code)
        stored_code(self.sites, code)
        return book, code.group or 0, code.code

    def counts(self, site: str | Address, *, special: bool = True) -> Int64[np.ndarray, "group code"]:
        """Return at how many positions each code of a site fires; with ``special=False`` BOS and other special tokens are not counted."""
        book = self.book(site)
        counts = np.diff(self._index_of(book)[0]).reshape(book.n_groups, book.n_codes)
        if special:
            return counts
        found = firing_counts(self.ids(site)[np.flatnonzero(self.is_special())], book.n_codes)
        if (found > counts).any():
            raise CheckpointError(f"the index of {book.label} in {self.path} has not what its ids have. {AGAIN}")
        return counts - found

    def frequency(self, code: CodeLike, *, special: bool = True) -> float:
        """Return the share of positions at which a code fires, 0 to 1; with ``special=False`` of those that are text."""
        book, group, number = self._slot(code)
        if special:
            offsets = self._index_of(book)[0]
            row = group * book.n_codes + number
            return float(offsets[row + 1] - offsets[row]) / self.n_tokens
        text = ~self.is_special()
        return float(text[self.positions(code)].sum()) / max(1, int(text.sum()))

    def dead(self, site: str | Address) -> Bool[np.ndarray, "group code"]:
        """Tell of each code of a site whether it never fires."""
        return self.counts(site) == 0

    def perplexity(self, site: str | Address) -> Float64[np.ndarray, " group"]:
        """Return exp(entropy) of the codes per group: the number of codes in equal use, 1 to n_codes (0 where none fires)."""
        counts = self.counts(site).astype(np.float64)
        total = counts.sum(-1, keepdims=True)
        share = counts / np.maximum(total, 1)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
        return np.where(total[:, 0] > 0, np.exp(entropy), 0.0)

    def positions(self, code: CodeLike) -> Int64[np.ndarray, " position"]:
        """Return the flat positions at which a code fires, ascending.

        Raises:
            UnknownHookError, LabelError, InvalidCodeError: no such code in the store.
            CheckpointError: the index is damaged.
        """
        book, group, number = self._slot(code)
        offsets, positions = self._index_of(book)
        row = group * book.n_codes + number
        found = positions[offsets[row] : offsets[row + 1]].astype(np.int64)
        if len(found) and (found[-1] >= self.n_tokens or (found[1:] <= found[:-1]).any()):
            raise CheckpointError(f"{self.path / book.positions_file}: the positions of {code} do not ascend to {self.n_tokens}. {AGAIN}")
        return found

    def contexts(
        self,
        code: CodeLike,
        n: int = 20,
        *,
        before: int = 20,
        after: int = 10,
        order: Literal["first", "random"] = "first",
        seed: int = 0,
    ) -> list[Context]:
        """Return up to `n` places at which a code fires, in the order of the text, each with tokens around it.

        Args:
            code: A `Code` or a label.
            n: Most places.
            before, after: Most tokens before and after the place, of the same sequence.
            order: The first places, or some at random.
            seed: Of the random choice.

        Raises:
            ConfigError: a number below zero, or another order.
        """
        for name, value in (("n", n), ("before", before), ("after", after)):
            check_whole(name, value, least=0)
        if order not in ("first", "random"):
            raise ConfigError(f"order={order!r} was asked for. Choose 'first' or 'random'.")
        places = self.positions(code)
        if order == "random" and len(places) > n:
            places = np.sort(np.random.default_rng(seed).choice(places, n, replace=False, shuffle=False))
        return [self.context_at(place, before, after) for place in places[:n].tolist()]

    def context_at(self, position: int, before: int = 20, after: int = 10) -> Context:
        """Return a flat position with at most so many tokens of its sequence before and after it.

        Raises:
            PositionError: outside the store.
        """
        number = int(self.sequence_of(position))
        whole = self.sequence(number)
        start, stop = max(whole.start, position - before), min(whole.stop, position + after + 1)
        return Context(number, position, start, self.tokens(start, stop))
