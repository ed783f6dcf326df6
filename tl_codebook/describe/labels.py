"""Labels of codes without a language model: a regular expression, a token, the token before or the token after that a code stands for.

A label is chosen on one half of the sequences and measured on the other. Everything is counted in positions of text: special tokens (BOS,
EOS) are none, and a code fires once at a position however many slots hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64, Integer
from tqdm.auto import tqdm

from tl_codebook.describe.label_files import CodeLabel, CodeLabels, Kind, read_labels, write_labels
from tl_codebook.describe.patterns import PatternClasses, check_patterns, pattern_classes
from tl_codebook.describe.words import shown
from tl_codebook.errors import ConfigError, DataError, check_whole
from tl_codebook.names import Code, split_hook_name
from tl_codebook.store.concepts import sequence_starts
from tl_codebook.store.sites import Wanted, chosen_sites
from tl_codebook.store.store import CodeStore
from tl_codebook.store.text import Vocabulary

__all__ = ["CodeLabel", "CodeLabels", "label_codes", "read_labels", "write_labels"]

_COMMON = 0.5
"""What holds at more than this share of the positions says nothing about a code."""
_WRITE_NOTHING = ("q", "k", "qkv")
_AT_ONCE = 64  # codes whose logits are computed at a time


def label_codes(
    store: Any,
    *,
    sites: Wanted | None = None,
    patterns: Mapping[str, str] | None = None,
    n_slots: int | None = None,
    min_precision: float = 0.9,
    min_recall: float = 0.0,
    min_count: int = 20,
    tokens: bool = True,
    model: Any = None,
    n_logits: int = 10,
    seed: int = 0,
    timeout: float = 10.0,
    vocabulary: Vocabulary | None = None,
    progress: bool = True,
) -> CodeLabels:
    """Label the codes that a regular expression or a token explains; all others are counted as unlabelled.

    The sequences are split into halves at random. On one, each code gets the candidate of the greatest F1 among those with a precision of
    `min_precision` or more; on the other its precision and recall are measured, and the label stays if the precision is `min_precision` or
    more there too. (Pieces of one document may lie in both halves.) Candidates are the regular expressions; a token, or all tokens that
    differ in capitals and spaces alone; the same of the token before; and with a model the tokens that the code's vector makes most likely
    by itself (`direct_logit_effect`), taken for the token after, at sites that write something (not q, k, qkv). Of candidates as good as
    each other, the first in this order. What holds at more than half of all positions is no candidate: it would be precise for any code.

    Args:
        store: A `CodeStore`.
        sites: Sites, addresses or hook names (``"z"``, ``"L3.mlp_out"``, ``"L5.z.2"``); by default all.
        patterns: Name -> regular expression, whose first group is what a code is to fire on; by default `PATTERNS`, ``{}`` for none.
        n_slots: Only firings in the first slots count, those of the most similar codes, 1 to k; by default all.
        min_precision, min_recall: Least share in either half, 0 to 1.
        min_count: A code that fires less often than this in either half is rare and gets no label, >= 1.
        tokens: Try tokens and tokens before.
        model: The host with the codes of the store, to try tokens after too. This computes the logits of every code.
        n_logits: Tokens after that are tried for each code, >= 1.
        seed: Of the halves.
        timeout: Seconds of matching, for each regular expression, after which it is given up.
        vocabulary: For a store that was collected without a tokenizer.
        progress: Show a progress bar.

    Raises:
        ConfigError: an option that cannot be, a regular expression that is none, or a site from which no way to the logits is known.
        SearchTimeoutError: a regular expression that takes longer than `timeout`.
        DataError: a store of a single sequence, or one without text where there are patterns.
        UnknownHookError, LabelError: a site that is not stored, or something that is no name of one.
        BasisMismatchError: a model with other codes.

    Source: Tamkin et al. 2023, section 3 (precision and recall of codes for regular expressions); the halves are ours.

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=1)  # its only code fires everywhere
    >>> store = collect_codes(model, ["w3 w4", "w4 w5"], tmp_path / "store", progress=False)
    >>> labels = label_codes(store, patterns={"four": r"(w4)"}, min_count=1, min_precision=0.5, progress=False)
    >>> print(labels)
    2 of 2 codes labelled (held-out precision 0.5 or more), 0 unlabelled, of which 0 never fire and 0 fire fewer than 1 times in a half
      L0.mlp_out:0  four  (precision 0.500, recall 1.000)
      L1.mlp_out:0  four  (precision 0.500, recall 1.000)
    """
    for name, share in (("min_precision", min_precision), ("min_recall", min_recall)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"{name}={share!r} was asked for, but it is a share. Give 0 to 1.")
    for name, number in (("min_count", min_count), ("n_logits", n_logits)):
        check_whole(name, number, least=1)
    chosen, named = chosen_sites(store.sites, sites), check_patterns(patterns)
    if n_slots is not None:
        check_whole("n_slots", n_slots, least=1)
        fewer = next((site for site in chosen if n_slots > store.sites[site].k), None)
        if fewer is not None:
            raise ConfigError(f"n_slots={n_slots} was asked for, but {fewer} stores {store.sites[fewer].k} codes a position.")
    words = vocabulary or store.vocabulary
    if named and words is None:
        raise DataError(
            "this store has no text to match: it was collected without a tokenizer. Give vocabulary=vocabulary_of(tokenizer), or "
            "patterns={} for labels by token ids alone."
        )
    sides = _sides(store, seed)
    likely = {} if model is None else _likely_tokens(store, model, chosen, n_logits)
    facts: list[_Patterns | _Tokens] = []
    if named:
        facts += [_Patterns(sides, classes) for classes in pattern_classes(store, named, timeout=timeout, vocabulary=vocabulary)]
    facts += _token_facts(store, sides, words, ("token", "previous token") if tokens else (), ("next token",) if likely else ())

    rows, n_codes, n_dead, n_rare = [], 0, 0, 0
    total = sum(store.sites[site].n_codes * len(groups) for site, groups in chosen.items())
    with tqdm(total=total, desc="labelling codes", unit="code", disable=not progress) as bar:
        for code, positions in _firings(store, chosen, n_slots):
            bar.update(1)
            n_codes += 1
            fires = np.bincount(sides[positions], minlength=3)[:2]
            if fires.min() < min_count:
                n_dead += int(not fires.any())
                n_rare += int(fires.any())
                continue
            found = _best(facts, positions, fires, min_precision, min_recall, likely.get(code.hook_name), code)
            if found is not None:
                rows.append(found)
    names = {site: store.manifest["codes_sha256"][site] for site in chosen} if hasattr(store, "manifest") else {}
    counts = {"n_codes": n_codes, "n_dead": n_dead, "n_rare": n_rare, "min_count": min_count}
    return CodeLabels(rows, **counts, min_precision=float(min_precision), codes_sha256=names)


def _sides(store: Any, seed: int) -> Int32[np.ndarray, " token"]:
    """Return for each position the half that chooses (0), the one that measures (1), or 2 for a special token."""
    if store.n_sequences < 2:
        raise DataError("the store holds one sequence, of which no half can be held out. Collect more texts.")
    half = np.zeros(store.n_sequences, dtype=np.int32)
    half[np.random.default_rng(seed).permutation(store.n_sequences)[store.n_sequences // 2 :]] = 1
    sides = np.repeat(half, np.diff(sequence_starts(store), append=store.n_tokens))
    sides[store.is_special()] = 2
    return sides


def _firings(store: Any, chosen: Mapping[str, list[int]], n_slots: int | None) -> Iterator[tuple[Code, Int64[np.ndarray, " _"]]]:
    """Give each code, and where it fires."""
    for site, groups in chosen.items():
        # Opened anew for each site: the pages of a map that stays open would count as memory of this process.
        opened = CodeStore(store.path) if isinstance(store, CodeStore) else store
        book, ids = opened.sites[site], opened.ids(site)
        for group in groups:
            for number in range(book.n_codes):
                code = Code(None, site, group if book.n_groups > 1 else None, number)
                positions = opened.positions(code)
                if n_slots is not None and n_slots < book.k:
                    positions = positions[(ids[positions, group, :n_slots] == number).any(-1)]
                yield code, positions


class _Label(NamedTuple):
    """What a candidate would be called."""

    kind: Kind
    text: str
    pattern: str | None = None
    tokens: tuple[int, ...] = ()


class _Fact(ABC):
    """Something that has a value at each position, and candidates that hold at some of the values.

    Args:
        sides: The half of each position, 2 for a special token.
        values: Of each position, 0 to n - 1; -1 where there is none.
        n: How many values there are.
    """

    def __init__(self, sides: Int32[np.ndarray, " token"], values: Integer[np.ndarray, " token"], n: int) -> None:
        self.n = n
        self.bins = np.where((values < 0) | (sides == 2), 2 * n, values + sides.astype(np.int64) * n).astype(np.int32)
        candidates, hits = self.hits(slice(None))
        self.occurrences = np.zeros((2, int(candidates.max(initial=-1)) + 1))
        self.occurrences[:, candidates] = hits
        self.too_common = self.occurrences.sum(0) > _COMMON * np.count_nonzero(sides < 2)

    def counts(self, positions: Any) -> Int64[np.ndarray, "2 value"]:
        """Return how often each value is there at some positions, for each half."""
        return np.bincount(self.bins[positions], minlength=2 * self.n + 1)[:-1].reshape(2, self.n)

    @abstractmethod
    def hits(self, positions: Any) -> tuple[Int64[np.ndarray, " candidate"], Float64[np.ndarray, "2 candidate"]]:
        """Return candidates, all those that hold at any of the positions among them, and at how many each does in either half."""

    @abstractmethod
    def label(self, candidate: int) -> _Label:
        """Return what a candidate is called."""


class _Patterns(_Fact):
    """Regular expressions: the value of a position is which of them hold."""

    def __init__(self, sides: np.ndarray, classes: PatternClasses) -> None:
        self.classes = classes
        super().__init__(sides, classes.of_position, len(classes.holds))

    def hits(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(self.classes.names)), self.counts(positions) @ self.classes.holds

    def label(self, candidate: int) -> _Label:
        return _Label("regex", self.classes.names[candidate], self.classes.patterns[candidate])


class _Words(NamedTuple):
    """The tokens of a store; those that differ in capitals and spaces alone are one family."""

    ids: Int64[np.ndarray, " value"]
    texts: list[str]
    """As a reader sees them."""
    family: Int64[np.ndarray, " value"]
    """Of each token, -1 where it has none."""


class _Tokens(_Fact):
    """Tokens at, before or after a position: each is a candidate, and after them each family."""

    def __init__(self, kind: Kind, sides: np.ndarray, values: np.ndarray, words: _Words) -> None:
        self.kind, self.words = kind, words
        super().__init__(sides, values, len(words.ids))

    def hits(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        counts = self.counts(positions)
        there = np.flatnonzero(counts.any(0))
        found, families = counts[:, there].astype(np.float64), self.words.family[there]
        own = families >= 0
        sets, inverse = np.unique(families[own], return_inverse=True)
        sums = np.array([np.bincount(inverse, weights=row[own], minlength=len(sets)) for row in found])
        return np.concatenate([there, self.n + sets]), np.concatenate([found, sums], axis=1)

    def candidates(self, tokens: Int64[np.ndarray, " token"]) -> Int64[np.ndarray, " candidate"]:
        """Return the candidates that are about some token ids."""
        values = np.flatnonzero(np.isin(self.words.ids, tokens))
        families = self.words.family[values]
        return np.concatenate([values, self.n + families[families >= 0]])

    def label(self, candidate: int) -> _Label:
        if candidate < self.n:
            text = self.words.texts[candidate].removeprefix("token ")
            return _Label(self.kind, f"{self.kind} {text}", tokens=(int(self.words.ids[candidate]),))
        members = np.flatnonzero(self.words.family == candidate - self.n)
        texts = [self.words.texts[member] for member in members[:4]] + [f"{len(members) - 4} more like these"] * (len(members) > 4)
        ids = tuple(self.words.ids[members].tolist())
        return _Label(self.kind, f"{self.kind} {', '.join(texts[:-1])} or {texts[-1]}", tokens=ids)


def _token_facts(
    store: Any, sides: np.ndarray, vocabulary: Vocabulary | None, here: tuple[Kind, ...], after: tuple[Kind, ...]
) -> list[_Tokens]:
    if not here and not after:
        return []
    ids, values = np.unique(store.tokens(0, store.n_tokens), return_inverse=True)
    values = np.where(sides == 2, -1, values)
    begins = np.zeros(store.n_tokens, dtype=bool)
    begins[sequence_starts(store)] = True
    before, behind = np.full_like(values, -1), np.full_like(values, -1)
    before[1:][~begins[1:]] = values[:-1][~begins[1:]]
    behind[:-1][~begins[1:]] = values[1:][~begins[1:]]
    words = _words(ids, vocabulary)
    of_kind = {"token": values, "previous token": before, "next token": behind}
    return [_Tokens(kind, sides, of_kind[kind], words) for kind in (*here, *after)]


def _words(ids: Int64[np.ndarray, " value"], vocabulary: Vocabulary | None) -> _Words:
    texts, alike = [], []
    for token in ids.tolist():
        data = None if vocabulary is None or token >= vocabulary.n_tokens else vocabulary.bytes_of(token)
        try:
            text = None if data is None else data.decode()
            texts.append(shown(token, text))
        except UnicodeDecodeError:  # a part of a character
            text = None
            texts.append(f"bytes {data.hex(' ')}" if data else "")
        alike.append((text or "").strip().casefold())
    keys, family, sizes = np.unique(np.array(alike), return_inverse=True, return_counts=True)
    several = (sizes > 1) & (keys != "")
    number = np.where(several, np.cumsum(several) - 1, -1)
    return _Words(ids, texts, number[family])


def _likely_tokens(store: Any, model: Any, chosen: Iterable[str], n: int) -> dict[str, Int64[np.ndarray, "group code token"]]:
    """Return the tokens that each code makes most likely by itself, as `direct_logit_effect` has it, for the sites that write something."""
    import torch

    from tl_codebook.describe.logits import book_of, contribution
    from tl_codebook.describe.weights import logit_path
    from tl_codebook.hosts import as_host

    store.check_model(model)
    host, likely = as_host(model), {}
    for site in chosen:
        if split_hook_name(site)[1] in _WRITE_NOTHING:
            continue
        _, book = book_of(host, Code(None, site, 0, 0))
        path, found = logit_path(host, site), []
        codes = [Code(None, site, group, number) for group in range(book.n_groups) for number in range(book.n_codes)]
        for start in range(0, len(codes), _AT_ONCE):
            effect = path.logits(torch.cat([contribution(book, code) for code in codes[start : start + _AT_ONCE]]))
            found.append(effect.topk(min(n, effect.shape[1])).indices.cpu())
        likely[site] = torch.cat(found).reshape(book.n_groups, book.n_codes, -1).numpy()
    return likely


def _best(
    facts: Iterable[_Patterns | _Tokens],
    positions: Int64[np.ndarray, " position"],
    fires: Int64[np.ndarray, "2"],
    min_precision: float,
    min_recall: float,
    likely: Int64[np.ndarray, "group code token"] | None,
    code: Code,
) -> CodeLabel | None:
    """Return the label of a code: chosen on one half, kept if it holds on the other."""
    best: tuple[float, float, float, _Label] | None = None
    greatest = 0.0
    for fact in facts:
        candidates, hits = fact.hits(positions)
        occurrences = fact.occurrences[:, candidates]
        fits = (hits[0] > 0) & ~fact.too_common[candidates]
        fits &= (hits[0] / fires[0] >= min_precision) & (hits[0] >= min_recall * occurrences[0])
        if isinstance(fact, _Tokens) and fact.kind == "next token":
            if likely is None:
                continue
            fits &= np.isin(candidates, fact.candidates(likely[code.group or 0, code.code]))
        f1 = np.where(fits, 2 * hits[0] / (fires[0] + occurrences[0]), 0.0)
        at = int(f1.argmax()) if len(f1) else 0
        if len(f1) and f1[at] > greatest:
            greatest = float(f1[at])
            best = (float(hits[1, at]), float(occurrences[1, at]), greatest, fact.label(int(candidates[at])))
    if best is None:
        return None
    held, there, _, found = best
    precision, recall = held / int(fires[1]), held / there if there else 0.0
    if precision < min_precision or recall < min_recall:
        return None
    figures = (precision, recall, 2 * held / (int(fires[1]) + there), int(fires[0]), int(fires[1]))
    return CodeLabel(str(code), found.text, found.kind, *figures, found.pattern, found.tokens)
