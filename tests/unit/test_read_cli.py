"""``tl-codebook search``, ``describe`` and ``graph``: the figures are those of the functions, and nothing hostile reaches a terminal."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook.cli import main
from tl_codebook.graphs import coactivation_graph, code_paths

WORDS = ["w5 w6 w7 w8 w9", "w5 w6 w3 w4", "w9 w8 w7 w6 w5", "w3 w4 w5 w6"] * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    torch.manual_seed(0)
    model = make_host("native")
    tlc.attach(model, ["z", "mlp_out"], n_codes=8, k=2)
    tlc.save(model, folder / "model")
    tlc.collect_codes(model, WORDS, folder / "store", progress=False)
    return folder


@pytest.fixture
def call(folder, capsys):
    def call(verb, *options, status=0):
        assert main([verb, str(folder / "store"), *map(str, options)]) == status
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    return call


@pytest.fixture(scope="module")
def store(folder):
    return tlc.CodeStore(folder / "store")


SEARCHES = {
    "pattern": ([r"w5 (w6)"], {"query": r"w5 (w6)"}),
    "options": (
        ["w6", "--sites", "z", "--by", "precision", "--min_recall", "0.3", "--min_precision", "0.1", "--n", "3", "--n_slots", "1"],
        {"query": "w6", "sites": ["z"], "by": "precision", "min_recall": 0.3, "min_precision": 0.1, "n": 3, "n_slots": 1},
    ),
    "which token": (["w5 (w6) w7", "--group", "0", "--at", "last", "--shift", "-1"], {"query": "w5 w6 w7", "at": "last", "shift": -1}),
    "ids": (["--tokens", "5", "6", "--special"], {"query": [5, 6], "special": True}),
    "texts": (["--tokens", " w5", " w6"], {"query": [" w5", " w6"]}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_that_of_the_library(call, store, name):
    options, same = SEARCHES[name]
    found = json.loads(call("search", *options, "--json"))
    hits = tlc.search_codes(store, **{"n": 20} | same)
    assert found["hits"] == json.loads(json.dumps([dataclasses.asdict(hit) for hit in hits]))
    assert found["n_found"] == len(tlc.search_codes(store, **{**same, "n": None})) >= len(hits) > 0


def test_a_search_for_people(call, store):
    said = call("search", "w5 (w6)", "--n", 2).splitlines()
    best = tlc.search_codes(store, "w5 (w6)")[0]
    assert said[0].split() == ["code", "precision", "recall", "f1", "bits", "hits", "fires"]
    assert said[1].split()[:4] == [best.label, f"{best.precision:.1%}", f"{best.recall:.1%}", f"{best.f1:.3f}"]
    assert said[-1].startswith(f"2 of {len(tlc.search_codes(store, 'w5 (w6)', n=None))} codes; 18 places; search ")
    assert "no code was found" in call("search", "w60")


def test_codes_of_an_example(call, store):
    found = json.loads(call("search", "--example", 0, "--min_recall", 0.6, "--json"))
    assert [hit["label"] for hit in found["hits"]] == [hit.label for hit in tlc.codes_of_example(store, 0, min_share=0.6, n=20)]
    assert found["example"] == 0


def test_neurons_beside_codes(call, folder):
    found = json.loads(call("search", "w5 (w6)", "--neurons", "--model", folder / "model", "--json"))
    assert [row["label"] for row in found["neurons"]] == [hit["label"] for hit in found["hits"][:8]]
    assert all(row["neuron_recall"] >= row["recall"] for row in found["neurons"])
    assert "best neuron at that recall" in call("search", "w5 (w6)", "--neurons", "--model", folder / "model", "--shift", "-1")
    assert "Give its folder: --model" in call("search", "w6", "--neurons", status=1)


def test_a_table_of_a_search(call, tmp_path):
    call("search", "w6", "--csv", tmp_path / "hits.csv")
    head, first, *_ = (tmp_path / "hits.csv").read_text().splitlines()
    assert head.startswith("label,layer,site,group,precision,recall")
    assert first.split(",")[0].startswith("L")
    assert "say --overwrite" in call("search", "w6", "--csv", tmp_path / "hits.csv", status=1)
    call("search", "w6", "--csv", tmp_path / "hits.csv", "--overwrite")


@pytest.mark.parametrize("options", [[], ["w6", "--tokens", "5"], ["w6", "--example", "0"]])
def test_a_search_is_for_one_thing(call, options):
    assert "search for one thing" in call("search", *options, status=1)


def test_a_page(call, store, folder):
    from tl_codebook.describe import describe_code

    code = tlc.search_codes(store, "w6", sites="mlp_out")[0].label
    assert json.loads(call("describe", code, "--json")) == describe_code(store, code).as_dict()
    model = tlc.load(folder / "model")
    page = describe_code(store, code, model, n=3, n_contexts=2, seed=4, measure=True)
    options = ["--model", folder / "model", "--measure", "--n", 3, "--n_contexts", 2, "--seed", 4]
    assert call("describe", code, *options) == f"{page}\n"
    assert page.effect.n_places > 0
    assert "--measure runs the model" in call("describe", code, "--measure", status=1)
    assert "describe one thing" in call("describe", status=1)
    assert "Codes from 0 to 7" in " ".join(call("describe", "L0.mlp_out:99", status=1).replace("codes from", "Codes from").split())


def test_a_page_for_a_browser(call, store, tmp_path):
    code = tlc.search_codes(store, "w6", sites="mlp_out")[0].label
    call("describe", code, "--html", tmp_path / "code.html")
    page = (tmp_path / "code.html").read_text()
    assert code in page
    assert "w6" in page
    assert "exists" in call("describe", code, "--html", tmp_path / "code.html", status=1)


def test_labels_of_all_codes(call, store, tmp_path):
    from tl_codebook.describe import label_codes, read_labels

    found = json.loads(call("describe", "--label_all", "--labels", tmp_path / "labels.json", "--min_precision", 0.6, "--json"))
    labels = label_codes(store, min_precision=0.6)
    assert found["n_codes"] == labels.n_codes == 2 * (4 * 8 + 8)
    assert found["labels"] == json.loads(json.dumps([dataclasses.asdict(label) for label in labels]))
    assert list(read_labels(tmp_path / "labels.json", store)) == list(labels)
    assert "exists" in call("describe", "--label_all", "--labels", tmp_path / "labels.json", status=1)


def test_a_graph(call, store, tmp_path):
    import networkx as nx

    sites = ["L0.mlp_out", "L1.mlp_out"]
    options = ["--sites", *sites, "--lag", 1, "--statistic", "lift", "--min_count", 2, "--fdr", 1, "--quiet"]
    outputs = ["--graphml", tmp_path / "a.graphml", "--circuit_tracer", tmp_path / "ct", "--html", tmp_path / "a.html"]
    found = json.loads(call("graph", *options, *outputs, "--through", *sites, "--json"))
    graph = coactivation_graph(store, sites, lag=1, statistic="lift", min_count=2, fdr=1, progress=False)
    assert found["n_edges"] == graph.number_of_edges() == len(found["edges"]) > 0
    assert {(edge["from"], edge["to"]): edge["weight"] for edge in found["edges"]} == {
        (str(a), str(b)): weight for a, b, weight in graph.edges(data="weight")
    }
    assert found["edges"][0]["weight"] == max(weight for *_, weight in graph.edges(data="weight"))
    assert {code for group in found["communities"] for code in group} == set(map(str, graph))
    assert found["paths"][0]["codes"] == [str(code) for code in code_paths(graph, sites=sites)[0].codes]
    assert nx.read_graphml(tmp_path / "a.graphml").number_of_edges() == graph.number_of_edges()
    assert len(json.loads((tmp_path / "ct/codes.json").read_text())["links"]) == graph.number_of_edges()
    assert found["edges"][0]["from"] in (tmp_path / "a.html").read_text()
    assert "exists" in call("graph", *options, "--html", tmp_path / "a.html", status=1)


def test_a_graph_for_people(call):
    said = call("graph", "--min_count", 2, "--fdr", 1, "--n", 3, "--quiet")
    assert "edges of" in said.splitlines()[0]
    assert "most edges: L" in said
    assert "group 1: " in said
    assert "No edge" in call("graph", "--min_count", 10_000, "--quiet")


HOSTILE = ["\x1b[31mred", "<script>alert(1)</script>", "a\x00b", "(" * 3, r"(a+)+$\u202e"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_is_printed_is_inert(folder, pattern, capsys):
    main(["search", str(folder / "store"), pattern, "--json"])
    main(["search", str(folder / "store"), pattern])
    main(["describe", str(folder / "store"), pattern])
    captured = capsys.readouterr()
    assert not set(captured.out + captured.err) & {chr(i) for i in range(32) if chr(i) != "\n"}
    assert "\u202e" not in captured.out + captured.err


def test_a_reader_that_has_read_enough(folder):
    program = f"{sys.executable} -m tl_codebook search {folder / 'store'} w6 --json --n 1000 | head -1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_a_folder_without_a_store(tmp_path, capsys):
    for verb, rest in (("search", ["w"]), ("describe", ["L0.z.0:1"]), ("graph", [])):
        assert main([verb, str(tmp_path), *rest]) == 1
        assert capsys.readouterr().err.startswith(f"tl-codebook {verb}: ")
