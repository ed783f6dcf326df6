"""Graphs of codes as a drawing without scripts: a column for each site, in the order of a pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tl_codebook.errors import DataError, check_whole
from tl_codebook.names import Address, Code, split_hook_name
from tl_codebook.views.colours import hue_of
from tl_codebook.views.matrix import short
from tl_codebook.views.reading import label_of
from tl_codebook.views.spans import fragment, note
from tl_codebook.views.view import View
from tl_codebook.views.visible import escape, shown

if TYPE_CHECKING:
    import networkx

__all__ = ["show_graph"]

_GAP, _HIGH, _STEP, _TOP = 100, 22, 30, 34
_LIFT = 20
"""How far an edge that passes a column is bent, so that it runs between its boxes: an edge behind a box would look like two."""
_SWEEPS = 4
_LISTED = 30


def show_graph(graph: networkx.DiGraph, *, max_nodes: int = 60, labels: Any = None, title: str | None = None) -> View:
    """Show a graph of codes: a column for each site, in the order of a pass, with edges as wide as their weights.

    Codes of one colour hang together by the edges that are shown.

    Args:
        graph: From `coactivation_graph` or `FlipRates.graph`, or any whose nodes are `Code`, with a ``weight`` on each edge. Edges of
            negative weight are dashed.
        max_nodes: Most codes, those of the strongest edges, >= 1; how many are left out is said.
        labels: Names of codes: a mapping from label to text, such as `CodeLabels`.
        title: Instead of one that says what is shown.

    Raises:
        ConfigError: `max_nodes` below one, or a site whose place in a pass is not known.
        DataError: a graph of other nodes than codes.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_edge(Code(0, "mlp_out", None, 1), Code(1, "z", 3, 4), weight=0.5)
    >>> print(show_graph(graph))
    Graph of 2 codes and 1 edge
    L0.mlp_out:1 → L1.z.3:4  weight 0.5
    """
    from tl_codebook.graphs.order import in_order

    check_whole("max_nodes", max_nodes, least=1)
    if not (hasattr(graph, "edges") and hasattr(graph, "nodes")):
        raise DataError(f"a {type(graph).__name__} was given. Give a graph of networkx, as coactivation_graph makes it.")
    other = next((node for node in graph if not isinstance(node, Code)), None)
    if other is not None:
        raise DataError(f"a graph with the node {shown(repr(other))[:80]} was given. Give one of Code, as coactivation_graph makes it.")
    every = sorted(graph.edges(data=True), key=lambda edge: (-abs(_weight(edge[2])), edge[0], edge[1]))
    kept: set[Code] = set()
    for a, b, _ in every:  # the ends of the strongest edges, so that what is shown hangs together
        if len(kept | {a, b}) <= max_nodes:
            kept |= {a, b}
    kept |= set(sorted(set(graph) - kept)[: max_nodes - len(kept)])
    edges = [(a, b, own) for a, b, own in every if a in kept and b in kept]
    n_nodes, n_edges = graph.number_of_nodes(), graph.number_of_edges()
    counted = f"{n_nodes} {'code' if n_nodes == 1 else 'codes'} and {n_edges} {'edge' if n_edges == 1 else 'edges'}"
    title = shown(title or f"Graph of {counted}")
    names = in_order({code.hook_name for code in kept})
    columns = _untangled([[code for code in sorted(kept) if code.hook_name == name] for name in names], edges)
    facts = [f"{key}: {value}" for key in ("kind", "statistic", "lag", "fdr") if (value := graph.graph.get(key)) is not None]
    body, lines = [note(" · ".join([counted, *map(shown, facts)]))], [title]
    body.append(_drawing(columns, edges, graph, labels))
    left_out = ""
    if len(kept) < n_nodes:
        hidden = n_edges - len(edges)
        left_out = f"{n_nodes - len(kept)} codes with {hidden} edges are not shown: those of the weakest edges (max_nodes={max_nodes})."
        body.append(note(left_out))
    lines += [f"{_called(a, labels)} → {_called(b, labels)}  {'  '.join(_facts(own))}" for a, b, own in edges[:_LISTED]]
    if len(edges) > _LISTED:
        lines.append(f"… {len(edges) - _LISTED} more edges")
    return View(title, "\n".join([*lines, *([left_out] if left_out else [])]), fragment(title, body))


def _weight(own: dict[str, Any]) -> float:
    value = float(own.get("weight", 1.0))
    return value if math.isfinite(value) else 0.0


def _facts(own: dict[str, Any]) -> list[str]:
    """Return the attributes of an edge or node, a text each."""
    return [shown(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}") for key, value in own.items()]


def _called(code: Code, labels: Any) -> str:
    name = label_of(labels, code)
    return f"{code} \u201c{name}\u201d" if name else str(code)


def _untangled(columns: list[list[Code]], edges: list[tuple[Code, Code, dict[str, Any]]]) -> list[list[Code]]:
    """Order each column by where the codes that its own are joined to lie, so that fewer edges cross."""
    near: dict[Code, list[tuple[Code, float]]] = {}
    for a, b, own in edges:
        near.setdefault(a, []).append((b, abs(_weight(own))))
        near.setdefault(b, []).append((a, abs(_weight(own))))
    for sweep in range(_SWEEPS):
        height = {code: (i + 0.5) / len(column) for column in columns for i, code in enumerate(column)}
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            wanted = {}
            for code in column:
                others = [(height[other], weight) for other, weight in near.get(code, []) if other.hook_name != code.hook_name]
                total = sum(weight for _, weight in others)
                wanted[code] = sum(place * weight for place, weight in others) / total if total else height[code]
            column.sort(key=lambda code: (wanted[code], code))
            height |= {code: (i + 0.5) / len(column) for i, code in enumerate(column)}
    return columns


def _text_of(code: Code, labels: Any) -> str:
    """Return what stands in the box of a code, whose column says the site: group and number, and its name."""
    group = "" if code.group is None else f"{code.group}:"
    return short(f"{group}{code.code} {label_of(labels, code)}".strip(), 24).replace("\u2423", " ")


def _colours(columns: list[list[Code]], edges: list[tuple[Code, Code, dict[str, Any]]]) -> dict[Code, int]:
    """Give codes that hang together one colour."""
    import networkx as nx

    joined = nx.Graph([(a, b) for a, b, _ in edges])
    joined.add_nodes_from(code for column in columns for code in column)
    return {code: hue_of(min(group)) for group in nx.connected_components(joined) for code in group}


def _drawing(columns: list[list[Code]], edges: list[tuple[Code, Code, dict[str, Any]]], graph: Any, labels: Any) -> str:
    texts = {code: _text_of(code, labels) for column in columns for code in column}
    heads = [short(str(Address(*split_hook_name(column[0].hook_name))), 26) for column in columns]
    wide = 16 + 6.8 * max([5, *map(len, texts.values()), *map(len, heads)])
    tallest = max((len(column) for column in columns), default=0)
    place: dict[Code, tuple[float, float]] = {}
    for i, column in enumerate(columns):
        gap = _STEP * tallest / max(len(column), 1)
        place |= {code: (i * (wide + _GAP) + 4, _TOP + gap * (y + 0.5) - _HIGH / 2) for y, code in enumerate(column)}
    largest = max((abs(_weight(own)) for *_, own in edges), default=0.0) or 1.0
    drawn = []
    for a, b, own in reversed(edges):  # the strongest on top
        (x1, y1), (x2, y2) = place[a], place[b]
        x1, y1, y2 = x1 + wide, y1 + _HIGH / 2, y2 + _HIGH / 2
        if x2 < x1:  # within a site, or back to an earlier one
            x2 += wide
            path = f"M{x1:g},{y1:g} C{x1 + 60:g},{y1:g} {x2 + 60:g},{y2:g} {x2:g},{y2:g}"
        else:
            bend = (x2 - x1) / 2
            passed = round((x2 - x1 + wide) / (wide + _GAP)) - 1  # columns between: over their boxes, not behind them
            lift = min(passed, 1) * (_LIFT + 3 * passed)
            bend = bend / 2 if passed else bend
            path = f"M{x1:g},{y1:g} C{x1 + bend:g},{y1 - lift:g} {x2 - bend:g},{y2 - lift:g} {x2:g},{y2:g}"
        tip = "&#10;".join(escape(line) for line in (f"{_called(a, labels)} → {_called(b, labels)}", *_facts(own)))
        less = " less" if _weight(own) < 0 else ""
        width = 0.7 + 3.6 * abs(_weight(own)) / largest
        drawn.append(f'<path class="edge{less}" stroke-width="{width:.2f}" d="{path}"><title>{tip}</title></path>')
    drawn += [f'<text class="on" x="{i * (wide + _GAP) + 4:g}" y="16">{escape(head)}</text>' for i, head in enumerate(heads)]
    hues = _colours(columns, edges)
    for code, (x, y) in place.items():
        tip = "&#10;".join(escape(line) for line in (_called(code, labels), *_facts(graph.nodes[code])))
        drawn.append(
            f'<g class="h{hues[code]}"><title>{tip}</title><rect x="{x:g}" y="{y:.1f}" rx="4" width="{wide}" height="{_HIGH}"/>'
            f'<text x="{x + 8:g}" y="{y + 15:.1f}">{escape(texts[code])}</text></g>'
        )
    across, height = len(columns) * (wide + _GAP) - _GAP + 70, _TOP + _STEP * tallest + 6
    size = f'width="{max(across, 1):g}" height="{height:g}" viewBox="0 0 {max(across, 1):g} {height:g}"'
    return f'<div class="scroll"><svg role="img" aria-label="graph of codes" {size}>{"".join(drawn)}</svg></div>'
