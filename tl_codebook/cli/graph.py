"""``tl-codebook graph``: which codes of a store fire together more often than chance has it, from site to later site."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Parse the arguments, make the graph, and print its strongest edges, hubs and groups; with ``--json`` as one JSON object."""
    asked = _parser().parse_args(list(argv))
    from tl_codebook.files import target_file
    from tl_codebook.graphs import coactivation_graph, code_communities, code_paths, hubs, write_circuit_tracer, write_graphml
    from tl_codebook.store import CodeStore

    store = CodeStore(asked.store)
    targets = [asked.graphml, asked.html, None if asked.circuit_tracer is None else Path(asked.circuit_tracer) / "codes.json"]
    for target in targets:
        if target is not None:
            target_file(target, asked.overwrite)  # refused before the work, not after it
    options = {"lag": asked.lag, "statistic": asked.statistic, "min_count": asked.min_count, "fdr": asked.fdr, "max_edges": asked.max_edges}
    graph = coactivation_graph(store, asked.sites, progress=not asked.quiet, **options)
    if asked.graphml is not None:
        write_graphml(graph, asked.graphml, overwrite=asked.overwrite)
    if asked.circuit_tracer is not None:
        write_circuit_tracer(graph, asked.circuit_tracer, overwrite=asked.overwrite)
    if asked.html is not None:
        from tl_codebook.views import show_graph

        show_graph(graph).save(asked.html, overwrite=asked.overwrite)
    edges = sorted(graph.edges(data=True), key=lambda edge: (-edge[2]["weight"], edge[0], edge[1]))
    sites = graph.graph["sites"]
    found: dict[str, Any] = {**graph.graph, "n_codes": graph.number_of_nodes(), "n_edges": graph.number_of_edges()}
    found["edges"] = [{"from": str(a), "to": str(b), **own} for a, b, own in (edges if asked.json else edges[: asked.n])]
    if edges:
        found["hubs"] = [row._asdict() | {"code": str(row.code)} for row in hubs(graph, asked.n)]
        groups = code_communities(graph, seed=asked.seed)
        found["communities"] = [sorted(map(str, group)) for group in (groups if asked.json else groups[: asked.n])]
    if asked.through:
        paths = code_paths(graph, asked.n, sites=asked.through)
        found["paths"] = [{"codes": [str(code) for code in path.codes], "strength": path.strength} for path in paths]
    print(json.dumps(found, indent=2, allow_nan=False) if asked.json else _table(found, sites))
    return 0


def _parser() -> argparse.ArgumentParser:
    from tl_codebook.graphs.statistics import STATISTICS

    parser = argparse.ArgumentParser(prog="tl-codebook graph", description=__doc__)
    add = parser.add_argument
    add("store", metavar="STORE", help="folder that tl-codebook collect wrote")
    add("--sites", nargs="+", help="sites (z), addresses (L3.mlp_out) or hook names, two or more; all by default")
    add("--lag", type=int, default=0, help="tokens from the earlier code to the later one")
    add("--statistic", choices=STATISTICS, default="npmi", help="weight of the edges")
    add("--min_count", type=int, default=10, help="least number of places where both fire")
    add("--fdr", type=float, default=0.05, help="share of edges that may be there by chance, above 0, at most 1")
    add("--max_edges", type=int, help="keep only so many, the strongest")
    add("--through", nargs="+", help="also the strongest paths through these sites")
    add("--n", type=int, default=10, help="rows of each table for people")
    add("--seed", type=int, default=0, help="of the search for groups")
    add("--graphml", help="write the graph to this file, for Gephi, Cytoscape or networkx")
    add("--circuit_tracer", help="write the graph into this folder, for circuit-tracer")
    add("--html", help="write a picture of the graph to this file, which a browser opens offline")
    add("--overwrite", action="store_true", help="replace the files that are there")
    add("--json", action="store_true", help="print everything as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _table(found: dict[str, Any], sites: Sequence[str]) -> str:
    """Return the strongest edges, the hubs and the groups as lines for people."""
    lines = [
        f"{found['n_codes']:,} codes, {found['n_edges']:,} edges of {found['n_significant']:,} that chance does not explain (at most "
        f"{found['fdr']:.0%} of them by chance; {found['n_tests']:,} pairs, {found['n_places']:,} places), {len(sites)} sites, "
        f"lag {found['lag']}"
    ]
    if not found["n_edges"]:
        return f"{lines[0]}\nNo edge: collect more text, lower --min_count, or raise --fdr."
    width = max(len(edge[end]) for edge in found["edges"] for end in ("from", "to"))
    lines += ["", f"{'from':<{width}} {'to':<{width}} {found['statistic']:>9} {'together':>9} {'by chance':>10} {'p':>9}"]
    for edge in found["edges"]:
        figures = f"{edge['weight']:>9.3f} {edge['count']:>9,} {edge['expected']:>10,.1f} {edge['p_value']:>9.1e}"
        lines.append(f"{edge['from']:<{width}} {edge['to']:<{width}} {figures}")
    lines += ["", "most edges: " + ", ".join(f"{row['code']} ({row['n_in']} in, {row['n_out']} out)" for row in found["hubs"])]
    for number, group in enumerate(found["communities"], 1):
        more = f" and {len(group) - 8} more" if len(group) > 8 else ""
        lines.append(f"group {number}: {', '.join(group[:8])}{more}")
    for path in found.get("paths", []):
        lines.append(f"path {path['strength']:.3f}: {' > '.join(path['codes'])}")
    return "\n".join(lines)
