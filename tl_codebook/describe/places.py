"""Places of a store at which a code fires, or does not, and what stands around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from tl_codebook.characters import escaped
from tl_codebook.describe.words import Words
from tl_codebook.errors import CheckpointError
from tl_codebook.names import Code
from tl_codebook.store.manifest import AGAIN
from tl_codebook.store.store import CodeStore

__all__ = ["CodeContext", "Firings", "context_at", "places_without", "rows_ending_at"]


@dataclass(frozen=True)
class CodeContext:
    """One place at which a code fires, with the tokens around it, none of another sequence."""

    sequence: int
    """Number of the sequence."""
    position: int
    """Flat position at which the code fires."""
    start: int
    """Flat position of the first of `tokens`."""
    tokens: tuple[int, ...]
    before: str | None
    """Text of the tokens before the place; None where the store has no text."""
    text: str | None
    """Text of the token at the place."""
    after: str | None
    slot: int
    """The first slot that holds the code, 0 for the most similar code of the place."""
    similarity: float | None = None
    """Cosine of the code and what it was chosen for, -1 to 1; None where it was not measured."""

    @property
    def index(self) -> int:
        """Return where in `tokens` the code fires."""
        return self.position - self.start

    def __str__(self) -> str:
        if self.before is None or self.text is None or self.after is None:
            tokens = [str(token) for token in self.tokens]
            tokens[self.index] = f"[{tokens[self.index]}]"
            return " ".join(tokens)
        return f"{escaped(self.before)}[{escaped(self.text)}]{escaped(self.after)}"


class Firings:
    """Where in the text a code fires, and the firings that are looked at closely: all, or so many drawn at random.

    Args:
        store: The store.
        code: A code that it has.
        n: Most firings to look at.
        rng: Draws them.
        ids: Of the code's site, where they are mapped already.

    Raises:
        CheckpointError: index and ids contradict each other.
    """

    def __init__(self, store: CodeStore, code: Code, n: int, rng: np.random.Generator, ids: np.ndarray | None = None) -> None:
        everywhere = store.positions(code)
        special = store.is_special()
        self.positions = everywhere[~special[everywhere]]
        """All of them, ascending."""
        self.n_special = len(everywhere) - len(self.positions)
        self.sample = self.positions
        if len(self.positions) > n:
            self.sample = np.sort(rng.choice(self.positions, n, replace=False, shuffle=False))
        ids = store.ids(code.hook_name) if ids is None else ids
        holds = ids[self.sample, code.group or 0] == code.code
        if not holds.any(1).all():
            raise CheckpointError(f"the index of {store.path} has {code} where its ids have not: its files are damaged. {AGAIN}")
        self.slots: Int64[np.ndarray, " place"] = holds.argmax(1)
        """The first slot of each of the sample that holds the code."""
        self.by_slot: tuple[int, ...] = tuple(holds.sum(0).tolist())

    def best(self, n: int) -> Int64[np.ndarray, " best"]:
        """Return which of the sample have the code in the first slots: these first, then in the order of the text."""
        return np.lexsort((self.sample, self.slots))[:n]


def context_at(
    store: CodeStore, position: int, slot: int, words: Words, before: int, after: int, similarity: float | None = None
) -> CodeContext:
    """Return a place with at most so many tokens before and after it, and their text."""
    cut = store.context_at(position, before, after)
    text = words.around(cut.tokens, cut.index)
    return CodeContext(cut.sequence, position, cut.start, tuple(cut.tokens.tolist()), text[0], text[1], text[2], slot, similarity)


def places_without(store: CodeStore, positions: Int64[np.ndarray, " place"], n: int, rng: np.random.Generator) -> Int64[np.ndarray, " _"]:
    """Return up to `n` positions of text at random that are none of these."""
    free = ~store.is_special()
    free[positions] = False
    places = np.flatnonzero(free)
    return np.sort(rng.choice(places, n, replace=False)) if len(places) > n else places


def rows_ending_at(store: CodeStore, positions: Int64[np.ndarray, " place"], most: int) -> list[Int64[np.ndarray, " token"]]:
    """Return for each position the tokens of its sequence up to it, at most so many, in few different lengths.

    What is cut off is cut off on the left, except for a special token at the start (BOS), without which a model is not itself. Lengths
    above 8 are multiples of 8, so that rows run together without padding.
    """
    special, rows = store.is_special(), []
    for position, number in zip(positions.tolist(), store.sequence_of(positions).tolist(), strict=True):
        first = store.sequence(number).start
        length = min(position + 1 - first, most)
        length -= length % 8 if length > 8 else 0
        row = store.tokens(position + 1 - length, position + 1)
        if special[first] and length > 1:
            row[0] = store.tokens(first, first + 1)[0]
        rows.append(row)
    return rows
