"""How often the codes of a store fire, in all and at some positions.

A code fires at a position if any of the k slots is it, and then once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Integer

from tl_codebook.errors import ConfigError, DataError, check_whole
from tl_codebook.store.concepts import Searchable

__all__ = ["CodeCounts", "code_counts", "firing_counts", "nearest_in_use", "once", "slot_of"]

_ROWS_AT_ONCE, _ROWS_IN_CACHE = 2**17, 2**12  # positions that are read, and that are counted, at a time


class CodeCounts(NamedTuple):
    """How often the codes of a site fire, and how often where a concept holds, in positions."""

    hits: Int64[np.ndarray, "group code"]
    activations: Int64[np.ndarray, "group code"]
    occurrences: int
    n_positions: int
    """All that were counted."""

    def precision(self) -> Float64[np.ndarray, "group code"]:
        """Return the share of a code's activations at which the concept holds; 0 for a code that never fires."""
        return self.hits / np.maximum(self.activations, 1)

    def recall(self) -> Float64[np.ndarray, "group code"]:
        """Return the share of the concept's positions at which a code fires; 0 where the concept never holds."""
        return self.hits / max(self.occurrences, 1)

    def f1(self) -> Float64[np.ndarray, "group code"]:
        """Return the harmonic mean of precision and recall."""
        return 2 * self.hits / np.maximum(self.activations + self.occurrences, 1)

    def mi(self) -> Float64[np.ndarray, "group code"]:
        """Return the mutual information of code and concept in bits."""
        total = max(self.n_positions, 1)
        fires, holds = self.activations / total, self.occurrences / total
        both = self.hits / total
        information = np.zeros(self.hits.shape)
        cells = [(both, fires, holds), (fires - both, fires, 1 - holds)]
        cells += [(holds - both, 1 - fires, holds), (1 - fires - holds + both, 1 - fires, 1 - holds)]
        for joint, one, other in cells:
            there = joint > 1e-12  # what is less than a position is rounding
            information[there] += joint[there] * np.log2(joint[there] / (one * other)[there])
        return np.maximum(information, 0)


def slot_of(ids: Integer[np.ndarray, "token k"], code: int) -> Int64[np.ndarray, " token"]:
    """Return the first slot that holds a code at each position, 0 for the most similar code there, -1 where the code does not fire.

    >>> slot_of(np.array([[3, 5], [5, 5], [1, 2]]), 5)
    array([ 1,  0, -1])
    """
    holds = ids == code
    return np.where(holds.any(-1), holds.argmax(-1), -1)


def firing_counts(ids: Integer[np.ndarray, "token group k"], n_codes: int, distinct: bool = False) -> Int64[np.ndarray, "group code"]:
    """Return at how many positions each code fires, a code in several slots of one position once.

    Args:
        ids: Of some positions; `n_codes` stands for an empty slot.
        n_codes: How many codes a group has.
        distinct: Whether it is known that no slot repeats another, which saves the look.

    Raises:
        DataError: an id above `n_codes`.

    >>> firing_counts(np.array([[[0, 0]], [[2, 0]], [[3, 3]]]), 3)
    array([[2, 0, 1]])
    """
    n_tokens, n_groups, _ = ids.shape
    counts = np.zeros((n_groups, n_codes), np.int64)
    for start in range(0, n_tokens, _ROWS_IN_CACHE):
        rows = ids[start : start + _ROWS_IN_CACHE]
        slots = rows if distinct else once(rows, n_codes)
        for group in range(n_groups):
            found = np.bincount(slots[:, group].reshape(-1), minlength=n_codes + 1)
            if len(found) > n_codes + 1:
                raise DataError(
                    f"the store holds code {len(found) - 1} of a codebook of {n_codes}: its files are damaged. Collect it again."
                )
            counts[group] += found[:n_codes]
    return counts


def nearest_in_use(
    counts: Int64[np.ndarray, " code"], code: int, shuffled: Int64[np.ndarray, " code"], n: int = 10
) -> Int64[np.ndarray, " _"]:
    """Return the `n` other codes that fire nearly as often as a code, fewer where there are no more: one is drawn as a control.

    Args:
        counts: How often each fires.
        code: The code.
        shuffled: All codes in random order, which is that of equals.
        n: How many.

    >>> nearest_in_use(np.array([9, 4, 5, 1]), 2, np.array([3, 2, 1, 0]), n=2)
    array([1, 3])
    """
    others = shuffled[shuffled != code]
    return others[np.abs(counts[others] - counts[code]).argsort(kind="stable")][:n]


def once(ids: Integer[np.ndarray, "token group k"], empty: int) -> Integer[np.ndarray, "token group k"]:
    """Return ids in which no code stands in two slots of one position: the slots that repeat one are empty. Their order may change.

    >>> once(np.array([[[4, 4, 1]]]), 7)
    array([[[4, 7, 1]]])
    """
    k = ids.shape[-1]
    if k > 16:
        ids = np.sort(ids, axis=-1)
        np.copyto(ids[..., 1:], empty, where=ids[..., 1:] == ids[..., :-1])
        return ids
    slots = np.empty((k, *ids.shape[:2]), ids.dtype)
    for slot in range(k):
        slots[slot] = ids[..., slot]
    for later in range(1, k):  # for few slots faster than sorting: two are compared at all positions at once
        repeated = slots[0] == slots[later]
        for earlier in range(1, later):
            repeated |= slots[earlier] == slots[later]
        np.copyto(slots[later], empty, where=repeated)
    return np.moveaxis(slots, 0, -1)


def code_counts(
    store: Searchable,
    site: str,
    positions: Int64[np.ndarray, " position"],
    *,
    n_slots: int | None = None,
    special: bool = False,
) -> CodeCounts:
    """Count how often each code of a site fires, in all and at some positions.

    Args:
        store: The store.
        site: A hook name.
        positions: Ascending, each once.
        n_slots: Count only the first slots, those of the most similar codes, 1 to k; by default all.
        special: Count special tokens (BOS, EOS) as positions too.

    Raises:
        ConfigError: `n_slots` out of range.

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> counts = code_counts(store, "blocks.0.hook_mlp_out", np.array([2, 6]), n_slots=1)
    >>> int(counts.hits.sum()), int(counts.activations.sum())  # BOS is not counted
    (2, 5)
    """
    book, ids, is_special = store.sites[site], store.ids(site), store.is_special()
    apart = np.flatnonzero(is_special)
    if n_slots is not None:
        check_whole("n_slots", n_slots, 1)
        if n_slots > book.k:
            raise ConfigError(f"n_slots={n_slots} was asked for, but {site} stores {book.k} codes a position. Give 1 to {book.k}.")
    every = np.asarray(store.counts(site), np.int64)
    # With no slot empty or repeated, the k codes of a position are k activations.
    distinct = int(every.sum()) == store.n_tokens * book.n_groups * book.k
    if n_slots is not None and n_slots < book.k:
        every = firing_counts(ids[:, :, :n_slots], book.n_codes, distinct)

    def at(rows: np.ndarray) -> np.ndarray:
        total = np.zeros_like(every)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            total += firing_counts(ids[rows[start : start + _ROWS_AT_ONCE]][:, :, :n_slots], book.n_codes, distinct)
        return total

    if not special:
        every = every - at(apart)
        positions = positions[~is_special[positions]]
    n_positions = store.n_tokens - (0 if special else len(apart))
    if 2 * len(positions) > n_positions:  # what fires elsewhere is less to count
        elsewhere = np.ones(store.n_tokens, bool) if special else ~is_special
        elsewhere[positions] = False
        hits = every - at(np.flatnonzero(elsewhere))
    else:
        hits = at(positions)
    return CodeCounts(hits, every, len(positions), n_positions)
