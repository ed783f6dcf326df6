"""How tokens are written for a reader: their text where the store has it, else their id; nothing of it acts on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np

from tl_codebook.store.store import CodeStore
from tl_codebook.store.text import Vocabulary, decode, load_vocabulary

__all__ = ["Words", "escaped", "shown"]


class Words:
    """The text of tokens, None where there is none: a store without a tokenizer, or ids that its vocabulary does not have."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.vocabulary = vocabulary

    @classmethod
    def of_store(cls, store: CodeStore) -> Words:
        """Read the vocabulary that lies beside a store, once."""
        found = _words.get(store)
        if found is None:
            found = _words[store] = cls(load_vocabulary(store.path))
        return found

    def text(self, tokens: Sequence[int] | np.ndarray) -> str | None:
        """Return the text of a run of tokens; a character that is cut at an end comes out as U+FFFD.

        >>> Words(Vocabulary.of_pieces([b"New", b" York"])).text([0, 1])
        'New York'
        """
        return self.around(tokens, len(tokens))[0]

    def around(self, tokens: Sequence[int] | np.ndarray, index: int) -> tuple[str, str, str] | tuple[None, None, None]:
        """Return the text before a token, its own, and the text after it.

        >>> Words(Vocabulary.of_pieces([b"New", b" York"])).around([0, 1, 0], 1)
        ('New', ' York', 'New')
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if self.vocabulary is None or bool(((tokens < 0) | (tokens >= self.vocabulary.n_tokens)).any()):
            return None, None, None
        data, ends = self.vocabulary.join(tokens)
        edges = [0, *(int(ends[i - 1]) if i else 0 for i in (index, min(index + 1, len(tokens)))), len(data)]
        before, text, after = (decode(data[start:stop]).text for start, stop in pairwise(edges))
        return before, text, after


_words: WeakKeyDictionary[CodeStore, Words] = WeakKeyDictionary()


def escaped(text: str) -> str:
    r"""Write out every character that acts instead of being seen: control characters, escape sequences, marks that turn the direction.

    >>> escaped("red \x1b[31m, \u202e and \\")
    'red \\x1b[31m, \\u202e and \\\\'
    """
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(token: int, text: str | None) -> str:
    r"""Return how a table shows a token: its text in quotes, escaped, or its id.

    >>> shown(7, " it\n"), shown(7, None)
    ("' it\\n'", 'token 7')
    """
    return f"token {token}" if text is None else "'" + escaped(text) + "'"
