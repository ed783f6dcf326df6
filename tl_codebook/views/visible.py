"""Text that shows what it holds: control, invisible and direction-changing characters as marks, bytes that are no text as hexadecimal."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer

from tl_codebook.characters import visible, written
from tl_codebook.store.text import Vocabulary, decode

__all__ = ["Part", "Piece", "escape", "pieces_of", "shown"]

_LONGEST = 2000
"""Characters of a title or label that are kept."""

Kind = Literal["text", "mark", "line"]


class Part(NamedTuple):
    """A run of characters of one kind: ``text``, a ``mark`` that stands for something invisible, or the mark of a ``line`` end."""

    kind: Kind
    text: str


class Piece(NamedTuple):
    """What is shown of one token."""

    id: int
    parts: tuple[Part, ...]
    special: bool = False

    @property
    def text(self) -> str:
        """Return the token in one line, every character visible."""
        return "".join(part.text for part in self.parts)


def _mark(character: str) -> str:
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)  # the pictures of control characters
    return "\u2421" if number == 0x7F else written(character)


def _parts(text: str) -> Iterator[Part]:
    """Cut a text into what can be shown as it is, and marks for what cannot."""
    plain = ""
    for character in text:
        if visible(character):
            plain += character
            continue
        if plain:
            yield Part("text", plain)
            plain = ""
        if character == "\n":
            yield Part("line", "\u21b5")
        elif character == "\t":
            yield Part("mark", "\u21e5")
        else:
            yield Part("mark", _mark(character))
    if plain:
        yield Part("text", plain)


def shown(value: object) -> str:
    r"""Return a value as one line of text in which every character is visible; very long ones are cut.

    >>> shown("a\x1b[31mb\u202ec\ud800\n"), shown(3)
    ('a␛[31mb\\u202ec\\ud800↵', '3')
    """
    text = str(value)
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "\u2026"
    return "".join(part.text for part in _parts(cut))


def escape(value: object) -> str:
    """Return a value as HTML text of one line, fit for attributes in quotes too.

    >>> escape("<b>&'")
    '&lt;b&gt;&amp;&#x27;'
    """
    return html.escape(shown(value), quote=True)


def pieces_of(tokens: Integer[np.ndarray, " token"], vocabulary: Vocabulary | None, special: Any = None) -> list[Piece]:
    r"""Return what is shown of each token of a sequence.

    A character that lies in several tokens is shown by the first of them; the others show their bytes (``\x9f``), as do bytes that are no
    text. A token without text shows its id (``#17``).

    Args:
        tokens: The ids.
        vocabulary: The bytes of each id; None shows ids alone.
        special: A bool for each token: which are no text (BOS).

    Raises:
        DataError: an id that the vocabulary does not have.

    >>> words = Vocabulary.of_pieces([b"a\n", b"\xf0\x9f", b"\x98\x80", b"\xff"])
    >>> [piece.text for piece in pieces_of(np.array([0, 1, 2, 3]), words)]
    ['a↵', '😀', '\\x98\\x80', '\\xff']
    """
    tokens = np.asarray(tokens)
    flags = [False] * len(tokens) if special is None else [bool(flag) for flag in special]
    if vocabulary is None:
        return [Piece(token, (Part("text", f"#{token}"),), flag) for token, flag in zip(tokens.tolist(), flags, strict=True)]
    data, ends = vocabulary.join(tokens)
    text = decode(data)
    starts = np.arange(len(data) + 1) if text.starts is None else text.starts
    own: list[list[Part]] = [[] for _ in range(len(tokens))]
    owner = np.searchsorted(ends, np.arange(len(data)), side="right").tolist()
    for character, start, stop in zip(text.text, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        first = owner[start]
        if character == "\ufffd" and data[start:stop] != b"\xef\xbf\xbd":  # bytes that are no character
            rest = range(start, stop)
        else:
            if not own[first] and unicodedata.category(character).startswith("M"):
                own[first].append(Part("mark", "\u25cc"))  # a ring for what would sit on the token before
            own[first].extend(_parts(character))
            rest = range(start + 1, stop) if owner[stop - 1] != first else range(0)
        for byte in rest:
            if owner[byte] != first or rest.start == start:
                own[owner[byte]].append(Part("mark", f"\\x{data[byte]:02x}"))
    found = []
    for token, parts, flag in zip(tokens.tolist(), own, flags, strict=True):
        found.append(Piece(token, tuple(_joined(parts)) or (Part("mark", f"#{token}"),), flag))
    return found


def _joined(parts: list[Part]) -> Iterator[Part]:
    """Join neighbours of one kind; ends of lines stay apart."""
    kind: Kind | None = None
    text = ""
    for part in parts:
        if part.kind == kind and kind != "line":
            text += part.text
            continue
        if kind is not None:
            yield Part(kind, text)
        kind, text = part
    if kind is not None:
        yield Part(kind, text)
