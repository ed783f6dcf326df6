"""Which characters of a text act or hide instead of being seen, and how they are written out so that they do neither.

Tokens, labels and what comes from files may hold any character. A control character can move the cursor of a terminal, a mark of direction
can turn a line around, and what has no width can make two labels look alike.
"""

from __future__ import annotations

import unicodedata

__all__ = ["escaped", "hostile", "visible", "without_hostile", "written"]

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
"""Letters and marks that show nothing, though Unicode counts them among what can be printed."""


def visible(character: str) -> bool:
    r"""Tell whether a reader sees a character as itself; of the spaces this is the common one alone.

    >>> [visible(character) for character in ("a", " ", "\u00e9", "\u00a0", "\x1b", "\u3164")]
    [True, True, True, False, False, False]
    """
    return character.isprintable() and character not in _BLANK and not "\U000e0100" <= character <= "\U000e01ef"


def hostile(character: str) -> bool:
    r"""Tell whether a character acts or hides: it is not `visible`, and no space either.

    Such are control characters (those of escape sequences and ends of a line among them), marks that turn the direction of writing, what
    has no width, letters that show nothing, halves of a character (lone surrogates), and code points that mean nothing to everybody.

    >>> [hostile(character) for character in ("a", "\u00a0", "\n", "\x9b", "\u202e", "\u200b", "\ud800")]
    [False, False, True, True, True, True, True]
    """
    return not visible(character) and unicodedata.category(character) != "Zs"


def written(character: str) -> str:
    r"""Return a character as Python writes it in a string.

    >>> print(written("\n"), written("\x1b"), written("\u202e"), written("\ud800"))
    \n \x1b \u202e \ud800
    """
    return character.encode("unicode_escape").decode("ascii")


def escaped(text: str) -> str:
    r"""Return a text as a terminal shows it, every character seen: what is not `visible` is written out, and so is the backslash.

    >>> print(escaped("red \x1b[31m, \u202e and \\"))
    red \x1b[31m, \u202e and \\
    """
    return "".join(c if visible(c) and c != "\\" else written(c) for c in text)


def without_hostile(text: str, keep: str = "") -> str:
    r"""Return a text in which every `hostile` character is written out, except some that may stay; other characters are left alone.

    >>> print(without_hostile("a\u00a0b\t\x1b", keep="\t") == "a\u00a0b\t\\x1b")
    True
    """
    return text if text.isascii() and text.isprintable() else "".join(written(c) if hostile(c) and c not in keep else c for c in text)
