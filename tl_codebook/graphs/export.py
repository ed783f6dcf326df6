"""Graphs of codes as files: GraphML for other graph programs, and the JSON that the frontend of circuit-tracer shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_codebook.errors import CheckpointError, ConfigError, DataError
from tl_codebook.files import as_path, read_json, replace_json, replace_text, target_file
from tl_codebook.graphs.order import in_order
from tl_codebook.names import Code

if TYPE_CHECKING:
    import networkx

__all__ = ["circuit_tracer_graph", "write_circuit_tracer", "write_graphml"]

_SLUG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_INDEX = "graph-metadata.json"
"""The list of graphs that the frontend reads first, beside them."""


def _check_nodes(graph: networkx.DiGraph) -> None:
    other = next((node for node in graph if not isinstance(node, Code)), None)
    if other is not None:
        raise DataError(f"a graph with the node {other!r} was given. Give one whose nodes are Code, as coactivation_graph makes it.")


def write_graphml(graph: networkx.DiGraph, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a graph as GraphML, which Gephi, Cytoscape and networkx read, in one step: a reader never sees half of it.

    Nodes are called by their labels (``L5.z.2:88``) and have ``layer``, ``site``, ``group`` and ``code`` as attributes, beside their own;
    what is a list becomes text, joined by spaces.

    Raises:
        DataError: a graph of other nodes than codes.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_edge(Code(0, "mlp_out", None, 1), Code(1, "z", 3, 4), weight=0.5)
    >>> write_graphml(graph, tmp_path / "codes.graphml")
    >>> nx.read_graphml(tmp_path / "codes.graphml").edges["L0.mlp_out:1", "L1.z.3:4"]
    {'weight': 0.5}
    """
    import networkx as nx

    _check_nodes(graph)
    target = target_file(path, overwrite)
    plain = nx.DiGraph(**{key: _scalar(value) for key, value in graph.graph.items() if value is not None})
    for code, own in graph.nodes(data=True):
        parts = {"layer": code.layer, "site": code.site, "group": code.group, "code": code.code}
        plain.add_node(str(code), **{key: _scalar(value) for key, value in (parts | own).items() if value is not None})
    for a, b, own in graph.edges(data=True):
        plain.add_edge(str(a), str(b), **{key: _scalar(value) for key, value in own.items() if value is not None})
    replace_text(target, "\n".join(nx.generate_graphml(plain)) + "\n")


def _scalar(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(map(str, sorted(value) if isinstance(value, set | frozenset) else value))
    return value if isinstance(value, bool | int | float | str) else str(value)


def circuit_tracer_graph(graph: networkx.DiGraph, slug: str = "codes") -> dict[str, Any]:
    """Return a graph in the JSON layout of circuit-tracer: ``metadata``, ``qParams``, ``nodes`` and ``links``.

    That layout is of one prompt with transcoder features by layer. Here a row is a site (``layer`` is its number in the order of a pass), a
    node a code wherever it fires, all in one column, called by its label in ``clerp``; ``feature`` pairs the row with a number of the
    code (by Cantor's pairing function, as there), and ``influence`` is its sum of weights as a share of the largest one. There are no
    token, error or logit nodes. The layout is that of circuit-tracer's schema version 1.

    Raises:
        ConfigError: a slug that is no name of a file.
        DataError: a graph of other nodes than codes.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_edge(Code(0, "mlp_out", None, 1), Code(1, "z", 3, 4), weight=0.5)
    >>> circuit_tracer_graph(graph)["links"]
    [{'source': '0_1_0', 'target': '1_..._0', 'weight': 0.5}]
    """
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or f"{slug}.json" == _INDEX:
        raise ConfigError(f"slug={slug!r} was given. Give 1 to 64 letters, digits, '.', '_' or '-', not 'graph-metadata'.")
    _check_nodes(graph)
    rows = {name: row for row, name in enumerate(in_order({code.hook_name for code in graph}))}
    width = 1 + max((code.code for code in graph), default=0)
    strength = {code: sum(abs(w) for *_, w in [*graph.in_edges(code, "weight"), *graph.out_edges(code, "weight")]) for code in graph}
    largest = max(strength.values(), default=0.0) or 1.0
    ids, nodes = {}, []
    for code in sorted(graph, key=lambda code: (rows[code.hook_name], code)):
        row = rows[code.hook_name]
        number = (code.group or 0) * width + code.code
        ids[code] = f"{row}_{number}_0"
        nodes.append(
            {
                "node_id": ids[code],
                "feature": (row + number) * (row + number + 1) // 2 + number,
                "layer": str(row),
                "ctx_idx": 0,
                "feature_type": "cross layer transcoder",  # the only type that is drawn as a feature
                "token_prob": 0.0,
                "is_target_logit": False,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{row}_{number}-0",
                "clerp": str(code),
                "influence": strength[code] / largest,
                "activation": graph.nodes[code].get("frequency"),
            }
        )
    metadata = {
        "slug": slug,
        "scan": "tl_codebook",
        "transcoder_list": [],
        # Two: the frontend drops a feature that is at more than two thirds of the tokens.
        "prompt_tokens": ["any position", " "],
        "prompt": str(graph.graph.get("kind", "graph of codes")),
        "node_threshold": None,
        "schema_version": 1,
    }
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": ids[a], "target": ids[b], "weight": float(weight)} for a, b, weight in sorted(graph.edges(data="weight"))],
    }


def write_circuit_tracer(graph: networkx.DiGraph, folder: str | Path, slug: str = "codes", *, overwrite: bool = False) -> Path:
    """Write ``<slug>.json`` as `circuit_tracer_graph` has it, enter it in ``graph-metadata.json`` beside it, and return the file.

    ``circuit-tracer start-server --graph_file_dir FOLDER`` shows the folder; its page draws some thousand edges (`max_edges`). Other
    graphs of the folder stay.

    Raises:
        ConfigError: a slug that is no name of a file.
        DataError: a graph of other nodes than codes.
        CheckpointExistsError: the file exists, and `overwrite` was not said.
        CheckpointError: it cannot be written there, or the folder's list of graphs is damaged.

    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_edge(Code(0, "mlp_out", None, 1), Code(1, "z", 3, 4), weight=0.5)
    >>> write_circuit_tracer(graph, tmp_path).name
    'codes.json'
    """
    content = circuit_tracer_graph(graph, slug)
    target = target_file(as_path(folder) / f"{slug}.json", overwrite)
    index = target.with_name(_INDEX)
    listed: Any = []
    if index.exists():
        advice = "Remove it, and write the graphs of the folder again."
        listed = read_json(index, advice).get("graphs")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise CheckpointError(f"{index} has no list of graphs. {advice}")
    replace_text(target, json.dumps(content, allow_nan=False) + "\n")
    replace_json(index, {"graphs": [*(entry for entry in listed if entry.get("slug") != slug), content["metadata"]]})
    return target
