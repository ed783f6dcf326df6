"""How tokens are written for a reader: their text where the store has it, else their id; nothing of it acts on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tl_codebook.characters import escaped
from tl_codebook.store.store import CodeStore
from tl_codebook.store.text import Vocabulary, decode

__all__ = ["Words", "shown"]


class Words:
    """The text of tokens, None where there is none: a store without a tokenizer, or ids that its vocabulary does not have."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self.vocabulary = vocabulary

    @classmethod
    def of_store(cls, store: CodeStore) -> Words:
        """Return the words of a store."""
        return cls(store.vocabulary)

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


def shown(token: int, text: str | None) -> str:
    r"""Return how a table shows a token: its text in quotes, escaped, or its id, which tells apart what is no whole character.

    >>> shown(7, " it\n"), shown(7, None), shown(131, "\ufffd")
    ("' it\\n'", 'token 7', 'token 131')
    """
    return f"token {token}" if text is None or "\ufffd" in text else "'" + escaped(text) + "'"
