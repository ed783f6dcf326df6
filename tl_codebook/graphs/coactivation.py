"""Which codes fire together more often than chance has it, from the codes of a text (a `CodeStore`): a graph from site to later site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from tl_codebook.errors import ConfigError, DataError, check_whole
from tl_codebook.graphs.counting import code_at, count_pairs, margins, pair_starts
from tl_codebook.graphs.order import fires_before, in_order
from tl_codebook.graphs.statistics import association, benjamini_hochberg, check_statistic, hypergeometric_tail
from tl_codebook.names import Address, Code, split_hook_name
from tl_codebook.store.sites import Wanted, chosen_sites

if TYPE_CHECKING:
    import networkx

__all__ = ["coactivation_graph"]

_PAIRS_AT_ONCE = 1_000_000
"""So many pairs are tested at a time; those that chance explains are let go at once."""
_MOST_PAIRS, _MOST_EDGES = 5_000_000, 500_000
"""More pairs that chance does not explain, and more edges, are refused: they would fill the memory."""


def coactivation_graph(
    store: Any,
    sites: Wanted | None = None,
    *,
    lag: int = 0,
    statistic: str = "npmi",
    min_count: int = 10,
    fdr: int | float = 0.05,
    max_edges: int | None = None,
    progress: bool = True,
) -> networkx.DiGraph:
    """Return the graph of the codes that fire together more often than chance has it, each edge from an earlier site to a later one.

    An edge joins a code at position t with one at position t + `lag` of a later site, in the same sequence, both text (special tokens are
    none). How often they do is compared with two codes that fire as often but independently of each other (Fisher's exact test,
    one-sided). The tests of one call are one family: all pairs of codes that each fire `min_count` times or more; pairs that fire together
    less often than that count as p = 1. The test takes positions for independent draws. Those of a text are not (a topic lasts, words come
    back), so the p-values are too small: they put edges in order, but `fdr` bounds the share of false ones only as far as positions are
    independent. Firing together is no cause; `flip_rate` measures what forcing a code does.

    Args:
        store: A `CodeStore`.
        sites: Sites, addresses or hook names (``"z"``, ``"L3.mlp_out"``, ``"L5.z.2"``), of two sites or more; all of the store by
            default. Every pair of sites is counted, except q, k and v of one layer, which do not follow each other. An address with a group
            means the codes of that group alone; the groups of one site do not follow each other either.
        lag: Positions from the earlier site's token to the later site's, >= 0.
        statistic: The weight of the edges: ``npmi``, ``lift``, ``jaccard``, ``mi`` or ``cond_prob`` (`association`).
        min_count: Edges are pairs that fire together at least so often, >= 1.
        fdr: The expected share of edges that are there by chance (Benjamini-Hochberg), above 0, at most 1.
        max_edges: Keep only so many, those of the largest weight; `n_significant` of the graph says how many there were. All by default.
        progress: Show a progress bar.

    Returns:
        Nodes are `Code`, those with an edge: ``count`` (positions of text at which it fires), ``frequency`` (share of them). Edges:
        ``weight``, ``count`` (places with both), ``expected`` (the same by chance), ``earlier_count``, ``later_count`` (places with the
        one, with the other), ``p_value``, ``q_value`` (the smallest `fdr` that keeps it). The graph: ``kind``, ``statistic``, ``lag``,
        ``min_count``, ``fdr``, ``sites`` (hook names, in the order of a pass), ``addresses`` (what was counted: those of the sites, or of
        groups of them), ``n_places`` (pairs of positions, all that were looked at), ``n_tests``, ``n_significant``.

    Raises:
        ConfigError: an option out of range, more than 500,000 edges, fewer than two sites, or a site whose place in a pass is not known.
        UnknownHookError: a site, or a group of one, of which the store has no codes.
        LabelError: something in `sites` that is no name.
        DataError: no two positions of text of one sequence are so far apart.

    Source: Benjamini and Hochberg 1995, section 3.1 (which edges stay).

    >>> from tl_codebook import attach, collect_codes
    >>> _ = attach(model, "mlp_out", n_codes=1)  # each codebook has one code, which fires everywhere
    >>> store = collect_codes(model, ["w3 w4 w5", "w6 w4"], tmp_path / "store", progress=False)
    >>> graph = coactivation_graph(store, ["L0.mlp_out", "L1.mlp_out"], statistic="lift", min_count=1, fdr=1, progress=False)
    >>> [(str(a), str(b), own["weight"], own["count"]) for a, b, own in graph.edges(data=True)]
    [('L0.mlp_out:0', 'L1.mlp_out:0', 1.0, 5)]
    """
    import networkx as nx

    check_whole("lag", lag, least=0)
    check_whole("min_count", min_count, least=1)
    check_statistic(statistic)
    if isinstance(fdr, bool) or not isinstance(fdr, int | float) or not 0 < fdr <= 1:
        raise ConfigError(f"fdr={fdr!r} was asked for. Give a share above 0 and at most 1, such as 0.05; 1 keeps every pair.")
    if max_edges is not None:
        check_whole("max_edges", max_edges, least=1)
    chosen = chosen_sites(store.sites, sites)
    names = in_order(chosen)
    pairs = [(a, b) for a, b in combinations(names, 2) if fires_before(a, b)]
    if not pairs:
        raise ConfigError(f"sites {', '.join(names)} were asked for, of which none follows another. Give two or more that do.")
    starts = pair_starts(store, lag)
    n_places = int(np.count_nonzero(starts))
    if not n_places:
        raise DataError(f"lag={lag} was asked for, but no sequence of the store has two tokens of text so far apart. Give a smaller lag.")

    table, n_tests = _counted(store, chosen, pairs, starts, lag, min_count, n_places, fdr, progress)
    q_values = benjamini_hochberg(table.p_value, n_tests)
    weights = association(statistic, table.together, table.n_earlier, table.n_later, n_places)
    kept = np.flatnonzero(q_values <= fdr)
    n_significant = len(kept)
    if max_edges is not None and len(kept) > max_edges:
        kept = np.sort(kept[np.argsort(-weights[kept], kind="stable")[:max_edges]])
    if len(kept) > _MOST_EDGES:
        raise ConfigError(
            f"{len(kept):,} pairs of codes fire together more often than chance has it, and a graph of networkx takes about a kilobyte for "
            f"each. Keep the strongest with max_edges= (at most {_MOST_EDGES:,}), or give fewer sites, a larger min_count or a smaller fdr."
        )

    graph = nx.DiGraph(
        kind="coactivation",
        statistic=statistic,
        lag=lag,
        min_count=min_count,
        fdr=float(fdr),
        sites=names,
        addresses=[str(address) for name in names for address in _addresses(name, chosen[name], store.sites[name].n_groups)],
        n_places=n_places,
        n_tests=n_tests,
        n_significant=n_significant,
    )
    nodes = _nodes(store, pairs, table, kept)
    graph.add_nodes_from(sorted(nodes.values(), key=lambda node: (names.index(node[0].hook_name), node[0])))
    for i in kept:
        a, b = pairs[table.pair[i]]
        graph.add_edge(
            nodes[a, int(table.earlier[i])][0],
            nodes[b, int(table.later[i])][0],
            weight=float(weights[i]),
            count=int(table.together[i]),
            expected=float(table.n_earlier[i]) * float(table.n_later[i]) / n_places,
            earlier_count=int(table.n_earlier[i]),
            later_count=int(table.n_later[i]),
            p_value=float(table.p_value[i]),
            q_value=float(q_values[i]),
        )
    return graph


def _addresses(name: str, groups: Sequence[int], n_groups: int) -> list[Address]:
    layer, site = split_hook_name(name)
    return [Address(layer, site)] if len(groups) == n_groups else [Address(layer, site, group) for group in groups]


class _Pairs(NamedTuple):
    """Pairs of codes that fire together often enough, of all pairs of sites one after the other."""

    pair: np.ndarray
    """Number of the pair of sites."""
    earlier: np.ndarray
    later: np.ndarray
    together: np.ndarray
    """Places with both."""
    n_earlier: np.ndarray
    """Places with the earlier code."""
    n_later: np.ndarray
    p_value: np.ndarray

    @classmethod
    def none(cls) -> _Pairs:
        return cls(*(np.zeros(0, dtype=np.int64 if name != "p_value" else np.float64) for name in cls._fields))


def _counted(
    store: Any,
    chosen: Mapping[str, Sequence[int]],
    pairs: Sequence[tuple[str, str]],
    starts: np.ndarray,
    lag: int,
    least: int,
    n_places: int,
    fdr: int | float,
    progress: bool,
) -> tuple[_Pairs, int]:
    """Return the pairs that may be edges, and how many were tested."""
    # Codes of other groups than those chosen fire at no place, and so are in no pair and no test.
    n_earlier = {name: margins(store, name, starts, 0, chosen[name]) for name in dict.fromkeys(a for a, _ in pairs)}
    n_later = {name: margins(store, name, starts, lag, chosen[name]) for name in dict.fromkeys(b for _, b in pairs)}
    n_rows = [int((n_earlier[a] >= least).sum()) for a, _ in pairs]
    n_tests = sum(rows * int((n_later[b] >= least).sum()) for rows, (_, b) in zip(n_rows, pairs, strict=True))
    kept, waiting, n_waiting, n_kept = [_Pairs.none()], [], 0, 0
    with tqdm(total=sum(n_rows), desc="pairs of codes", unit="code", disable=not progress) as bar:
        for number, (a, b) in enumerate(pairs):
            for row in count_pairs(store, a, b, starts, lag, least, n_earlier[a], n_later[b]):
                waiting.append((np.full_like(row.later, number), *row, n_earlier[a][row.earlier], n_later[b][row.later]))
                n_waiting += len(row.later)
                bar.update(1)
                if n_waiting > _PAIRS_AT_ONCE:
                    kept.append(_likely(waiting, n_places, fdr))
                    n_kept, n_waiting, waiting = n_kept + len(kept[-1].pair), 0, []
                    if n_kept > _MOST_PAIRS:
                        raise ConfigError(
                            f"more than {_MOST_PAIRS:,} pairs of codes fire together more often than chance has it: too many for a graph. "
                            "Give fewer sites, a larger min_count, or a smaller fdr."
                        )
    kept.append(_likely(waiting, n_places, fdr))
    return _Pairs(*map(np.concatenate, zip(*kept, strict=True))), n_tests


def _likely(rows: Sequence[tuple[np.ndarray, ...]], n_places: int, fdr: int | float) -> _Pairs:
    """Return the pairs whose p-value is at most `fdr`: no other can stay an edge, since no q-value is below its p-value."""
    if not rows:
        return _Pairs.none()
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    p_values = hypergeometric_tail(columns[3], columns[4], columns[5], n_places)
    some = p_values <= fdr
    return _Pairs(*(column[some] for column in (*columns, p_values)))


def _nodes(store: Any, pairs: Sequence[tuple[str, str]], table: _Pairs, kept: np.ndarray) -> dict[Any, tuple[Code, dict[str, Any]]]:
    """Return code and attributes of each end of the edges, by hook name and number."""
    text = ~np.asarray(store.is_special(), dtype=bool)
    n_text = int(np.count_nonzero(text))
    nodes: dict[Any, tuple[Code, dict[str, Any]]] = {}
    for number, names in enumerate(pairs):
        mine = kept[table.pair[kept] == number]
        for name, ends in zip(names, (table.earlier[mine], table.later[mine]), strict=True):
            for end in map(int, np.unique(ends)):
                if (name, end) not in nodes:
                    code = code_at(store, name, end)
                    count = int(np.count_nonzero(text[np.asarray(store.positions(code))]))
                    nodes[name, end] = (code, {"count": count, "frequency": count / n_text})
    return nodes
