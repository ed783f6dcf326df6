"""What a graph of codes says: its communities, its hubs, what surrounds a code, and the strongest paths through the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_codebook.errors import ConfigError, InvalidCodeError, LabelError, check_whole, nearest
from tl_codebook.graphs.order import fires_before, in_order
from tl_codebook.names import Code, CodeLike, as_code
from tl_codebook.store.sites import Wanted, chosen_sites

if TYPE_CHECKING:
    import networkx

__all__ = ["CodePath", "Hub", "code_communities", "code_paths", "ego_graph", "hubs"]


class Hub(NamedTuple):
    """A code and how many others it is joined to."""

    code: Code
    n_in: int
    """Edges from codes of earlier sites."""
    n_out: int
    strength: float
    """Sum of the weights of its edges."""


class CodePath(NamedTuple):
    """Codes of one site after another, each joined to the next."""

    codes: tuple[Code, ...]
    weights: tuple[float, ...]
    """Of the edges, in order."""
    strength: float
    """Geometric mean of the weights."""


def _node(graph: networkx.DiGraph, code: CodeLike) -> Code:
    node = as_code(code)
    if node not in graph:
        known = [str(other) for other in graph]
        raise InvalidCodeError(
            f"{node} is no node of this graph, which has the {len(known)} codes with an edge. {nearest(str(node), known)}Choose one of "
            "them, or make the graph with a larger fdr or a smaller min_count."
        )
    return node


def _above_zero(graph: networkx.DiGraph) -> list[tuple[Code, Code, float]]:
    """Return the edges with a weight above 0 (npmi has others, at fdr=1), in an order that does not depend on hashes."""
    return sorted((a, b, weight) for a, b, weight in graph.edges(data="weight") if weight > 0)


def code_communities(graph: networkx.DiGraph, *, resolution: int | float = 1.0, seed: int = 0) -> list[set[Code]]:
    """Return groups of codes that are joined among themselves more than to others, the largest first: Louvain, directions left aside.

    Edges of weight 0 or less hold nothing together.

    Args:
        graph: From `coactivation_graph`, or any with a ``weight`` on each edge.
        resolution: Above 1 for smaller groups, below 1 for larger ones; > 0.
        seed: Of the order in which codes are moved; the same groups in every process.

    Raises:
        ConfigError: a resolution of 0 or less.

    Source: Blondel et al. 2008, section 2.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> for a, b in [(0, 1), (0, 2), (3, 4), (3, 5)]:
    ...     graph.add_edge(Code(0, "z", 0, a), Code(0, "mlp_out", None, b), weight=1.0)
    >>> [sorted(map(str, group)) for group in code_communities(graph)]
    [['L0.mlp_out:1', 'L0.mlp_out:2', 'L0.z.0:0'], ['L0.mlp_out:4', 'L0.mlp_out:5', 'L0.z.0:3']]
    """
    import networkx as nx

    if not resolution > 0 or not math.isfinite(resolution):
        raise ConfigError(f"resolution={resolution!r} was asked for. Give a number above 0; 1 is the usual.")
    codes = sorted(graph)
    number = {code: index for index, code in enumerate(codes)}
    plain = nx.Graph()  # of numbers: sets of codes come in another order in every process
    plain.add_nodes_from(range(len(codes)))
    for a, b, weight in _above_zero(graph):
        before = plain.get_edge_data(number[a], number[b], {"weight": 0.0})["weight"]
        plain.add_edge(number[a], number[b], weight=before + weight)
    if not plain.number_of_edges():
        return [{code} for code in codes]
    groups = nx.community.louvain_communities(plain, weight="weight", resolution=resolution, seed=seed)
    return [{codes[index] for index in group} for group in sorted(groups, key=lambda group: (-len(group), min(group)))]


def hubs(graph: networkx.DiGraph, n: int = 10) -> list[Hub]:
    """Return the codes with the most edges, of equals those with the larger sum of weights first.

    Raises:
        ConfigError: `n` below 1.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_edge(Code(0, "mlp_out", None, 1), Code(1, "mlp_out", None, 4), weight=0.5)
    >>> graph.add_edge(Code(0, "mlp_out", None, 2), Code(1, "mlp_out", None, 4), weight=0.25)
    >>> hubs(graph, 1)
    [Hub(code=Code(layer=1, site='mlp_out', group=None, code=4), n_in=2, n_out=0, strength=0.75)]
    """
    check_whole("n", n, least=1)
    rows = [
        Hub(code, graph.in_degree(code), graph.out_degree(code), math.fsum(w for *_, w in _edges_of(graph, code))) for code in sorted(graph)
    ]
    return sorted(rows, key=lambda hub: (-(hub.n_in + hub.n_out), -hub.strength))[:n]


def _edges_of(graph: networkx.DiGraph, code: Code) -> Iterable[tuple[Code, Code, float]]:
    yield from graph.in_edges(code, data="weight")
    yield from graph.out_edges(code, data="weight")


def ego_graph(graph: networkx.DiGraph, code: CodeLike, radius: int = 1) -> networkx.DiGraph:
    """Return the part of a graph around a code: the codes at most `radius` edges away, in either direction, and all edges among them.

    Raises:
        InvalidCodeError: a code without an edge.
        ConfigError: a radius below 1.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> for layer in range(3):
    ...     graph.add_edge(Code(layer, "mlp_out", None, 1), Code(layer + 1, "mlp_out", None, 1), weight=0.5)
    >>> sorted(map(str, ego_graph(graph, "L1.mlp_out:1")))
    ['L0.mlp_out:1', 'L1.mlp_out:1', 'L2.mlp_out:1']
    """
    import networkx as nx

    check_whole("radius", radius, least=1)
    return nx.ego_graph(graph, _node(graph, code), radius=radius, undirected=True)


def _chain(graph: networkx.DiGraph, sites: Wanted | None) -> dict[str, list[int]]:
    """Return the hook names that a path goes through, in the order of a pass, and the groups of each."""
    n_groups: dict[str, int] = {}
    for code in graph:
        n_groups[code.hook_name] = max(n_groups.get(code.hook_name, 1), (code.group or 0) + 1)
    chosen = chosen_sites({name: _Groups(n_groups[name]) for name in in_order(n_groups)}, sites, holder="the graph")
    names = in_order(chosen)
    beside = [(a, b) for a, b in pairwise(names) if not fires_before(a, b)]
    if beside or len(names) < 2:
        what = f"{beside[0][0]!r} and {beside[0][1]!r} do not follow each other" if beside else f"there is {len(names)} site"
        raise ConfigError(f"a path goes from one site to the next, but {what}. Say which sites, two or more, with sites=.")
    return {name: chosen[name] for name in names}


class _Groups(NamedTuple):
    """How many groups a site has, as far as a graph knows: the last that has an edge."""

    n_groups: int


def code_paths(
    graph: networkx.DiGraph,
    n: int = 10,
    *,
    sites: Wanted | None = None,
    source: CodeLike | None = None,
    target: CodeLike | None = None,
) -> list[CodePath]:
    """Return the strongest paths through the layers: one code of each site, each joined to that of the next.

    The strongest have the largest geometric mean of weights; edges of weight 0 or less are not taken. Exact.

    Args:
        graph: From `coactivation_graph`, or any with a ``weight`` on each edge.
        n: How many, >= 1.
        sites: Sites, addresses or hook names that a path goes through, two sites or more, one code of each; all of the graph by default.
            An address with a group (``L5.z.2``) means the codes of that group alone.
        source: Where paths start: a code of the first site.
        target: Where they end: a code of the last site.

    Returns:
        The strongest first; fewer than `n`, or none, where there are no more.

    Raises:
        ConfigError: fewer than two sites, or two that do not follow each other (q and k of one layer).
        UnknownHookError: a site, or a group of one, of which the graph has no codes.
        LabelError: a source or target of another site than the first or last.
        InvalidCodeError: a code without an edge.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> for layer, (a, b, weight) in enumerate([(1, 2, 0.8), (2, 3, 0.2)]):
    ...     graph.add_edge(Code(layer, "mlp_out", None, a), Code(layer + 1, "mlp_out", None, b), weight=weight)
    >>> [(list(map(str, path.codes)), round(path.strength, 3)) for path in code_paths(graph)]
    [(['L0.mlp_out:1', 'L1.mlp_out:2', 'L2.mlp_out:3'], 0.4)]
    """
    check_whole("n", n, least=1)
    chain = _chain(graph, sites)
    names = list(chain)
    ends: list[Code | None] = [None if end is None else _node(graph, end) for end in (source, target)]
    for end, name, what in zip(ends, (names[0], names[-1]), ("source", "target"), strict=True):
        if end is not None and end.hook_name != name:
            raise LabelError(
                f"{what}={end} was given, but paths {'start' if what == 'source' else 'end'} at {name}. Say sites= for others."
            )
    there = [code for code in graph if (code.group or 0) in chain.get(code.hook_name, ())]
    into: dict[Code, list[tuple[Code, float]]] = {}
    for a, b, weight in _above_zero(graph):
        into.setdefault(b, []).append((a, weight))

    # The n best paths to each code of a site are among those that go on from the n best to each code of the site before.
    best: dict[Code, list[tuple[float, tuple[Code, ...], tuple[float, ...]]]] = {}
    best = {code: [(0.0, (code,), ())] for code in there if code.hook_name == names[0] and ends[0] in (None, code)}
    for name in names[1:]:
        reached: dict[Code, Any] = {}
        for code in there:
            if code.hook_name == name and (name != names[-1] or ends[1] in (None, code)):
                longer = [
                    (total + math.log(weight), (*codes, code), (*weights, weight))
                    for before, weight in into.get(code, ())
                    for total, codes, weights in best.get(before, ())
                ]
                reached[code] = sorted(longer, key=lambda path: (-path[0], path[1]))[:n]
        best = reached
    every = sorted((path for paths in best.values() for path in paths), key=lambda path: (-path[0], path[1]))[:n]
    return [CodePath(codes, weights, math.exp(total / len(weights))) for total, codes, weights in every]
