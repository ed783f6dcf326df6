"""Count pairs of codes in a store, a row of the table at a time: nothing of the size of codes times codes is ever made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tl_codebook.names import Code, split_hook_name
from tl_codebook.store.counting import once

__all__ = ["PairCounts", "code_at", "count_pairs", "margins", "pair_starts"]

_AT_ONCE = 1 << 22
"""Ids looked up at a time."""


class PairCounts(NamedTuple):
    """The pairs of codes of two sites that fire together at least so often. Codes are numbered through the groups."""

    earlier: Int[np.ndarray, " pair"]
    later: Int[np.ndarray, " pair"]
    together: Int[np.ndarray, " pair"]


def code_at(store: Any, name: str, number: int) -> Code:
    """Return the code of a site that has a number, counted through its groups."""
    book = store.sites[name]
    layer, site = split_hook_name(name)
    group, code = divmod(int(number), book.n_codes)
    return Code(layer, site, group if book.n_groups > 1 else None, code)


def pair_starts(store: Any, lag: int) -> Bool[np.ndarray, " token"]:
    """Tell of each stored position whether it and the one `lag` later are text of one sequence; special tokens are no text."""
    text = ~np.asarray(store.is_special(), dtype=bool)
    if lag == 0:
        return text
    starts = np.zeros_like(text)
    for first in range(0, len(text) - lag, _AT_ONCE):
        here = np.arange(first, min(first + _AT_ONCE, len(text) - lag))
        starts[here] = text[here] & text[here + lag] & (store.sequence_of(here) == store.sequence_of(here + lag))
    return starts


def _fired(store: Any, name: str, number: int) -> Int[np.ndarray, " position"]:
    return np.asarray(store.positions(code_at(store, name, number)))


def margins(store: Any, name: str, starts: Bool[np.ndarray, " token"], lag: int, groups: Iterable[int]) -> Int[np.ndarray, " code"]:
    """Return at how many of the places a code fires, for each code of a site, `lag` positions after them; 0 for those of other groups."""
    book = store.sites[name]
    result = np.zeros(book.n_groups * book.n_codes, dtype=np.int64)
    for group in groups:
        for number in range(group * book.n_codes, (group + 1) * book.n_codes):
            fired = _fired(store, name, number)
            result[number] = np.count_nonzero(starts[fired[np.searchsorted(fired, lag) :] - lag])
    return result


def _repeats(store: Any, name: str) -> bool:
    """Tell whether some position has a code in two slots; the index counts it once."""
    ids, n_codes, slots = store.ids(name), store.sites[name].n_codes, 0
    fired = int(np.asarray(store.counts(name)).sum())
    if fired == ids.size:  # every slot is full, and each is counted
        return False
    step = max(1, _AT_ONCE // max(1, int(np.prod(ids.shape[1:]))))
    for first in range(0, len(ids), step):
        slots += int(np.count_nonzero(ids[first : first + step] != n_codes))
    return slots != fired


def count_pairs(
    store: Any,
    earlier: str,
    later: str,
    starts: Bool[np.ndarray, " token"],
    lag: int,
    least: int,
    n_earlier: Int[np.ndarray, " earlier"],
    n_later: Int[np.ndarray, " later"],
) -> Iterator[PairCounts]:
    """Count at how many places a code of one site fires and, `lag` positions later, a code of the other; those with `least` or more.

    Args:
        store: A `CodeStore`.
        earlier, later: Hook names.
        starts: The places (`pair_starts`).
        lag: Positions between the two.
        least: Pairs that fire together less often are left out, >= 1.
        n_earlier, n_later: How often each code fires at these places (`margins`); one that fires less often than `least` is in no pair.

    Yields:
        The pairs of each code of the earlier site that fires so often, one code after the other.
    """
    book = store.sites[later]
    ids, width, repeats = store.ids(later), book.n_codes + 1, _repeats(store, later)
    shift = np.arange(book.n_groups, dtype=np.int64)[None, :, None] * width
    step = max(1, _AT_ONCE // max(1, book.n_groups * book.k))
    often = n_later >= least
    for number in np.flatnonzero(n_earlier >= least).tolist():
        fired = _fired(store, earlier, number)
        fired = fired[starts[fired]] + lag
        row = np.zeros(book.n_groups * width, dtype=np.int64)
        for first in range(0, len(fired), step):
            found = ids[fired[first : first + step]]
            found = once(found, book.n_codes) if repeats else found
            row += np.bincount((found + shift).reshape(-1), minlength=len(row))
        together = row.reshape(book.n_groups, width)[:, :-1].reshape(-1)  # the last of each group stands for no code
        chosen = np.flatnonzero((together >= least) & often)
        yield PairCounts(np.full(len(chosen), number, dtype=np.int64), chosen, together[chosen])
