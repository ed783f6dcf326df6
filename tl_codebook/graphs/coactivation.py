"""Which codes fire together more often than chance has it, from the codes of a text (a `CodeStore`): a graph from site to later site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from tl_codebook.errors import ConfigError, DataError, UnknownHookError, check_whole, nearest
from tl_codebook.graphs.counting import code_at, count_pairs, margins, pair_starts
from tl_codebook.graphs.order import fires_before, in_order
from tl_codebook.graphs.statistics import association, benjamini_hochberg, check_statistic, hypergeometric_tail
from tl_codebook.names import SITES, Address, Code, split_hook_name

if TYPE_CHECKING:
    import networkx

__all__ = ["coactivation_graph"]


def _match(store: Any, sites: str | Iterable[str] | None) -> list[str]:
    """Return the stored hook names that hook names, addresses or sites mean, each once."""
    have = list(store.sites)
    if sites is None:
        return have
    found: dict[str, None] = {}
    for asked in [sites] if isinstance(sites, str) else sites:
        if asked in SITES:
            matching = [name for name in have if split_hook_name(name)[1] == asked]
        else:
            wanted = Address.parse(asked).hook_name if asked.startswith("L") else asked
            matching = [name for name in have if name == wanted]
        if not matching:
            raise UnknownHookError(
                f"the store has no codes of {asked!r}. {nearest(asked, have)}It has codes of: {', '.join(have)}; collect_codes collects "
                "those of the codebooks that are attached."
            )
        found |= dict.fromkeys(matching)
    return list(found)


def coactivation_graph(
    store: Any,
    sites: str | Iterable[str] | None = None,
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
    none); how often is compared with two codes that fire as often but independently (Fisher's exact test, one-sided). The tests of one
    call are one family: all pairs of codes that each fire `min_count` times or more; those that fire together less often than that count
    as p = 1. Positions of a text are not independent, so p-values are smaller than they should be: they order edges, and bound chance.
    Firing together is no cause; `flip_rate` measures that.

    Args:
        store: A `CodeStore`.
        sites: Hook names, addresses (``L3.mlp_out``) or sites (``z``), two or more; all of the store by default. Every pair of them is
            counted, except q, k and v of one layer, which do not follow each other.
        lag: Positions from the earlier site's token to the later site's, >= 0.
        statistic: The weight of the edges: ``npmi``, ``lift``, ``jaccard``, ``mi`` or ``cond_prob`` (`association`).
        min_count: Edges are pairs that fire together at least so often, >= 1.
        fdr: The share of edges that may be there by chance (Benjamini-Hochberg), above 0, at most 1.
        max_edges: Keep only so many, those of the largest weight; `n_significant` of the graph says how many there were. All by default.
        progress: Show a progress bar.

    Returns:
        Nodes are `Code`, those with an edge: ``count`` (positions of text at which it fires), ``frequency`` (share of them). Edges:
        ``weight``, ``count`` (places with both), ``expected`` (the same by chance), ``earlier_count``, ``later_count`` (places with the
        one, with the other), ``p_value``, ``q_value`` (the smallest `fdr` that keeps it). The graph: ``kind``, ``statistic``, ``lag``,
        ``min_count``, ``fdr``, ``sites`` (hook names, in the order of a pass), ``n_places``, ``n_tests``, ``n_significant``.

    Raises:
        ConfigError: an option out of range, fewer than two sites, or a site whose place in a pass is not known.
        UnknownHookError: a site of which the store has no codes.
        DataError: no two positions of text of one sequence are so far apart.

    Source: Benjamini and Hochberg 1995, section 3.1 (which edges stay).
    """
    import networkx as nx

    check_whole("lag", lag, least=0)
    check_whole("min_count", min_count, least=1)
    check_statistic(statistic)
    if isinstance(fdr, bool) or not isinstance(fdr, int | float) or not 0 < fdr <= 1:
        raise ConfigError(f"fdr={fdr!r} was asked for. Give a share above 0 and at most 1, such as 0.05; 1 keeps every pair.")
    if max_edges is not None:
        check_whole("max_edges", max_edges, least=1)
    names = in_order(_match(store, sites))
    pairs = [(a, b) for a, b in combinations(names, 2) if fires_before(a, b)]
    if not pairs:
        raise ConfigError(f"sites {', '.join(names) or 'none'} were asked for, of which none follows another. Give two or more that do.")
    starts = pair_starts(store, lag)
    n_places = int(np.count_nonzero(starts))
    if not n_places:
        raise DataError(f"lag={lag} was asked for, but no sequence of the store has two tokens of text so far apart. Give a smaller lag.")

    table = _counted(store, pairs, starts, lag, min_count, progress)
    p_values = hypergeometric_tail(*table.counts, n_places)
    q_values = benjamini_hochberg(p_values, table.n_tests)
    weights = association(statistic, *table.counts, n_places)
    kept = np.flatnonzero(q_values <= fdr)
    n_significant = len(kept)
    if max_edges is not None and len(kept) > max_edges:
        kept = np.sort(kept[np.argsort(-weights[kept], kind="stable")[:max_edges]])

    graph = nx.DiGraph(
        kind="coactivation",
        statistic=statistic,
        lag=lag,
        min_count=min_count,
        fdr=float(fdr),
        sites=names,
        n_places=n_places,
        n_tests=table.n_tests,
        n_significant=n_significant,
    )
    nodes = _nodes(store, pairs, table, kept)
    graph.add_nodes_from(sorted(nodes.values(), key=lambda node: (names.index(node[0].hook_name), node[0])))
    together, n_earlier, n_later = table.counts
    for i in kept:
        a, b = pairs[table.pair[i]]
        graph.add_edge(
            nodes[a, int(table.earlier[i])][0],
            nodes[b, int(table.later[i])][0],
            weight=float(weights[i]),
            count=int(together[i]),
            expected=float(n_earlier[i]) * float(n_later[i]) / n_places,
            earlier_count=int(n_earlier[i]),
            later_count=int(n_later[i]),
            p_value=float(p_values[i]),
            q_value=float(q_values[i]),
        )
    return graph


class _Table(NamedTuple):
    """The pairs of codes that fire together often enough, of all pairs of sites one after the other."""

    pair: np.ndarray
    """Number of the pair of sites."""
    earlier: np.ndarray
    later: np.ndarray
    counts: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Places with both, with the earlier code, with the later one."""
    n_tests: int


def _counted(store: Any, pairs: Sequence[tuple[str, str]], starts: np.ndarray, lag: int, least: int, progress: bool) -> _Table:
    n_earlier = {name: margins(store, name, starts, 0) for name in dict.fromkeys(a for a, _ in pairs)}
    n_later = {name: margins(store, name, starts, lag) for name in dict.fromkeys(b for _, b in pairs)}
    n_rows = [int((n_earlier[a] >= least).sum()) for a, _ in pairs]
    n_tests = sum(rows * int((n_later[b] >= least).sum()) for rows, (_, b) in zip(n_rows, pairs, strict=True))
    parts: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in range(6)]
    with tqdm(total=sum(n_rows), desc="pairs of codes", unit="code", disable=not progress) as bar:
        for number, (a, b) in enumerate(pairs):
            for row in count_pairs(store, a, b, starts, lag, least, n_earlier[a], n_later[b]):
                found = (np.full_like(row.later, number), *row, n_earlier[a][row.earlier], n_later[b][row.later])
                for part, new in zip(parts, found, strict=True):
                    part.append(new)
                bar.update(1)
    pair, earlier, later, together, count_earlier, count_later = (np.concatenate(part) for part in parts)
    return _Table(pair, earlier, later, (together, count_earlier, count_later), n_tests)


def _nodes(store: Any, pairs: Sequence[tuple[str, str]], table: _Table, kept: np.ndarray) -> dict[Any, tuple[Code, dict[str, Any]]]:
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
