"""A store in memory with what a search reads of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tl_codebook.store.text import Vocabulary


@dataclass
class Book:
    n_codes: int
    n_groups: int
    k: int


class MemoryStore:
    """Sequences of token ids, and the ids [token group k] of each site (the number of codes for an empty slot)."""

    def __init__(self, sequences, ids, n_codes, vocabulary=None, special=()):
        self.flat = np.array([token for row in sequences for token in row], np.int64)
        self.starts = np.cumsum([0, *map(len, sequences)])
        self.arrays = {site: np.asarray(values, np.uint16) for site, values in ids.items()}
        self.sites = {site: Book(n_codes, *values.shape[1:]) for site, values in self.arrays.items()}
        self.vocabulary = vocabulary if vocabulary is None or isinstance(vocabulary, Vocabulary) else Vocabulary.of_pieces(vocabulary)
        self.n_tokens, self.n_sequences = len(self.flat), len(sequences)
        self.special = np.isin(self.flat, list(special))

    def tokens(self, start, stop):
        return self.flat[start:stop]

    def sequence(self, index):
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def ids(self, site):
        return self.arrays[site]

    def is_special(self):
        return self.special

    def counts(self, site):
        """Count by the definition: a set of codes at each position."""
        book = self.sites[site]
        counts = np.zeros((book.n_groups, book.n_codes), np.int64)
        for row in self.arrays[site]:
            for group, slots in enumerate(row):
                for code in set(slots.tolist()) - {book.n_codes}:
                    counts[group, code] += 1
        return counts
