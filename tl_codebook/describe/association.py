"""Which tokens and which codes go with a code, counted at the places at which it fires.

The measure is pointwise mutual information in bits: log2 of how many times more often the two come together than if they had nothing to do
with each other. Special tokens (BOS, EOS) are no text, and are counted nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int64, Integer

from tl_codebook.describe.words import Words
from tl_codebook.names import Code
from tl_codebook.store.counting import firing_counts
from tl_codebook.store.store import CodeStore

__all__ = [
    "CodeRow",
    "TokenCounts",
    "TokenRow",
    "code_counts_of_text",
    "code_rows",
    "neighbours",
    "token_counts",
    "token_rows",
    "tokens_at",
]

_AT_ONCE, _BLOCK = 2**16, 2**13  # tokens that are read at a time, few enough for the cache: to count all, and to look some up


@dataclass(frozen=True)
class TokenRow:
    """A token at, or before, the places at which a code fires."""

    token: int
    """Its id."""
    text: str | None
    """None where the store has no text."""
    count: int
    share: float
    """Of the places that were counted, 0 to 1."""
    pmi: float
    """Pointwise mutual information with the code, bits."""


@dataclass(frozen=True)
class CodeRow:
    """A code of the same group at the position before, or after, the places at which a code fires."""

    label: str
    count: int
    share: float
    """Of the places that were counted, 0 to 1."""
    pmi: float
    """Pointwise mutual information of the two, bits."""


class TokenCounts(NamedTuple):
    """How often each token is in the text of a store, and how often with text after it in the same sequence."""

    everywhere: Int64[np.ndarray, " token"]
    followed: Int64[np.ndarray, " token"]


_counted: WeakKeyDictionary[CodeStore, TokenCounts] = WeakKeyDictionary()
_counted_codes: WeakKeyDictionary[CodeStore, dict[tuple[str, int], np.ndarray]] = WeakKeyDictionary()


def token_counts(store: CodeStore) -> TokenCounts:
    """Count the tokens of a store, once: the counts live as long as the store does."""
    found = _counted.get(store)
    if found is None:
        found = _counted[store] = _count(store)
    return found


def _count(store: CodeStore) -> TokenCounts:
    special = store.is_special()
    everywhere = np.zeros(0, np.int64)
    for start in range(0, store.n_tokens, _AT_ONCE):
        stop = min(start + _AT_ONCE, store.n_tokens)
        tokens = store.tokens(start, stop)
        found = np.bincount(tokens, minlength=len(everywhere))
        found -= np.bincount(tokens[np.flatnonzero(special[start:stop])], minlength=len(found))
        found[: len(everywhere)] += everywhere
        everywhere = found
    ends = np.unique(np.concatenate([store.starts[1:] - 1, np.flatnonzero(special) - 1]))
    ends = ends[ends >= 0]
    ends = ends[~special[ends]]
    unfollowed = np.bincount(tokens_at(store, ends), minlength=len(everywhere))
    return TokenCounts(everywhere.astype(np.int64), (everywhere - unfollowed).astype(np.int64))


def tokens_at(store: CodeStore, positions: Int64[np.ndarray, " place"]) -> Int64[np.ndarray, " place"]:
    """Return the tokens at flat positions, ascending; only the stretches of the store that hold one are read."""
    found = np.empty(len(positions), np.int64)
    blocks = positions // _BLOCK
    for first, last in pairwise([*np.flatnonzero(np.diff(blocks, prepend=-1)).tolist(), len(positions)]):
        start = int(positions[first])
        found[first:last] = store.tokens(start, int(positions[last - 1]) + 1)[positions[first:last] - start]
    return found


def code_counts_of_text(store: CodeStore, code: Code, ids: Integer[np.ndarray, "token group k"]) -> Int64[np.ndarray, " code"]:
    """Count at how many positions of text each code of a code's group fires, once for each group; `ids` are those of its site."""
    known, place = _counted_codes.setdefault(store, {}), (code.hook_name, code.group or 0)
    if place not in known:
        # `store.counts(special=False)` says the same of all groups, but maps the ids a second time.
        everywhere = store.counts(code.hook_name)[place[1]]
        special = ids[np.flatnonzero(store.is_special()), place[1]]
        known[place] = everywhere - firing_counts(special[:, None], len(everywhere))[0]
    return known[place]


def neighbours(store: CodeStore, positions: Int64[np.ndarray, " place"], step: int) -> Int64[np.ndarray, " neighbour"]:
    """Return the positions of text one step before (-1) or after (1), of the same sequence."""
    beside = positions + step
    inside = (beside >= 0) & (beside < store.n_tokens)
    positions, beside = positions[inside], beside[inside]
    later = np.maximum(positions, beside)
    first = np.asarray(store.starts)[store.sequence_of(later)] == later
    keep: Bool[np.ndarray, " place"] = ~first & ~store.is_special()[beside]
    return beside[keep]


def token_rows(tokens: Int64[np.ndarray, " place"], among: Int64[np.ndarray, " token"], words: Words, n: int) -> tuple[TokenRow, ...]:
    """Return the tokens that say most of a code, greatest share times PMI first.

    Args:
        tokens: Those at the places.
        among: How often each token is at any place of the kind.
        words: Their text.
        n: Most rows.

    >>> rows = token_rows(np.array([1, 1, 1, 0]), np.array([6, 3, 3]), Words(None), 5)
    >>> [(row.token, row.count, row.share, row.pmi) for row in rows]
    [(1, 3, 0.75, 1.58...), (0, 1, 0.25, -1.0)]
    """
    values, counts = np.unique(tokens, return_counts=True)
    shares, pmi, order = _ranked(values, counts, len(tokens), among, int(among.sum()), n)
    return tuple(
        TokenRow(int(values[i]), words.text(values[i : i + 1]), int(counts[i]), float(shares[i]), float(pmi[i])) for i in order.tolist()
    )


def code_rows(
    ids: Integer[np.ndarray, "neighbour k"], code: Code, among: Int64[np.ndarray, " code"], n_text: int, n: int
) -> tuple[CodeRow, ...]:
    """Return the codes of a code's group that say most of it, greatest share times PMI first.

    Args:
        ids: Of the group, at the positions beside those at which the code fires.
        code: The code.
        among: At how many positions of text each code of the group fires.
        n_text: How many positions of text there are.
        n: Most rows.
    """
    found = firing_counts(ids[:, None], len(among))[0]
    values = np.flatnonzero(found)
    shares, pmi, order = _ranked(values, found[values], len(ids), among, n_text, n)
    return tuple(
        CodeRow(str(Code(code.layer, code.site, code.group, int(values[i]))), int(found[values[i]]), float(shares[i]), float(pmi[i]))
        for i in order.tolist()
    )


def _ranked(
    values: np.ndarray, counts: np.ndarray, n_places: int, among: np.ndarray, total: int, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shares = counts / max(n_places, 1)
    pmi = np.log2(shares * total / among[values]) if len(values) else np.zeros(0)
    return shares, pmi, np.lexsort((values, -counts, -shares * pmi))[:n]
