"""Communities, hubs, surroundings, paths, and the files that graphs are written to."""

import ast
import itertools
import json
import math
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest

from tests.unit.test_coactivation import LATE, OUT, Z, make_store
from tl_codebook.errors import (
    CheckpointError,
    CheckpointExistsError,
    ConfigError,
    DataError,
    InvalidCodeError,
    LabelError,
    UnknownHookError,
)
from tl_codebook.graphs import (
    circuit_tracer_graph,
    coactivation_graph,
    code_communities,
    code_paths,
    ego_graph,
    hubs,
    write_circuit_tracer,
    write_graphml,
)
from tl_codebook.names import Code


def code(layer, number):
    return Code(layer, "mlp_out", None, number)


def layered(n_layers=4, width=5, seed=0, share=0.5):
    """A graph of layers of codes, each joined to some of the next layer and of the one after."""
    rng = np.random.default_rng(seed)
    graph = nx.DiGraph(kind="test")
    for a, b in itertools.product(np.ndindex(n_layers, width), repeat=2):
        if b[0] - a[0] in (1, 2) and rng.random() < share:
            graph.add_edge(code(*map(int, a)), code(*map(int, b)), weight=float(rng.random()))
    return graph


def every_path(graph, layers):
    for numbers in itertools.product(range(5), repeat=len(layers)):
        codes = [code(layer, number) for layer, number in zip(layers, numbers, strict=True)]
        if all(graph.has_edge(a, b) for a, b in itertools.pairwise(codes)):
            weights = [graph.edges[edge]["weight"] for edge in itertools.pairwise(codes)]
            yield math.prod(weights) ** (1 / len(weights)), tuple(codes)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 2, 3), (1, 2)])
@pytest.mark.parametrize("n", [1, 6, 1000])
def test_the_strongest_paths_of_all(layers, n):
    graph = layered()
    expected = sorted(every_path(graph, layers), key=lambda path: -path[0])[:n]
    found = code_paths(graph, n, sites=None if len(layers) == 4 else [f"L{layer}.mlp_out" for layer in layers])
    assert [path.codes for path in found] == [codes for _, codes in expected]
    assert [path.strength for path in found] == pytest.approx([strength for strength, _ in expected])
    assert all(path.weights == tuple(graph.edges[edge]["weight"] for edge in itertools.pairwise(path.codes)) for path in found)


def test_paths_from_and_to_a_code():
    graph = layered()
    every = sorted(every_path(graph, (0, 1, 2, 3)), key=lambda path: -path[0])
    source, target = every[0][1][0], every[-1][1][-1]
    assert [path.codes for path in code_paths(graph, 1000, source=source)] == [p for _, p in every if p[0] == source]
    assert [path.codes for path in code_paths(graph, 1000, target=str(target))] == [p for _, p in every if p[-1] == target]
    both = [p for _, p in every if p[0] == source and p[-1] == target]
    assert [path.codes for path in code_paths(graph, 1000, source=source, target=target)] == both


def test_paths_take_no_edge_without_weight_and_may_not_exist():
    graph = nx.DiGraph()
    graph.add_edge(code(0, 1), code(1, 1), weight=-0.5)
    graph.add_edge(code(0, 2), code(1, 1), weight=0.0)
    assert code_paths(graph) == []
    with pytest.raises(LabelError, match=r"source=L1.mlp_out:1 was given, but paths start at blocks.0.hook_mlp_out"):
        code_paths(graph, source="L1.mlp_out:1")
    with pytest.raises(LabelError, match=r"target=L0.mlp_out:1 was given, but paths end at blocks.1.hook_mlp_out"):
        code_paths(graph, target="L0.mlp_out:1")
    with pytest.raises(InvalidCodeError, match=r"L0.mlp_out:7 is no node of this graph, which has the 3 codes with an edge"):
        code_paths(graph, source="L0.mlp_out:7")
    with pytest.raises(UnknownHookError, match=r"the graph has no codes of 'L2.mlp_out'.*It has codes of: L0.mlp_out, L1.mlp_out"):
        code_paths(graph, sites=["L0.mlp_out", "L2.mlp_out"])
    with pytest.raises(ConfigError, match=r"but there is 1 site. Say which sites, two or more"):
        code_paths(graph, sites="L0.mlp_out")
    with pytest.raises(UnknownHookError, match=r"L1.mlp_out has 1 group, 0"):
        code_paths(graph, sites=["L0.mlp_out", "L1.mlp_out.1"])
    with pytest.raises(ConfigError, match=r"n=0 was asked for"):
        code_paths(graph, 0)
    graph.add_edge(Code(0, "q", 0, 1), code(1, 1), weight=1.0)
    graph.add_edge(Code(0, "k", 0, 1), code(1, 1), weight=1.0)
    with pytest.raises(ConfigError, match=r"hook_k' and .*hook_q' do not follow each other"):
        code_paths(graph)


def test_paths_through_one_group_of_a_site():
    graph = nx.DiGraph()
    for group, weight in ((0, 0.9), (1, 0.4)):
        graph.add_edge(Code(0, "z", group, 7), code(0, 1), weight=weight)
    graph.add_edge(code(0, 1), code(1, 2), weight=0.5)
    assert [str(path.codes[0]) for path in code_paths(graph)] == ["L0.z.0:7", "L0.z.1:7"]
    (path,) = code_paths(graph, sites=["L0.z.1", "mlp_out"])
    assert (path.codes, path.weights) == ((Code(0, "z", 1, 7), code(0, 1), code(1, 2)), (0.4, 0.5))


def test_communities_are_what_was_planted_in_every_process():
    program = """
import itertools, networkx as nx
from tl_codebook.graphs import code_communities
from tl_codebook.names import Code
graph = nx.DiGraph()
for a, b in itertools.product(range(12), repeat=2):
    graph.add_edge(Code(0, "mlp_out", None, a), Code(1, "mlp_out", None, b), weight=1.0 if a % 3 == b % 3 else 0.05 * ((a * b) % 2) - 0.01)
print([sorted(map(str, group)) for group in code_communities(graph)])
"""
    said = set()
    for seed in ("1", "2"):
        surroundings = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        said.add(subprocess.run([sys.executable, "-c", program], env=surroundings, capture_output=True, text=True, check=True).stdout)
    (groups,) = map(ast.literal_eval, said)
    assert groups == [sorted(f"L{layer}.mlp_out:{n}" for layer in (0, 1) for n in range(12) if n % 3 == part) for part in range(3)]


def test_codes_that_nothing_joins_are_alone():
    graph = nx.DiGraph()
    graph.add_edge(code(0, 1), code(1, 1), weight=-0.5)
    assert code_communities(graph) == [{code(0, 1)}, {code(1, 1)}]
    assert code_communities(nx.DiGraph()) == []
    for resolution in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"resolution=.* was asked for. Give a number above 0"):
            code_communities(graph, resolution=resolution)


def test_hubs_are_the_codes_with_the_most_edges():
    graph = layered()
    edges = list(graph.edges(data="weight"))
    rows = {
        node: (graph.in_degree(node), graph.out_degree(node), pytest.approx(sum(w for a, b, w in edges if node in (a, b))))
        for node in graph
    }
    found = hubs(graph, 100)
    assert {hub.code: (hub.n_in, hub.n_out, hub.strength) for hub in found} == rows
    keys = [(hub.n_in + hub.n_out, hub.strength) for hub in found]
    assert keys == sorted(keys, reverse=True)
    assert hubs(graph, 3) == found[:3]
    with pytest.raises(ConfigError, match=r"n=0"):
        hubs(graph, 0)


def test_the_surroundings_of_a_code_in_both_directions():
    graph = nx.DiGraph()
    for layer in range(4):
        graph.add_edge(code(layer, 1), code(layer + 1, 1), weight=0.5)
    graph.add_edge(code(0, 1), code(2, 1), weight=0.25)
    graph.add_edge(code(0, 9), code(1, 9), weight=0.5)
    assert set(ego_graph(graph, "L1.mlp_out:1")) == {code(0, 1), code(1, 1), code(2, 1)}
    assert set(ego_graph(graph, code(1, 1)).edges) == {(code(0, 1), code(1, 1)), (code(1, 1), code(2, 1)), (code(0, 1), code(2, 1))}
    assert set(ego_graph(graph, code(4, 1), 2)) == {code(2, 1), code(3, 1), code(4, 1)}
    with pytest.raises(InvalidCodeError, match=r"L4.mlp_out:9 is no node of this graph"):
        ego_graph(graph, "L4.mlp_out:9")
    with pytest.raises(ConfigError, match=r"radius=0"):
        ego_graph(graph, code(1, 1), 0)


# --- Files


def test_graphml_goes_there_and_back(tmp_path):
    graph = coactivation_graph(make_store(), min_count=1, fdr=0.05, progress=False)
    write_graphml(graph, tmp_path / "codes.graphml")
    back = nx.read_graphml(tmp_path / "codes.graphml")
    assert {Code.parse(node) for node in back} == set(graph)
    assert {(Code.parse(a), Code.parse(b)): own for a, b, own in back.edges(data=True)} == {
        (a, b): own for a, b, own in graph.edges(data=True)
    }
    node = next(iter(graph))
    own = {"layer": node.layer, "site": node.site, "group": node.group, "code": node.code} | graph.nodes[node]
    assert back.nodes[str(node)] == own
    assert back.graph["sites"] == f"{Z} {OUT} {LATE}"
    assert back.graph["n_tests"] == graph.graph["n_tests"]
    assert [path.name for path in tmp_path.iterdir()] == ["codes.graphml"]


def test_files_are_not_overwritten_by_accident(tmp_path):
    graph, path = layered(), tmp_path / "codes.graphml"
    path.write_text("mine")
    with pytest.raises(CheckpointExistsError, match=r"codes.graphml exists. Choose another name, or say overwrite=True"):
        write_graphml(graph, path)
    assert path.read_text() == "mine"
    write_graphml(graph, path, overwrite=True)
    assert len(nx.read_graphml(path)) == len(graph)
    with pytest.raises(CheckpointError, match=r"is a folder. Give the name of a file"):
        write_graphml(graph, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written to"):
        write_graphml(graph, path / "below" / "x.graphml")
    with pytest.raises(DataError, match=r"a graph with the node 'a' was given"):
        write_graphml(nx.DiGraph([("a", "b")]), tmp_path / "x.graphml")
    write_circuit_tracer(graph, tmp_path)
    with pytest.raises(CheckpointExistsError):
        write_circuit_tracer(graph, tmp_path)


def test_circuit_tracer_json_is_what_its_frontend_reads(tmp_path):
    graph = coactivation_graph(make_store(), min_count=1, fdr=1, progress=False)
    path = write_circuit_tracer(graph, tmp_path / "graphs", "tiny-1")
    content = json.loads(path.read_text())
    assert content == circuit_tracer_graph(graph, "tiny-1")
    assert path == tmp_path / "graphs" / "tiny-1.json"
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text()) == {"graphs": [content["metadata"]]}
    kinds = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str, "schema_version": int}
    assert {key: type(content["metadata"][key]) for key in kinds} == kinds
    labels = {node["node_id"]: node["clerp"] for node in content["nodes"]}
    assert len(labels) == len({node["jsNodeId"] for node in content["nodes"]}) == len(graph)
    assert set(labels.values()) == set(map(str, graph))
    assert {(labels[link["source"]], labels[link["target"]]): link["weight"] for link in content["links"]} == {
        (str(a), str(b)): weight for a, b, weight in graph.edges(data="weight")
    }
    rows = {node["clerp"]: int(node["layer"]) for node in content["nodes"]}
    assert {label.split(":")[0].split(".")[1] + label[:2]: row for label, row in rows.items()} == {"zL0": 0, "mlp_outL0": 1, "mlp_outL1": 2}
    # The frontend drops a feature (layer and feature number) that is at more than two thirds of the tokens.
    features = [(node["layer"], node["feature"]) for node in content["nodes"]]
    assert len(set(features)) == len(features)
    assert len(content["metadata"]["prompt_tokens"]) * 2 / 3 >= 1
    assert max(node["influence"] for node in content["nodes"]) == 1.0
    assert all(node["ctx_idx"] == 0 and node["feature_type"] == "cross layer transcoder" for node in content["nodes"])


def test_circuit_tracer_graphs_share_a_folder(tmp_path):
    graph = layered()
    for slug in ("one", "two"):
        write_circuit_tracer(graph, tmp_path, slug)
    write_circuit_tracer(graph, tmp_path, "one", overwrite=True)
    index = tmp_path / "graph-metadata.json"
    assert [entry["slug"] for entry in json.loads(index.read_text())["graphs"]] == ["two", "one"]
    for text in ("{", '{"graphs": {}}', '{"graphs": [1]}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"graph-metadata.json"):
            write_circuit_tracer(graph, tmp_path, "three")
        assert not (tmp_path / "three.json").exists()


@pytest.mark.parametrize("slug", ["", "../x", "a/b", "-x", ".x", "a b", "x" * 65, "graph-metadata", "a\0", None])
def test_slugs_that_are_no_names_are_refused(unchecked, tmp_path, slug):
    with pytest.raises(ConfigError, match=r"slug=.* was given. Give 1 to 64 letters"):
        write_circuit_tracer(layered(), tmp_path, slug)
    assert list(tmp_path.iterdir()) == []
