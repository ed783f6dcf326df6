"""Which codes stand for a concept: precision and recall of every code of a store at once.

Everything is counted in positions. A code fires at a position if any of the k slots is it, and then once; a position at which a concept
holds counts once, however many matches mark it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tl_codebook.errors import ConfigError, DataError, PositionError, check_whole
from tl_codebook.names import Code
from tl_codebook.store.concepts import At, Query, Searchable, concept_positions
from tl_codebook.store.counting import code_counts
from tl_codebook.store.sites import Wanted, chosen_sites
from tl_codebook.store.text import Vocabulary

__all__ = ["By", "CodeHit", "codes_of_example", "search_codes"]

By = Literal["f1", "precision", "recall", "mi"]


@dataclass(frozen=True)
class CodeHit:
    """A code and how well it stands for a concept. ``pandas.DataFrame(hits)`` is a table of them."""

    label: str
    layer: int | None
    site: str
    group: int | None
    precision: float
    """Share of the positions at which the code fires where the concept holds, 0 to 1."""
    recall: float
    """Share of the positions at which the concept holds where the code fires, 0 to 1."""
    f1: float
    """Harmonic mean of the two."""
    mi: float
    """What the code tells of the concept (fires or not, holds or not), in bits, 0 to 1; great too where it avoids the concept."""
    hits: int
    """Positions at which the code fires and the concept holds."""
    activations: int
    """Positions at which the code fires."""
    occurrences: int
    """Positions at which the concept holds."""

    @property
    def code(self) -> Code:
        """Return the code, which every function takes that takes a label."""
        return Code.parse(self.label)


def search_codes(
    store: Searchable,
    query: Query,
    *,
    sites: Wanted | None = None,
    by: By = "f1",
    min_precision: float = 0.0,
    min_recall: float = 0.01,
    n: int | None = 100,
    n_slots: int | None = None,
    at: At = "first",
    group: int | str | None = None,
    shift: int = 0,
    special: bool = False,
    timeout: float = 2.0,
    vocabulary: Vocabulary | None = None,
) -> list[CodeHit]:
    r"""Return the codes that stand best for a concept, best first; none where the concept never holds.

    A concept is a regular expression, such as ``r"New (York)"``: the group is what the code is to fire on. Without a group it is the
    match. Of several tokens that a match takes, the first is meant (as in the original library); ``at`` says otherwise.

    Args:
        store: A `CodeStore`.
        query: A regular expression; matches of one (`match_text`); token ids; a list of texts that are one token each; or a mask of bools,
            one for each position of the store.
        sites: Sites, addresses or hook names (``"z"``, ``"L3.mlp_out"``, ``"L5.z.2"``); by default all.
        by: What comes first: greatest ``"f1"``, ``"precision"``, ``"recall"``, or ``"mi"`` (mutual information, in bits, which a code
            that mostly avoids the concept has too). Of equals, the greater F1, then the order of the sites, groups and codes.
        min_precision, min_recall: Least share, 0 to 1. The least recall is the paper's, 1 %.
        n: How many codes to return at most; None for all.
        n_slots: Count only the first slots, those of the most similar codes, 1 to k; by default all. This reads the whole store.
        at: Which tokens of a match are marked: the one it ``"first"`` begins in, the one it ends in (``"last"``), or ``"all"``.
        group: Which group of the regular expression is marked, by number or name; 0 for the whole match. By default the first group.
        shift: Mark the token so many positions later (earlier, where negative) in the same sequence instead: with -1 the codes that come
            just before a concept, which are the ones to force for more of it.
        special: Count special tokens (BOS, EOS) as positions too; text is never searched in them.
        timeout: Seconds of matching, above 0, after which a regular expression is given up.
        vocabulary: For a store that was collected without a tokenizer.

    Raises:
        ConfigError: an option or query that cannot be, or an empty list of sites.
        SearchTimeoutError: a regular expression that takes longer than `timeout`.
        DataError: tokens that the vocabulary does not have, a store without text, or a concept that holds at special tokens alone.
        ShapeError: a mask that does not fit the store.
        UnknownHookError, LabelError: a site that is not stored, or something that is no name of one.

    Source: Tamkin et al. 2023, section 3 (precision of codes at positions that a regular expression matches, with a recall above 1 %).

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=16, k=2)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> best = search_codes(store, r"w\d (w4)", by="recall")[0]
    >>> best.occurrences, best.hits == best.recall * 2, best.code.site
    (2, True, 'mlp_out')
    """
    _check_options(by, min_precision, min_recall, n)
    chosen = chosen_sites(store.sites, sites)
    positions = concept_positions(store, query, at=at, group=group, shift=shift, timeout=timeout, vocabulary=vocabulary)
    if len(positions) and not special and store.is_special()[positions].all():
        raise DataError("the concept holds at special tokens alone, which are not counted. Say special=True to count them.")
    return _ranked(store, chosen, positions, by, min_precision, min_recall, n, n_slots, special)


def codes_of_example(
    store: Searchable,
    sequence: int,
    *,
    start: int = 0,
    stop: int | None = None,
    sites: Wanted | None = None,
    min_share: float = 0.5,
    by: By = "mi",
    n: int | None = 100,
    n_slots: int | None = None,
) -> list[CodeHit]:
    """Return the codes that fire on a large share of the tokens of one example, such as the codes of its topic.

    By default those come first that tell the example from the rest of the store: codes that fire everywhere cover an example too, and lead
    with ``by="recall"``. In the rows, `recall` is the share of the example's tokens on which the code fires, and `precision` the share of
    the code's activations that lie in the example. Special tokens are not counted.

    Args:
        store: A `CodeStore`.
        sequence: Which stored sequence.
        start, stop: Only its tokens from `start` to before `stop`.
        sites, by, n, n_slots: As for `search_codes`.
        min_share: Least share of the tokens, 0 to 1.

    Raises:
        ConfigError: an option that cannot be.
        DataError: no token to count.
        PositionError: a sequence or part of one that is not there.
        UnknownHookError, LabelError: a site that is not stored, or something that is no name of one.

    Source: Tamkin et al. 2023, section 4 (topic codes fire on more than half of the tokens of a sequence).

    >>> from tl_codebook import attach
    >>> from tl_codebook.store import collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=1)
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> [(hit.label, hit.recall, hit.precision) for hit in codes_of_example(store, 0, sites="L1.mlp_out")]
    [('L1.mlp_out:0', 1.0, 0.6)]
    """
    _check_options(by, 0.0, min_share, n, recall="min_share")
    if isinstance(sequence, bool) or not 0 <= sequence < store.n_sequences:
        raise PositionError(f"sequence {sequence} was asked for, but the store has {store.n_sequences}. Give 0 to {store.n_sequences - 1}.")
    whole = store.sequence(sequence)
    length = whole.stop - whole.start
    end = length if stop is None else stop
    if not 0 <= start <= end <= length:
        raise PositionError(f"tokens {start} to {end} of sequence {sequence} were asked for, but it has {length}. Give 0 to {length}.")
    positions = np.arange(whole.start + start, whole.start + end)
    positions = positions[~store.is_special()[whole.start + start : whole.start + end]]
    if not len(positions):
        raise DataError(f"tokens {start} to {end} of sequence {sequence} hold none but special tokens. Give a part with text.")
    return _ranked(store, chosen_sites(store.sites, sites), positions, by, 0.0, min_share, n, n_slots, special=False)


def _check_options(by: str, min_precision: float, min_recall: float, n: int | None, *, recall: str = "min_recall") -> None:
    if by not in get_args(By):
        raise ConfigError(f"by={by!r} was asked for. Give one of {', '.join(map(repr, get_args(By)))}.")
    for name, share in (("min_precision", min_precision), (recall, min_recall)):
        if isinstance(share, bool) or not 0 <= share <= 1:
            raise ConfigError(f"{name}={share} was asked for, but it is a share. Give 0 to 1.")
    if n is not None:
        check_whole("n", n, 1)


def _ranked(
    store: Searchable,
    chosen: Mapping[str, list[int]],
    positions: np.ndarray,
    by: By,
    min_precision: float,
    min_recall: float,
    n: int | None,
    n_slots: int | None,
    special: bool,
) -> list[CodeHit]:
    """Count the codes of all sites, and make rows of the best alone."""
    rows = []
    tables = []
    for index, (site, groups) in enumerate(chosen.items()):
        counts = code_counts(store, site, positions, n_slots=n_slots, special=special)
        figures = {"precision": counts.precision(), "recall": counts.recall(), "f1": counts.f1(), "mi": counts.mi()}
        keep = (counts.hits > 0) & (figures["precision"] >= min_precision) & (figures["recall"] >= min_recall)
        keep &= np.isin(np.arange(len(keep)), groups)[:, None]
        group, code = np.nonzero(keep)
        tables.append((site, counts, figures))
        rows.append(np.stack([np.full(len(code), index), group, code, -figures[by][keep], -figures["f1"][keep]]))
    table = np.concatenate(rows, axis=1)
    best = np.lexsort((table[2], table[1], table[0], table[4], table[3]))[:n]
    hits = []
    for index, group, code in table[:3, best].astype(int).T.tolist():
        site, counts, figures = tables[index]
        named = Code(None, site, group if store.sites[site].n_groups > 1 else None, code)
        precision, recall, f1, mi = (float(figures[name][group, code]) for name in ("precision", "recall", "f1", "mi"))
        found, fires = int(counts.hits[group, code]), int(counts.activations[group, code])
        place = (str(named), named.layer, named.site, named.group)
        hits.append(CodeHit(*place, precision, recall, f1, mi, found, fires, counts.occurrences))
    return hits
