"""Patterns of English text that codes may stand for, and where each of them holds in a store.

Each is a regular expression with one group: what is tested is whether a code fires on the token in which the group begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32

from tl_codebook.errors import ConfigError
from tl_codebook.store.concepts import Searchable, match_text
from tl_codebook.store.text import Vocabulary

__all__ = ["PATTERNS", "PatternClasses", "check_patterns", "pattern_classes"]


def _words(*words: str) -> str:
    """Return a pattern of whole words, in capitals or not."""
    return rf"\b((?i:{'|'.join(words)}))\b"


PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        # Punctuation
        "comma": r"(,)",
        "full stop": r"(\.)(?!\d)",
        "question mark": r"(\?)",
        "exclamation mark": r"(!)",
        "end of a sentence": r"([.!?])(?=[\"”’']?(?:\s|\Z))",
        "colon or semicolon": r"([:;])",
        "hyphen or dash": r"([-–—])",
        "bracket": r"([()\[\]{}])",
        "opening quotation mark": r"(?<![\w.,!?…;:'’])([\"“])(?=\S)",
        "closing quotation mark": r"(?<=[\w.,!?…;:'’-])([\"”])(?!\w)",
        "inside a quotation": r"(?:(?<![\w.,!?…;:'’])[\"“](?=\S)|\G(?!\A))\s*([^\s\"“”])",
        "newline": r"(\n)",
        # Forms of a word
        "capitalised word": r"\b(\p{Lu}\p{Ll}+)",
        "capitalised word inside a sentence": r"(?<=[\p{Ll},;] )(\p{Lu}\p{Ll}+)",
        "word in capitals": r"\b(\p{Lu}{2,})\b",
        "-ed": r"(?<=\p{L}\p{L})(ed)\b",
        "-ing": r"(?<=\p{L}\p{L})(ing)\b",
        "-ly": r"(?<=\p{L}\p{L})(ly)\b",
        "-er or -est": r"(?<=\p{L}\p{L})(er|est)\b",
        "-tion": r"(?<=\p{L}\p{L})(tions?)\b",
        "-s": r"(?<=\p{L}{2}[b-hj-rtv-z])(s)\b(?!['’])",  # of a plural or a verb; not -is, -us, -ss, -as, nor was, yes
        "contraction": r"(?<=\p{L})(['’](?:s|t|re|ve|ll|d|m))\b",
        "'s": r"(?<=\p{L})(['’]s)\b",
        # Numbers
        "digit": r"(\d)",
        "number": r"(?<![\d.,])(\d[\d.,]*)",
        "year": r"\b((?:1[5-9]|20)\d\d)\b",
        "number in words": _words(
            *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twenty", "hundred", "thousand", "million")
        ),
        # Kinds of words
        "article": _words("a", "an", "the"),
        "he, him, his": _words("he", "him", "his", "himself"),
        "she, her, hers": _words("she", "her", "hers", "herself"),
        "they, them, their": _words("they", "them", "their", "theirs", "themselves"),
        "he, she or they": _words("he", "she", "they"),
        "I, me, my": r"\b(I|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself)\b",
        "you, your": _words("you", "your", "yours", "yourself"),
        "we, us, our": r"\b([Ww]e|us|[Oo]urs?|[Oo]urselves)\b",
        "conjunction": _words("and", "but", "or", "nor", "so", "yet", "because", "although", "while", "if", "than"),
        "preposition": _words(
            *("of", "in", "to", "for", "with", "on", "at", "by", "from", "into", "about", "over", "under", "after", "before", "between")
        ),
        "modal verb": _words("can", "could", "will", "would", "shall", "should", "may", "might", "must"),
        "form of be": _words("am", "is", "are", "was", "were", "be", "been", "being"),
        "form of have": _words("have", "has", "had", "having"),
        "form of do": _words("do", "does", "did", "done", "doing"),
        "negation": r"((?i:\b(?:not|no|never|none|nothing|nobody|neither|cannot)\b)|(?<=\p{L})n['’]t\b)",
        "question word": _words("who", "whom", "whose", "what", "when", "where", "why", "how", "which"),
        "this, that, these, those": _words("this", "that", "these", "those"),
        "verb of saying": _words("say", "says", "said", "ask", "asks", "asked", "tell", "told", "replied", "answered", "cried", "shouted"),
        "word of amount": _words("all", "some", "many", "much", "more", "most", "every", "each", "any", "few", "several", "both"),
        "day or month": (
            r"\b((?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|January|February|March|April|June|July|August|(?:Septem|Octo|Novem|Decem)ber)\b"
        ),
        # Places in a text
        "start of a text": r"\A\s*(\S)",
        "start of a sentence": r"(?:\A|[.!?][\"”’']?\s+)[\"“‘]?(\p{Lu})",
        "word after 'the'": r"\b(?i:the) (\w+)",
        "word after 'a' or 'an'": r"\b(?i:an?) (\w+)",
        "word after 'to'": r"\b(?i:to) (\w+)",
        "word after a comma": r", (\w+)",
        "name": r"\b(?:named|called|name is|name was|Mr\.?|Mrs\.?|Ms\.?|Miss|Dr\.?|[Ss]aid|[Aa]sked|[Rr]eplied) (\p{Lu}\p{Ll}+)",
        "first name of two": r"(?<=\p{Ll},? )(\p{Lu}\p{Ll}+)(?= \p{Lu}\p{Ll}+)",
    }
)
"""Name -> regular expression, the library that `label_codes` tries by default. For other text, give it a mapping of your own, or
``PATTERNS | {"name": r"..."}``."""

_BITS = 16
"""Patterns that are taken together: they make at most 2**16 classes of places."""


class PatternClasses(NamedTuple):
    """Some patterns, and which of them hold at each position of a store."""

    names: list[str]
    patterns: list[str]
    of_position: Int32[np.ndarray, " token"]
    """The class of each position: positions of one class are those at which the same of the patterns hold."""
    holds: Float64[np.ndarray, "class pattern"]
    """1 where a pattern holds at the positions of a class, else 0."""


def check_patterns(patterns: Mapping[str, str] | None) -> dict[str, str]:
    """Return the patterns to try, `PATTERNS` by default.

    Raises:
        ConfigError: no mapping of names to regular expressions.

    >>> len(check_patterns(None)) > 40, check_patterns({})
    (True, {})
    """
    chosen = PATTERNS if patterns is None else patterns
    if not isinstance(chosen, Mapping):
        raise ConfigError(f"patterns={str(chosen)[:80]!r} was given. Give a mapping of names to regular expressions, or None for PATTERNS.")
    for name, pattern in chosen.items():
        if not isinstance(name, str) or not name.strip() or not isinstance(pattern, str):
            raise ConfigError(f"patterns maps {name!r:.80} to {pattern!r:.80}. Give names and regular expressions, both str.")
    return dict(chosen)


def pattern_classes(
    store: Searchable, patterns: Mapping[str, str], *, timeout: float, vocabulary: Vocabulary | None = None
) -> list[PatternClasses]:
    r"""Find where patterns hold, up to 16 of them at a time.

    Args:
        store: With text.
        patterns: Name -> regular expression; a match marks the token in which the first group begins (without a group: the match).
        timeout: Seconds of matching for each pattern, after which it is given up.
        vocabulary: For a store that was collected without a tokenizer.

    Raises:
        ConfigError: a pattern that is none.
        SearchTimeoutError: a pattern that takes longer than `timeout`.
        DataError: a store without text.

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> (classes,) = pattern_classes(store, {"four": r"(w4)", "last": r"(w\d)\Z"}, timeout=2.0)
    >>> [classes.holds[number].tolist() for number in classes.of_position[[2, 3, 6]]]  # w4, w5, w4
    [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    named = list(patterns.items())
    found = []
    for start in range(0, len(named), _BITS):
        some = named[start : start + _BITS]
        marks = np.zeros(store.n_tokens, dtype=np.uint16)
        for bit, (_, pattern) in enumerate(some):
            marks[match_text(store, pattern, timeout=timeout, vocabulary=vocabulary).positions()] |= np.uint16(1 << bit)
        sets = np.unique(marks)
        holds: Bool[np.ndarray, "class pattern"] = (sets[:, None] >> np.arange(len(some), dtype=np.uint16)) & 1 == 1
        of_position = np.searchsorted(sets, marks).astype(np.int32)
        found.append(PatternClasses([name for name, _ in some], [pattern for _, pattern in some], of_position, holds.astype(np.float64)))
    return found
