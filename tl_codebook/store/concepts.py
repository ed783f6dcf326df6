"""Where a concept holds in a store: at the matches of a regex, at tokens, or at positions that are given.

Text is matched between special tokens (BOS, EOS): a match never runs from one document into the next, and ``^`` and ``$`` are the ends
of a document within a stored sequence.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import numpy as np
import regex
from jaxtyping import Bool, Int64, Integer
from torch import Tensor

from tl_codebook.errors import ConfigError, DataError, SearchTimeoutError, ShapeError
from tl_codebook.store.text import Text, Vocabulary, decode

__all__ = ["At", "Matches", "Query", "Searchable", "concept_positions", "match_text", "sequence_starts"]

At = Literal["first", "last", "all"]

_TOKENS_AT_ONCE = 2**18


@runtime_checkable
class Searchable(Protocol):
    """What a search reads of a `CodeStore`."""

    sites: Any
    n_tokens: int
    n_sequences: int

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The bytes of each token, where they are known."""

    def tokens(self, start: int, stop: int) -> Integer[np.ndarray, " token"]:
        """Return the token ids at some positions."""

    def sequence(self, number: int) -> slice:
        """Return the positions of a sequence."""

    def ids(self, site: str) -> Integer[np.ndarray, "token group k"]:
        """Return the ids of a site; `n_codes` stands for no code."""

    def is_special(self) -> Bool[np.ndarray, " token"]:
        """Tell of each position whether its token is no text."""

    def counts(self, site: str) -> Integer[np.ndarray, "group code"]:
        """Return at how many positions each code fires, special tokens included."""


@dataclass(frozen=True)
class Matches:
    """The matches of a regex in the texts of a store, in their order."""

    sequence: Int64[np.ndarray, " match"]
    start: Int64[np.ndarray, " match"]
    """First character in the text of the sequence, special tokens left out."""
    stop: Int64[np.ndarray, " match"]
    """The character after the last."""
    first: Int64[np.ndarray, " match"]
    """Position in the store of the token that the first character begins in."""
    last: Int64[np.ndarray, " match"]
    """Position in the store of the token that the last character ends in."""

    def __len__(self) -> int:
        return len(self.start)

    def where(self, keep: Bool[np.ndarray, " match"]) -> Matches:
        """Return some of the matches, such as those that begin at an even character: ``matches.where(matches.start % 2 == 0)``."""
        return Matches(self.sequence[keep], self.start[keep], self.stop[keep], self.first[keep], self.last[keep])

    def positions(self, at: At = "first") -> Int64[np.ndarray, " position"]:
        """Return the positions that the matches mark, ascending, each once however many matches mark it.

        Args:
            at: The token that a match begins in (as in the original library), the one it ends in, or all of them.

        Raises:
            ConfigError: another word.
        """
        if at not in get_args(At):
            raise ConfigError(f"at={at!r} was asked for. Give 'first', 'last' or 'all': which tokens of a match are marked.")
        if at != "all":
            return np.unique(self.first if at == "first" else self.last)
        lengths = self.last - self.first + 1
        begins = np.repeat(self.first - (np.cumsum(lengths) - lengths), lengths)
        return np.unique(begins + np.arange(int(lengths.sum())))


Pattern = Any
"""A regular expression: a str, or a compiled pattern of `re` or `regex`."""
Query = Any
"""A `Pattern`, `Matches`, token ids, texts of tokens, or a mask of bools."""


def _compiled(pattern: Pattern) -> Any:
    """Return a pattern of the `regex` module, which can be stopped."""
    source = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", None)
    if not isinstance(source, str):
        raise ConfigError(f"the pattern {str(pattern)[:200]!r} is no regular expression of text. Give a str, or a compiled pattern of one.")
    flags = 0
    if isinstance(pattern, re.Pattern):
        names = [name for name in ("IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE", "ASCII") if pattern.flags & getattr(re, name)]
        flags = sum(int(getattr(regex, name)) for name in names)
    elif not isinstance(pattern, str):
        return pattern
    try:
        return regex.compile(source, flags)
    except regex.error as error:
        where = "" if error.pos is None else f" at character {error.pos}"
        raise ConfigError(
            f"{source[:200]!r} is no regular expression: {error.msg}{where}. Correct it; a parenthesis that is text is written \\(."
        ) from error
    except (RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"the regular expression {source[:40]!r}... is nested or repeated too deeply. Write a simpler one.") from error


def _group_of(compiled: Any, group: int | str | None) -> int:
    if group is None:
        return min(compiled.groups, 1)
    number = compiled.groupindex.get(group, -1) if isinstance(group, str) else group
    if isinstance(group, bool) or not isinstance(number, int) or not 0 <= number <= compiled.groups:
        named = f", named {', '.join(map(repr, compiled.groupindex))}" if compiled.groupindex else ""
        raise ConfigError(
            f"group {group!r} was asked for, but {compiled.pattern[:200]!r} has {compiled.groups} groups{named}. "
            "Give one of them, 0 for the whole match, or None for the first."
        )
    return number


def sequence_starts(store: Searchable) -> Int64[np.ndarray, " sequence"]:
    """Return the first position of each sequence of a store."""
    return np.array([store.sequence(number).start for number in range(store.n_sequences)], dtype=np.int64)


def _words(store: Searchable, vocabulary: Vocabulary | None) -> Vocabulary:
    words = vocabulary or store.vocabulary
    if words is None:
        raise DataError(
            "this store has no text: it was collected without a tokenizer. Give vocabulary=vocabulary_of(tokenizer), or search for token "
            "ids."
        )
    return words


def match_text(
    store: Searchable,
    pattern: Pattern,
    *,
    group: int | str | None = None,
    timeout: float = 2.0,
    vocabulary: Vocabulary | None = None,
) -> Matches:
    r"""Find a regular expression in the texts of a store.

    Matches of no character are left out, and none overlaps another, as with `re`: to find both pairs of ``000`` look back, ``(?<=0)0``.

    Args:
        store: Its tokens are read; it needs the bytes of its vocabulary.
        pattern: In the syntax of the `regex` module (that of `re` and more).
        group: What is marked: by default the first group where there is one, else the whole match; 0 for the whole match. A match in
            which the group takes no part is left out.
        timeout: Seconds of matching, above 0, after which the search is given up; reading the text is not counted.
        vocabulary: For a store that was collected without a tokenizer.

    Raises:
        ConfigError: a pattern or group that cannot be.
        SearchTimeoutError: a pattern that takes longer than `timeout`.
        DataError: a store without text, or tokens that the vocabulary does not have.

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> match_text(store, r"w\d (w4)").positions()  # 0 and 4 are BOS
    array([2, 6])
    """
    compiled = _compiled(pattern)
    marked = _group_of(compiled, group)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigError(f"timeout={timeout!r} was asked for. Give seconds, above 0.")
    words = _words(store, vocabulary)
    budget, found = _Budget(float(timeout), compiled.pattern), [np.zeros((5, 0), np.int64)]
    for sequences, start, stop in _blocks(store):
        tokens = store.tokens(start, stop)
        data, ends = words.join(tokens)
        # A text is a run of tokens that are not special, within a sequence.
        special = np.flatnonzero(store.is_special()[start:stop])
        begins = np.array([store.sequence(i).start for i in sequences]) - start
        edges = np.unique(np.concatenate([begins, special, special + 1, np.array([len(tokens)])]))
        texts = edges[:-1][~np.isin(edges[:-1], special)]
        stops = edges[np.searchsorted(edges, texts) + 1]
        owners = np.searchsorted(begins, texts, side="right") - 1
        owner, character = -1, 0
        for first, last, own in zip(texts.tolist(), stops.tolist(), owners.tolist(), strict=True):
            byte = int(ends[first - 1]) if first else 0
            text = decode(data[byte : int(ends[last - 1])])
            character = character if own == owner else 0
            owner = own
            spans = budget.spans(compiled, text.text, marked)
            if spans:
                found.append(_placed(spans, text, byte, ends, sequences.start + own, character, start))
            character += len(text.text)
        budget.read = stop
    return Matches(*np.concatenate(found, axis=1))


class _Budget:
    """The time that a search may take."""

    def __init__(self, seconds: float, pattern: str) -> None:
        self.seconds = self.left = seconds
        self.pattern = pattern
        self.read = 0

    def spans(self, compiled: Any, text: str, group: int) -> list[tuple[int, int]]:
        """Return where the group matches in a text, without empty matches."""
        began = time.perf_counter()
        try:
            spans = [match.span(group) for match in compiled.finditer(text, timeout=max(self.left, 1e-6))]
        except (TimeoutError, MemoryError, RecursionError) as error:
            late = isinstance(error, TimeoutError)
            spent = f"after {self.seconds:g} s of matching" if late else "because it ran out of memory"
            raise (SearchTimeoutError if late else ConfigError)(
                f"the search for {self.pattern[:200]!r} was stopped {spent}, {self.read} tokens or more into the store. Write a pattern "
                "that does not try the same text many times over, or give a greater timeout."
            ) from error
        self.left -= time.perf_counter() - began
        return [span for span in spans if span[0] < span[1]]


def _blocks(store: Searchable) -> Iterator[tuple[range, int, int]]:
    """Go through a store some whole sequences at a time: which, and their first and last position."""
    first = 0
    while first < store.n_sequences:
        start, stop, last = store.sequence(first).start, store.sequence(first).stop, first + 1
        while last < store.n_sequences and stop - start < _TOKENS_AT_ONCE:
            stop, last = store.sequence(last).stop, last + 1
        yield range(first, last), start, stop
        first = last


def _placed(
    spans: list[tuple[int, int]], text: Text, byte: int, ends: np.ndarray, sequence: int, character: int, position: int
) -> Int64[np.ndarray, "5 match"]:
    """Carry spans of characters over to tokens."""
    start, stop = np.array(spans, np.int64).T
    first = np.searchsorted(ends, byte + text.byte_of(start), side="right")
    last = np.searchsorted(ends, byte + text.byte_of(stop) - 1, side="right")
    return np.stack([np.full_like(start, sequence), start + character, stop + character, first + position, last + position])


def concept_positions(
    store: Searchable,
    query: Query,
    *,
    at: At = "first",
    group: int | str | None = None,
    shift: int = 0,
    timeout: float = 2.0,
    vocabulary: Vocabulary | None = None,
) -> Int64[np.ndarray, " position"]:
    """Return the positions of a store at which a concept holds, ascending, each once.

    Args:
        store: The store.
        query: A regular expression; matches of one (`match_text`); token ids; the texts of tokens, each of which must be one token;
            or a mask of bools, one for each position of the store [token] or, where all sequences are of one length, [sequence pos].
        at: Which tokens of a match are marked: the one it begins in, the one it ends in, or all.
        group, timeout, vocabulary: As for `match_text`.
        shift: Mark the token so many positions later (earlier, where negative) in the same sequence instead; none where there is none.

    Raises:
        ConfigError: a query, group, shift or `at` that cannot be.
        SearchTimeoutError: a pattern that takes longer than `timeout`.
        DataError: a token that the vocabulary does not have, or a store without text.
        ShapeError: a mask that does not fit the store.

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> concept_positions(store, "w4"), concept_positions(store, [3, 6])
    (array([2, 6]), array([1, 5]))
    """
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise ConfigError(f"shift={shift!r} was asked for. Give a whole number of positions, negative for earlier ones.")
    return _shifted(store, _positions(store, query, at, group, timeout, vocabulary), shift)


def _positions(
    store: Searchable, query: Query, at: At, group: int | str | None, timeout: float, vocabulary: Vocabulary | None
) -> Int64[np.ndarray, " position"]:
    if isinstance(query, str | re.Pattern | regex.Pattern):
        query = match_text(store, query, group=group, timeout=timeout, vocabulary=vocabulary)
    if isinstance(query, Matches):
        return query.positions(at)
    values = query.detach().cpu().numpy() if isinstance(query, Tensor) else query
    if isinstance(values, Sequence) and len(values) and all(isinstance(value, str) for value in values):
        values = _ids_of(store, cast("Sequence[str]", values), vocabulary)
    array = np.asarray(values)
    if array.dtype == np.bool_:
        return _of_mask(store, array)
    if array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"the query {str(query)[:200]!r} is none. Give a regular expression, token ids (whole numbers), texts of tokens, or a mask of "
            "bools."
        )
    wanted = np.unique(array)
    if array.shape == (store.n_tokens,) and set(wanted.tolist()) <= {0, 1}:
        raise ConfigError("the query has a 0 or 1 for each position of the store, which would be tokens 0 and 1. Give a mask as bools.")
    known = vocabulary or store.vocabulary
    outside = wanted[(wanted < 0) | ((wanted >= known.n_tokens) if known else False)]
    if outside.size:
        raise DataError(
            f"token {int(outside[0])} was asked for, but ids begin at 0{f' and end at {known.n_tokens - 1}' if known else ''}. "
            "Give ids of the tokenizer that the store was collected with."
        )
    parts = [start + np.flatnonzero(np.isin(store.tokens(start, stop), wanted)) for _, start, stop in _blocks(store)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _shifted(store: Searchable, positions: Int64[np.ndarray, " position"], shift: int) -> Int64[np.ndarray, " moved"]:
    """Move positions, and leave out those that would leave their sequence."""
    if not shift or not len(positions):
        return positions
    if abs(shift) >= store.n_tokens:
        return positions[:0]
    moved = positions + shift
    inside = (moved >= 0) & (moved < store.n_tokens)
    positions, moved = positions[inside], moved[inside]
    bounds = sequence_starts(store)
    return moved[np.searchsorted(bounds, positions, side="right") == np.searchsorted(bounds, moved, side="right")]


def _ids_of(store: Searchable, texts: Sequence[str], vocabulary: Vocabulary | None) -> list[int]:
    words = _words(store, vocabulary)
    ids = {text: words.ids_of(text) for text in texts}
    unknown = [text for text, tokens in ids.items() if not tokens]
    if unknown:
        raise DataError(
            f"{unknown[0]!r} is not one token of this vocabulary. Mind the space at the beginning of a word, or search for the text by a "
            "regular expression (a string, not a list)."
        )
    return [token for tokens in ids.values() for token in tokens]


def _of_mask(store: Searchable, mask: np.ndarray) -> np.ndarray:
    if mask.ndim == 2 and mask.size == store.n_tokens and mask.shape[0] == store.n_sequences:
        lengths = {store.sequence(i).stop - store.sequence(i).start for i in range(store.n_sequences)}
        if lengths == {mask.shape[1]}:
            mask = mask.reshape(-1)
    if mask.shape != (store.n_tokens,):
        raise ShapeError(
            f"a mask of shape {list(mask.shape)} was given, but the store has {store.n_tokens} positions in {store.n_sequences} sequences. "
            "Give a bool for each position."
        )
    return np.flatnonzero(mask)
