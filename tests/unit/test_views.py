"""What the views show: the right tokens in the right colours, and every text as text."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_codebook as tlc
from tests.browser.chromium import PAYLOADS, Elements
from tests.tiny import make_host
from tests.unit.coded_texts import coded_model
from tests.unit.search_store import MemoryStore
from tl_codebook.errors import (
    BasisMismatchError,
    CheckpointError,
    CheckpointExistsError,
    ConfigError,
    DataError,
    InvalidCodeError,
    LabelError,
    PositionError,
    ShapeError,
    UnknownHookError,
)
from tl_codebook.names import Code
from tl_codebook.store.search import search_codes
from tl_codebook.store.text import Vocabulary, vocabulary_of
from tl_codebook.views import View, show_attention, show_code_heatmap, show_codes, show_examples, show_graph
from tl_codebook.views.circuitsvis import Component, bundle, inert, script_json
from tl_codebook.views.colours import contrast, hue_of
from tl_codebook.views.spans import style
from tl_codebook.views.texts import rank_level
from tl_codebook.views.visible import escape, pieces_of, shown

SITE = "blocks.0.hook_mlp_out"
ROW = torch.tensor([[1, 5, 9, 13, 17, 21, 25]])


@pytest.fixture(scope="module")
def model():
    host = coded_model(n_codes=8)
    for point in tlc.sites(host).values():
        point.codebook.codes.data.mul_(0.1)
    return host


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    texts = ["w3 w4 w5 w6 w7", "w8 w9 w3 w4", "w30 w31 w32 w33 w34 w35"]
    return tlc.collect_codes(model, texts, tmp_path_factory.mktemp("views") / "store", progress=False)


def busiest(store):
    return f"L0.mlp_out:{int(store.counts('L0.mlp_out')[0].argmax())}"


def tokens_of(view):
    """Return class and tooltip of the tokens of a view, in order."""
    every = Elements(view.spans).named("span", "mark")
    return [(own["class"].split(), own["title"].split("\n")) for own in every if own["class"].split()[0] == "t"]


def level(classes):
    return max([int(name[1:]) for name in classes if re.fullmatch(r"a\d+", name)], default=0)


def cached(model, name):
    with torch.no_grad():
        return model.run_with_cache(ROW)[1][name][0]


# Tokens coloured by a code


def test_similarity_is_the_cosine_of_input_and_code(model):
    x, codes = cached(model, f"{SITE}.hook_x"), tlc.sites(model)[SITE].codebook.codes
    before = codes.data.clone()
    try:
        codes.data[0, 5] = 3 * x[4]  # the very direction of the input at one token
        found = tokens_of(show_codes(model, ROW, "L0.mlp_out:5"))
        wanted = torch.nn.functional.cosine_similarity(cached(model, f"{SITE}.hook_x"), codes[0, 5], dim=-1).tolist()
    finally:
        codes.data.copy_(before)
    assert [float(said[3].removeprefix("similarity ")) for _, said in found] == [round(value, 3) for value in wanted]
    assert found[4][1][:4] == [" w17", "id 17", "text, token 4", "similarity 1.000"]
    levels = [level(classes) for classes, _ in found]
    assert levels == [max(0, max(1, round(10 * value)) if value > 0 else 0) for value in wanted]
    assert levels[4] == 10
    assert sorted(levels) == [levels[i] for i in np.argsort(wanted)]


def test_at_a_head_the_input_of_that_head_counts(model):
    name = "blocks.1.attn.hook_z"
    x, codes = cached(model, f"{name}.hook_x"), tlc.sites(model)[name].codebook.codes
    wanted = torch.nn.functional.cosine_similarity(x[:, 2], codes[2, 6], dim=-1).tolist()
    found = tokens_of(show_codes(model, ROW[0], Code(1, "z", 2, 6)))
    assert [float(said[3].split()[1]) for _, said in found] == [round(value, 3) for value in wanted]


def test_the_full_colour_can_be_fixed(model):
    code = "L0.mlp_out:5"
    free = [level(classes) for classes, _ in tokens_of(show_codes(model, ROW, code))]
    fixed = [level(classes) for classes, _ in tokens_of(show_codes(model, ROW, code, highest=1))]
    values = [float(said[3].split()[1]) for _, said in tokens_of(show_codes(model, ROW, code))]
    assert max(free) == 10
    assert fixed == [max(1, round(10 * value)) if value > 0 else 0 for value in values]


@pytest.mark.parametrize("colour", ["rank", "fires", "similarity"])
def test_where_a_code_fires_it_is_underlined(model, colour):
    ids = cached(model, f"{SITE}.hook_codes").tolist()
    code = ids[3][1]
    found = tokens_of(show_codes(model, ROW, f"L0.mlp_out:{code}", colour=colour))
    assert ["fires" in classes for classes, _ in found] == [code in row for row in ids]
    assert any(code in row for row in ids)
    slots = [row.index(code) if code in row else -1 for row in ids]
    said = [next(line for line in lines if "fire" in line) for _, lines in found]
    assert said == [f"fires in slot {slot}" if slot >= 0 else "does not fire" for slot in slots]
    assert [lines[-1] for _, lines in found] == [f"codes of L0.mlp_out: {' '.join(map(str, row))}" for row in ids]
    if colour == "rank":
        assert [level(classes) for classes, _ in found] == [rank_level(slot, 3) for slot in slots]
    if colour == "fires":
        assert [level(classes) for classes, _ in found] == [10 if slot >= 0 else 0 for slot in slots]


def test_the_text_of_a_code_brackets_where_it_fires(model):
    ids = cached(model, f"{SITE}.hook_codes").tolist()
    code = ids[1][0]
    line = show_codes(model, ROW, f"L0.mlp_out:{code}").text.splitlines()[2]
    words = [f" {word}" if i else word for i, word in enumerate(["<bos>", "w5", "w9", "w13", "w17", "w21", "w25"])]
    assert line == "".join(f"⟦{word}⟧" if code in row else word for word, row in zip(words, ids, strict=True))


def test_the_interactive_part_has_the_same_numbers(model):
    (one,) = show_codes(model, ROW, "L0.mlp_out:5").components
    values = [float(said[3].split()[1]) for _, said in tokens_of(show_codes(model, ROW, "L0.mlp_out:5"))]
    assert one.name == "ColoredTokens"
    assert [round(value, 3) for value in one.props["values"]] == values
    assert len(one.props["tokens"]) == 7
    (several,) = show_codes(model, ROW, ["L0.mlp_out:5", "L0.mlp_out:6"], colour="fires").components
    ids = cached(model, f"{SITE}.hook_codes").tolist()
    assert several.props["values"] == [[float(5 in row), float(6 in row)] for row in ids]
    assert several.props["labels"] == ["L0.mlp_out:5", "L0.mlp_out:6"]


def test_an_activation_that_is_not_finite_is_marked(model):
    def spoil(x, hook):
        x = x.clone()
        x[:, 2] = torch.nan
        return x

    books = [point.codebook for point in tlc.sites(model).values()]
    try:
        for book in books:
            book.on_nonfinite = "propagate"
        model.hook_dict[f"{SITE}.hook_x"].add_hook(spoil)
        view = show_codes(model, ROW, "L0.mlp_out:5")
    finally:
        model.reset_hooks()
        for book in books:
            book.on_nonfinite = "raise"
    assert ["nan" in classes for classes, _ in tokens_of(view)] == [i == 2 for i in range(7)]
    said = tokens_of(view)[2][1]
    assert said[3] == "similarity NaN: the activation is not finite"
    assert said[-1] == "codes of L0.mlp_out: none"
    (component,) = view.components
    assert component.props["values"][2] == 0.0
    assert [token.endswith("⟨NaN⟩") for token in component.props["tokens"]] == [i == 2 for i in range(7)]


# From a store


def test_a_store_shows_the_codes_that_the_model_had(model, store):
    for sequence in range(store.n_sequences):
        part = store.sequence(sequence)
        row = torch.as_tensor(store.tokens(part.start, part.stop))
        for code in range(8):
            stored = tokens_of(show_codes(store, sequence, f"L1.mlp_out:{code}"))
            live = tokens_of(show_codes(model, row, f"L1.mlp_out:{code}", colour="rank"))
            assert [classes for classes, _ in stored] == [classes for classes, _ in live]
            assert [said[-2:] for _, said in stored] == [said[-2:] for _, said in live]
            assert [said[2] for _, said in stored] == [f"sequence {sequence}, token {i}" for i in range(len(row))]


def test_a_context_is_shown_with_its_token_framed(store):
    code = busiest(store)
    contexts = store.contexts(code, 100, before=2, after=1)
    context = next(each for each in contexts if each.index == 2 and each.start > store.sequence(each.sequence).start)
    view = show_codes(store, context, code)
    (mark,) = Elements(view.spans).named("mark")
    token = int(store.tokens(context.position, context.position + 1)[0])
    assert mark["title"].split("\n")[:2] == [f" w{token}", f"id {token}"]
    assert "fires" in mark["class"].split()
    assert len(tokens_of(view)) == len(context.tokens)
    first = context.start - store.sequence(context.sequence).start
    assert tokens_of(view)[0][1][2] == f"sequence {context.sequence}, token {first}"


def test_a_site_shows_the_codes_of_each_token(model):
    ids = cached(model, f"{SITE}.hook_codes").tolist()
    view = show_codes(model, ROW, "L0.mlp_out", n=2, labels={f"L0.mlp_out:{ids[2][0]}": "nine"})
    assert re.findall(r"<rt>(.*?)</rt>", view.spans) == [" ".join(map(str, row[:2])) for row in ids]
    found = tokens_of(view)
    assert [classes[1] for classes, _ in found] == [f"h{hue_of(f'L0.mlp_out:{row[0]}')}" for row in ids]
    assert "“nine”" in found[2][1][-1]
    assert [line.split()[2:] for line in view.text.splitlines()[2:]] == [list(map(str, row)) for row in ids]
    assert "<rt>" not in show_codes(model, ROW, "L0.mlp_out", n=0).spans


def test_a_site_with_heads_shows_each_head(model):
    ids = cached(model, "blocks.1.attn.hook_z.hook_codes").tolist()
    view = show_codes(model, ROW, "L1.z")
    assert [line for line in view.text.splitlines() if line.startswith("L1")] == [f"L1.z.{head} · text" for head in range(4)]
    assert re.findall(r"<rt>(.*?)</rt>", view.spans) == [str(row[head][0]) for head in range(4) for row in ids]
    alone = show_codes(model, ROW, "L1.z.3")
    assert re.findall(r"<rt>(.*?)</rt>", alone.spans) == [str(row[3][0]) for row in ids]
    (component,) = alone.components
    numbers = [int(label) for label in component.props["secondDimensionLabels"]]
    activations = np.array(component.props["activations"])
    assert activations.shape == (7, 1, len(numbers))
    for token, row in enumerate(ids):
        wanted = [0.0 if number not in row[3] else 1 - row[3].index(number) / 3 for number in numbers]
        assert activations[token, 0].tolist() == pytest.approx(wanted)


# Examples


def test_examples_frame_the_token_that_fires(store):
    code = Code.parse(search_codes(store, "w4", sites="L0.mlp_out")[0].label)
    places = store.positions(code)
    view = show_examples(store, code, n=4, before=3, after=2)
    marks = Elements(view.spans).named("mark")
    assert len(marks) == min(4, len(places))
    for mark, place in zip(marks, places.tolist(), strict=False):
        sequence = int(store.sequence_of(place))
        said = mark["title"].split("\n")
        assert said[1] == f"id {int(store.tokens(place, place + 1)[0])}"
        assert said[2] == f"sequence {sequence}, token {place - store.sequence(sequence).start}"
        assert said[3].startswith("fires in slot")
    assert f"fires at {len(places)} of {store.n_tokens} tokens" in view.text
    assert view.text.count("⟦") == len(marks)


def test_examples_take_hits_and_several_codes(store):
    hits = search_codes(store, "w3", sites="L0.mlp_out")[:2]
    view = show_examples(store, hits, n=1, labels={hits[0].label: "the word w3"})
    lines = [line for line in view.text.splitlines() if line.startswith("L0")]
    counts = [len(store.positions(hit.code)) for hit in hits]
    assert lines[0].startswith(f"{hits[0].label} “the word w3” · fires at {counts[0]} of {store.n_tokens} tokens (")
    assert lines[1].startswith(f"{hits[1].label} · fires at {counts[1]} of {store.n_tokens} tokens (")
    assert len(Elements(view.spans).named("mark")) == 2
    assert len(view.components) == 2


def test_examples_with_a_model_have_its_similarities(model, store):
    code = busiest(store)
    number = Code.parse(code).code
    view = show_examples(store, code, n=100, before=2, after=1, model=model)
    for context, passage in zip(store.contexts(code, 100, before=2, after=1), view.components[0].props["activations"], strict=True):
        whole = store.sequence(context.sequence)
        row = torch.as_tensor(store.tokens(whole.start, whole.stop))[None]
        with torch.no_grad():
            x = model.run_with_cache(row)[1][f"{SITE}.hook_x"][0]
        wanted = torch.nn.functional.cosine_similarity(x, tlc.sites(model)[SITE].codebook.codes[0, number], dim=-1)
        start = context.start - whole.start
        assert [value[0][0] for value in passage] == pytest.approx(wanted[start : start + len(context.tokens)].tolist(), abs=1e-5)


def test_examples_of_a_model_with_other_codes_are_refused(store):
    other = make_host("native")
    tlc.attach(other, ["z", "mlp_out"], n_codes=8, k=3)
    with pytest.raises(BasisMismatchError, match="not those that"):
        show_examples(store, "L0.mlp_out:3", model=other)


def test_a_code_that_never_fires_has_no_example(store):
    dead = next((f"L{layer}.z.{g}:{c}" for layer in (0, 1) for g, c in np.argwhere(store.dead(f"L{layer}.z")).tolist()), None)
    assert dead, "this store has no dead code; choose another seed"
    view = show_examples(store, dead)
    assert "no example" in view.spans
    assert view.components == ()


# Matrix


def test_the_matrix_has_a_cell_for_each_slot(model):
    ids = cached(model, f"{SITE}.hook_codes").tolist()
    view = show_code_heatmap(model, ROW, "L0.mlp_out")
    titles = re.findall(r'<rect class="a(\d+)"[^>]*><title>(.*?)</title>', view.spans)
    cells = {}
    for shade, title in titles:
        lines = html.unescape(title).split("\n")
        cells[int(lines[1].split()[-1]), int(lines[2].split(",")[0].split(":")[1])] = (int(shade), int(lines[2].split()[-1]))
    wanted = {(i, code): row.index(code) for i, row in enumerate(ids) for code in row}
    assert {place: slot for place, (_, slot) in cells.items()} == wanted
    assert all(shade == rank_level(slot, 3) for shade, slot in cells.values())
    assert len(titles) == len(wanted)


def test_the_matrix_says_what_it_leaves_out(model):
    ids = cached(model, f"{SITE}.hook_codes")[:4].tolist()
    counts = {code: sum(code in row for row in ids) for row in ids for code in row}
    view = show_code_heatmap(model, ROW, "L0.mlp_out", max_codes=2, max_tokens=4)
    assert f"the first 4 of 7 tokens, the 2 most frequent of {len(counts)} codes" in view.text
    assert [int(n) for n in re.findall(r"×(\d+):", view.text)] == sorted(counts.values(), reverse=True)[:2]
    assert view.spans.count("rotate(-60)") == 4


def test_the_matrix_of_heads_has_one_for_each(model, store):
    assert show_code_heatmap(model, ROW, "L0.z").spans.count("<svg") == 4
    assert show_code_heatmap(store, 1, "z").spans.count("<svg") == 8
    assert show_code_heatmap(store, 1, "L1.z.2").spans.count("<svg") == 1


# Graph


def graph_of(*edges, **facts):
    graph = nx.DiGraph(**facts)
    for a, b, weight in edges:
        graph.add_edge(Code.parse(a), Code.parse(b), weight=weight, count=3)
    return graph


def drawn(view):
    """Return the boxes {text: (x, y)} and the edges [(tooltip, width, class)] of a drawn graph."""
    boxes = {
        text: (float(x), float(y))
        for x, y, text in re.findall(r'<rect x="([\d.-]+)" y="([\d.-]+)" rx="4"[^>]*/><text[^>]*>(.*?)</text>', view.spans)
    }
    edges = re.findall(r'<path class="([^"]*)" stroke-width="([\d.]+)"[^>]*><title>(.*?)</title>', view.spans)
    return boxes, [(html.unescape(tip).split("\n"), float(width), name) for name, width, tip in edges]


def test_a_graph_has_its_sites_from_left_to_right():
    graph = graph_of(("L0.z.1:2", "L0.mlp_out:3", 0.2), ("L0.mlp_out:3", "L1.z.0:4", 0.4), ("L0.z.1:2", "L1.z.0:4", -0.1), kind="flips")
    boxes, edges = drawn(show_graph(graph))
    assert boxes["1:2"][0] < boxes["3"][0] < boxes["0:4"][0]
    by_tip = {lines[0]: (width, name, lines[1:]) for lines, width, name in edges}
    assert by_tip["L0.mlp_out:3 → L1.z.0:4"][2] == ["weight 0.4", "count 3"]
    widths = {tip: width - 0.7 for tip, (width, *_) in by_tip.items()}
    assert widths["L0.mlp_out:3 → L1.z.0:4"] == pytest.approx(2 * widths["L0.z.1:2 → L0.mlp_out:3"], abs=0.02)
    assert by_tip["L0.z.1:2 → L1.z.0:4"][1] == "edge less"
    assert "kind: flips" in Elements(show_graph(graph).spans).text


def test_an_edge_that_passes_a_column_does_not_run_behind_its_boxes():
    fan = [("L0.mlp_out:1", f"L{layer}.mlp_out:1", 0.5) for layer in (1, 2, 3)]
    view = show_graph(graph_of(*fan))
    box = re.search(r'<rect x="[\d.]+" y="([\d.]+)" rx="4" width="[\d.]+" height="(\d+)"', view.spans)
    middle, half = float(box[1]) + int(box[2]) / 2, int(box[2]) / 2
    rises = {}
    for x1, y1, x2, y2, x3, y3, x4, y4 in re.findall(
        r"d=\"M([\d.]+),([\d.]+) C([\d.]+),([\d.]+) ([\d.]+),([\d.]+) ([\d.]+),([\d.]+)\"", view.spans
    ):
        assert float(y1) == float(y4) == pytest.approx(middle, abs=0.1)
        curve = [
            [
                (1 - t) ** 3 * float(a) + 3 * t * (1 - t) ** 2 * float(b) + 3 * t * t * (1 - t) * float(c) + t**3 * float(d)
                for t in np.linspace(0, 1, 200)
            ]
            for a, b, c, d in ((x1, x2, x3, x4), (y1, y2, y3, y4))
        ]
        rises[float(x4) - float(x1)] = curve
    assert len(rises) == 3
    boxes = sorted(float(x) for x in re.findall(r'<rect x="([\d.]+)"', view.spans))
    wide = float(re.search(r'width="([\d.]+)" height="22"', view.spans)[1])
    for span, (xs, ys) in rises.items():
        passed = [y for x, y in zip(xs, ys, strict=True) for left in boxes[1:-1] if left < x < left + wide and span > wide + 150]
        assert all(middle - y > half for y in passed)
    assert sum(len(xs) for xs, _ in rises.values()) == 600


def test_codes_of_one_colour_hang_together():
    chains = [(f"L{layer}.mlp_out:{i}", f"L{layer + 1}.mlp_out:{i}", 0.5) for i in range(6) for layer in range(2)]
    hues = dict(re.findall(r"<g class=\"(h\d+)\"><title>(.*?)</title>", show_graph(graph_of(*chains)).spans))
    by_code = {code: hue for hue, code in re.findall(r"<g class=\"(h\d+)\"><title>(.*?)</title>", show_graph(graph_of(*chains)).spans)}
    assert len(by_code) == 18
    assert all(by_code[a] == by_code[b] for a, b, _ in chains)
    assert len(hues) > 1


def test_a_large_graph_keeps_the_strongest_edges():
    edges = [(f"L0.mlp_out:{i}", f"L1.mlp_out:{i}", 0.01 * (i + 1)) for i in range(20)]
    view = show_graph(graph_of(*edges), max_nodes=6)
    boxes, kept = drawn(view)
    assert set(boxes) == {"17", "18", "19"}  # the two ends have the same number
    assert len(kept) == 3
    assert "34 codes with 17 edges are not shown" in view.text
    assert "34 codes with 17 edges are not shown" in view.spans
    assert len(drawn(show_graph(graph_of(*edges)))[1]) == 20


def test_the_columns_are_untangled():
    edges = [(f"L0.mlp_out:{i}", f"L1.mlp_out:{9 - i}", 0.5) for i in range(10)]
    view = show_graph(graph_of(*edges))
    places = dict(re.findall(r"<g class=\"h\d+\"><title>(.*?)</title><rect x=\"[\d.-]+\" y=\"([\d.]+)\"", view.spans))
    assert len(places) == 20
    assert all(places[a] == places[b] for a, b, _ in edges)  # every edge lies flat, so none crosses another


def test_a_graph_of_nothing_and_of_one_code():
    assert "0 codes and 0 edges" in show_graph(nx.DiGraph()).text
    lonely = nx.DiGraph()
    lonely.add_node(Code.parse("L0.mlp_out:7"), count=5)
    boxes, edges = drawn(show_graph(lonely))
    assert list(boxes) == ["7"]
    assert edges == []


# Attention


def test_attention_is_that_of_the_model(model):
    pattern, ids = cached(model, "blocks.1.attn.hook_pattern"), cached(model, "blocks.1.attn.hook_z.hook_codes").tolist()
    view = show_attention(model, ROW, 1, heads=[2, 0], n=2)
    figures = view.spans.split("<figure>")[1:]
    assert [re.search(r"<figcaption>(.*?)<", figure)[1] for figure in figures] == ["head 2", "head 0"]
    for head, figure in zip((2, 0), figures, strict=True):
        cells = re.findall(r'<rect class="a\d+"[^>]*><title>(\d+) .*? → (\d+) .*?&#10;(.*?)</title>', figure)
        assert len(cells) == int((pattern[head].tril() >= 0.005).sum())
        for query, key, value in cells:
            assert float(value) == pytest.approx(float(pattern[head, int(query), int(key)]), abs=6e-4)
        beside = re.findall(r'<text x="108" y="\d+">(.*?)<title>', figure)
        assert beside == [" ".join(map(str, row[head][:2])) + " …" for row in ids]
    (component,) = view.components
    assert np.allclose(component.props["attention"], pattern[[2, 0]].tolist(), atol=1e-4)
    assert component.props["attentionHeadNames"] == ["L1H2", "L1H0"]
    best = pattern[2].argmax(-1).tolist()
    assert [int(line.split()[2]) for line in view.text.splitlines()[2:9]] == best


def test_attention_without_a_codebook_says_so():
    plain = make_host("native")
    view = show_attention(plain, "w3 w4", -1, max_tokens=2)
    assert "No codebook sits at blocks.1.attn.hook_z" in view.spans
    assert "the first 2 of 3 tokens" in view.text
    assert tlc.sites(plain) == {}


# Text as text

WORDS = [payload.encode("utf-8", "surrogatepass") for payload in PAYLOADS]


def is_safe(fragment):
    """Tell whether a fragment holds nothing that runs, loads or leads anywhere, and none but our own elements."""
    page = Elements(fragment)
    known = {
        "div",
        "style",
        "span",
        "mark",
        "i",
        "br",
        "ruby",
        "rt",
        "wbr",
        "svg",
        "rect",
        "text",
        "title",
        "path",
        "g",
        "figure",
        "figcaption",
    }
    assert page.active() == []
    assert {tag for tag, _ in page.found} <= known
    assert fragment.count("<style>") == fragment.count("</style>") == 1
    names = {name for _, own in page.found for name in own}
    assert not [name for name in names if name.startswith("on")]
    return True


def hostile_store():
    ids = np.stack([np.arange(len(WORDS)) % 4, (np.arange(len(WORDS)) + 1) % 4], -1)[:, None]
    return MemoryStore([range(len(WORDS))], {SITE: ids}, 4, vocabulary=WORDS)


class HostileStore(MemoryStore):
    """With contexts, as a `CodeStore` has them."""

    def positions(self, code):
        return np.flatnonzero((self.arrays[code.hook_name] == code.code).any((1, 2)))

    def contexts(self, code, n, **_):
        from tl_codebook.store.store import Context

        return [Context(0, int(place), 0, self.tokens(0, self.n_tokens)) for place in self.positions(code)[:n]]


def hostile_views(model):
    store = hostile_store()
    store.__class__ = HostileStore
    labels = {f"L0.mlp_out:{i}": PAYLOADS[i] for i in range(4)} | {f"L0.mlp_out:{i + 4}": payload for i, payload in enumerate(PAYLOADS)}
    graph = nx.DiGraph(kind=PAYLOADS[0], statistic=PAYLOADS[2])
    for i, payload in enumerate(PAYLOADS):
        graph.add_edge(Code(0, "mlp_out", None, i), Code(1, "mlp_out", None, i), weight=0.1 * i, note=payload, **{payload: 1})
    long_title = " ".join(PAYLOADS)
    return [
        show_codes(store, 0, "L0.mlp_out:1", labels=labels, title=long_title),
        show_codes(store, 0, ["L0.mlp_out:1", "L0.mlp_out:2"], labels=labels, title=PAYLOADS[0]),
        show_codes(store, 0, "L0.mlp_out", labels=labels, title=PAYLOADS[11]),
        show_examples(store, "L0.mlp_out:1", labels=labels, title=PAYLOADS[3]),
        show_code_heatmap(store, 0, "L0.mlp_out", labels=labels, title=PAYLOADS[5]),
        show_graph(graph, labels=labels, title=PAYLOADS[6]),
        show_attention(model, ROW, 0, labels={f"L0.z.{g}:{c}": PAYLOADS[c] for g in range(4) for c in range(8)}, title=PAYLOADS[1]),
    ]


def test_hostile_tokens_labels_and_titles_are_text(model):
    for view in hostile_views(model):
        assert is_safe(view.spans)
        page = Elements(view.page(interactive=False))
        assert [tag for tag, _ in page.active()] == ["meta"] * 4
        assert not re.search(
            r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
            view.text + view.page().replace(bundle(), ""),
        )


@pytest.mark.parametrize("payload", PAYLOADS)
def test_each_payload_is_there_as_text(payload):
    store = MemoryStore([[0, 1]], {SITE: [[[0]], [[1]]]}, 2, vocabulary=[b"a", payload.encode()])
    view = show_codes(store, 0, "L0.mlp_out:1")
    assert f"⟦{shown(payload)}⟧" in view.text
    assert shown(payload) in Elements(view.spans).text
    assert tokens_of(view)[1][1][0] == shown(payload)


def test_hostile_names_in_a_host(model):
    """Whatever the tokenizer of a model holds is text too."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {payload: i for i, payload in enumerate(PAYLOADS)} | {f"w{i}": i for i in range(len(PAYLOADS), 61)}
    own = model.tokenizer
    try:
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=PAYLOADS[0])))
        row = torch.arange(len(PAYLOADS))
        views = [
            show_codes(model, row, "L0.mlp_out:1"),
            show_codes(model, row, "z"),
            show_attention(model, row, 0),
            show_code_heatmap(model, row, "z"),
        ]
    finally:
        model.tokenizer = own
    for view in views:
        assert is_safe(view.spans)
    assert PAYLOADS[2].strip() in Elements(views[0].spans).text


def visible(vocabulary, tokens):
    return [piece.text for piece in pieces_of(np.array(tokens), Vocabulary.of_pieces(vocabulary))]


def test_characters_over_several_tokens():
    smile = "😀".encode()
    assert visible([b"a", smile[:2], smile[2:], b"b"], [0, 1, 2, 3]) == ["a", "😀", "\\x98\\x80", "b"]
    assert visible([b"a", smile[:2], smile[2:], b"b"], [1, 3, 2]) == ["\\xf0\\x9f", "b", "\\x98\\x80"]  # no character
    assert visible(["é".encode()[:1], "é".encode()[1:] + b"x"], [0, 1]) == ["é", "\\xa9x"]
    assert visible([b"e", "\u0301".encode()], [0, 1]) == ["e", "◌\u0301"]
    assert visible([b"\r\n", b"\t", b" ", "\u00a0".encode(), b"\x7f", "\ufffd".encode()], range(6)) == [
        "␍↵",
        "⇥",
        " ",
        "\\xa0",
        "␡",
        "\ufffd",
    ]
    assert visible([b"\xed\xa0\x80", b""], [0, 1]) == ["\\xed\\xa0\\x80", "#1"]
    assert [piece.text for piece in pieces_of(np.array([7, 8]), None)] == ["#7", "#8"]


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=12))
def test_any_bytes_are_shown(pieces):
    found = pieces_of(np.arange(len(pieces)), Vocabulary.of_pieces(pieces))
    for piece, own in zip(found, pieces, strict=True):
        assert piece.text
        assert shown(piece.text) == piece.text  # nothing in it is invisible
        if own.isascii() and own.decode().isprintable() and own:
            assert piece.text == own.decode()
    if b"".join(pieces).decode("utf-8", "replace").isprintable() and all(pieces):
        whole = "".join(part.text for piece in found for part in piece.parts if part.kind == "text")
        assert whole == b"".join(pieces).decode("utf-8", "replace").replace("\ufffd", "") or "\ufffd".encode() in b"".join(pieces)


@given(st.text(max_size=40))
def test_any_text_survives_escaping(text):
    assert Elements(f"<p>{escape(text)}</p>").text == shown(text)
    assert Elements(f'<p title="{escape(text)}">').found == [("p", {"title": shown(text)})]


def test_lines_break_where_tokens_do():
    store = MemoryStore([[0, 1, 2]], {SITE: [[[0]], [[1]], [[1]]]}, 2, vocabulary=[b"a\n\n", b"  b", b"c"])
    fragment = show_codes(store, 0, "L0.mlp_out:1").spans
    assert '>a<i class="m">↵</i><br><i class="m">↵</i><br></span>' in fragment
    assert ">  b</span>" in fragment
    assert "white-space:pre-wrap" in fragment


def test_colours_can_be_read():
    rules = re.findall(r"\{background:#(\w{6});color:#(\w{6});fill:#\w{6}\}", style())
    assert len(rules) == 3 * 22  # light, a dark notebook, a dark page
    for pair in rules:
        background, text = (tuple(int(colour[i : i + 2], 16) for i in (0, 2, 4)) for colour in pair)
        assert contrast(background, text) >= 4.5
    plain = [rule for rule in re.split(r"}", re.sub(r"@media[^{]*\{", "", style())) if rule.strip()]
    assert all(re.match(r"\s*(:is\(.*?\) |\.tlc-page )?\.tlc-view\b", rule) for rule in plain)  # nothing of the page around is touched


# The view


def page_and_scripts(view):
    page = view.page()
    return page, re.findall(r"<script>(.*?)</script>", page, re.DOTALL)


def test_a_page_has_one_bundle_and_allows_no_other_script(model):
    view = show_codes(model, ROW, [f"L0.mlp_out:{i}" for i in range(3)])
    more = View("two", "", view.spans, view.components * 2)
    page, scripts = page_and_scripts(more)
    assert scripts[0] == bundle()
    assert page.count("var CircuitsVis=") == 1
    assert scripts[1].count("CircuitsVis.render(") == 2
    assert 'id="cv-0"></div>' in page
    assert 'id="cv-1"></div>' in page
    (policy,) = [own["content"] for own in Elements(page).named("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    hashes = ["'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'" for script in scripts]
    assert policy.split("; ")[:2] == ["default-src 'none'", "script-src " + " ".join(hashes)]
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    assert "sourceMappingURL" not in page
    assert page.index(view.spans) < page.index("<script>")


def test_a_page_without_scripts_allows_none(model):
    for page in (show_codes(model, ROW, "L0.mlp_out:3").page(interactive=False), show_code_heatmap(model, ROW, "L0.mlp_out").page()):
        assert "<script" not in page
        assert "default-src 'none'; style-src 'unsafe-inline';" in html.unescape(page)
        assert len(page) < 60_000


def test_json_in_a_page_is_json():
    text = script_json({"a": [float("nan"), float("inf"), 1.5], "</script>": "<!--&\u2028\ud800"})
    assert not set("<>&\u2028\ud800") & set(text)
    assert text.isascii()
    assert json.loads(text) == {"a": [None, None, 1.5], "</script>": "<!--&\u2028\ud800"}
    with pytest.raises(ConfigError, match="ColoredTokens"):
        Component("Hello", {})


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_tag_or_entity_begins_in_a_token_for_circuitsvis(payload):
    text = inert(payload)
    assert not re.search(r"<[^\u2060]|&[^\u2060]", text)
    assert text.replace("\u2060", "") == shown(payload)


def test_what_circuitsvis_would_write_is_never_used(model, monkeypatch):
    """Its own rendering asks the network and loads from a server."""
    import socket

    import circuitsvis.utils.render as theirs

    def refuse(*_, **__):
        raise AssertionError("used")

    for name in ("render", "render_local", "render_cdn", "internet_on"):
        monkeypatch.setattr(theirs, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    view = show_codes(model, ROW, "L0.mlp_out:3").interactive()
    assert "unpkg" not in view.page().replace(bundle(), "")
    assert "text/html" in view._repr_mimebundle_()


def test_a_notebook_gets_spans_and_the_frame_on_demand(model):
    view = show_codes(model, ROW, "L0.mlp_out:3")
    assert view._repr_mimebundle_() == {"text/plain": view.text, "text/html": view.spans}
    assert is_safe(view._repr_html_())
    shown_too = view.interactive()._repr_html_()
    assert shown_too.startswith(view.spans)
    (frame,) = Elements(shown_too).named("iframe")
    assert frame["sandbox"] == "allow-scripts"
    inside = frame["srcdoc"]
    assert inside.count("var CircuitsVis=") == 1
    assert "Content-Security-Policy" in inside
    assert "<script" not in shown_too.replace(html.escape(inside, quote=True), "")
    assert not view.with_frame
    with pytest.raises(ConfigError, match="no interactive part"):
        show_code_heatmap(model, ROW, "L0.mlp_out").interactive()


def test_saving(model, tmp_path):
    view = show_codes(model, ROW, "L0.mlp_out:3")
    path = view.save(tmp_path / "codes.html")
    assert path.read_text(encoding="utf-8") == view.page() == view.html
    before = path.read_bytes()
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        view.save(path)
    assert path.read_bytes() == before
    view.save(path, overwrite=True, interactive=False)
    assert path.read_text(encoding="utf-8") == view.page(interactive=False)
    assert [each.name for each in tmp_path.iterdir()] == ["codes.html"]
    with pytest.raises(CheckpointError, match="is a folder"):
        view.save(tmp_path)
    with pytest.raises(CheckpointError, match="no name of a file"):
        view.save(tmp_path / ("x" * 300))
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere.html")
    with pytest.raises(CheckpointExistsError):
        view.save(tmp_path / "link.html")


def test_a_view_prints_as_text(model):
    view = show_codes(model, ROW, "L0.mlp_out:3")
    assert str(view) == view.text
    assert repr(view) == "View('L0.mlp_out:3', ColoredTokens)"
    assert "\x1b" not in show_codes(hostile_store(), 0, "L0.mlp_out:1", title="\x1b[2J").text


def test_the_package_is_imported_without_what_it_does_not_need():
    program = (
        "import sys, tl_codebook.views as views; names = dir(views); views.View; views.show_codes; views.show_graph; views.show_attention;"
        "print([m for m in ('transformer_lens', 'transformers', 'circuitsvis', 'networkx', 'matplotlib', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What cannot be


def test_texts_that_cannot_be_shown(model, store, unchecked):
    code = "L0.mlp_out:3"
    for asked, error, match in [
        ("", DataError, "empty"),
        ("w3 \ud800", DataError, "surrogate pair at character 3"),
        (torch.zeros(1, 49, dtype=torch.long), DataError, "takes 48"),
        (torch.tensor([1, 61]), DataError, "vocabulary"),
        ([[1, 2], [3, 4]], ShapeError, "2 rows"),
        (torch.rand(3), ShapeError, "token ids"),
        (3, ConfigError, "no sequences"),
        (None, ShapeError, "Give"),
    ]:
        for call in (lambda asked=asked: show_codes(model, asked, code), lambda asked=asked: show_attention(model, asked, 0)):
            with pytest.raises(error, match=match):
                call()
    for asked, error, match in [
        (3, PositionError, "0 to 2"),
        (-1, PositionError, "0 to 2"),
        ("w3 w4", ConfigError, "give the model"),
        (True, ConfigError, "Give the number"),
        ([], DataError, "empty"),
    ]:
        with pytest.raises(error, match=match):
            show_codes(store, asked, code)
        with pytest.raises(error, match=match):
            show_code_heatmap(store, asked, "L0.mlp_out")
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_codes_and_sites_that_are_not_there(model, store, unchecked):
    for source, text in ((model, ROW), (store, 0)):
        for asked, error, match in [
            ("L0.mlp_out:8", InvalidCodeError, "8 codes"),
            ("L0.z:3", LabelError, "names no group"),
            ("L0.z.4:3", InvalidCodeError, "Groups go from 0 to 3"),
            ("L5.mlp_out:0", UnknownHookError, "L0.mlp_out"),
            ("L5.mlp_out", UnknownHookError, "L0.mlp_out"),
            ("mlp_in", UnknownHookError, "L0.mlp_out"),
            ("L0.z.9", UnknownHookError, "4 groups, 0 to 3"),
            ("L0.mlp_out:x", LabelError, "cannot read"),
            ([], LabelError, "list"),
            (["L0.mlp_out"], LabelError, "list"),
            (3, LabelError, "Give a label"),
        ]:
            with pytest.raises(error, match=match):
                show_codes(source, text, asked)
    with pytest.raises(LabelError, match="is a site"):
        show_examples(store, "L0.mlp_out")
    with pytest.raises(InvalidCodeError):
        show_examples(store, "L0.mlp_out:8")
    with pytest.raises(ConfigError, match="no codebooks"):
        show_codes(make_host("native"), ROW, "L0.mlp_out:3")


def test_options_that_cannot_be(model, store, unchecked):
    with pytest.raises(ConfigError, match="Give the model"):
        show_codes(store, 0, "L0.mlp_out:3", colour="similarity")
    for wrong in ("similar", ""):
        with pytest.raises(ConfigError, match="'similarity', 'rank', 'fires'"):
            show_codes(model, ROW, "L0.mlp_out:3", colour=wrong)
    with pytest.raises(ConfigError, match="are for codes"):
        show_codes(model, ROW, "L0.mlp_out", colour="rank")
    for wrong in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ConfigError, match="above 0"):
            show_codes(model, ROW, "L0.mlp_out:3", highest=wrong)
    for call in (
        lambda: show_codes(model, ROW, "L0.mlp_out", n=-1),
        lambda: show_code_heatmap(model, ROW, "L0.mlp_out", max_codes=0),
        lambda: show_code_heatmap(model, ROW, "L0.mlp_out", max_tokens=0),
        lambda: show_graph(nx.DiGraph(), max_nodes=0),
        lambda: show_attention(model, ROW, 2),
        lambda: show_attention(model, ROW, True),
        lambda: show_attention(model, ROW, 0, heads=4),
        lambda: show_attention(model, ROW, 0, heads=[]),
        lambda: show_codes(model, ROW, "L0.mlp_out:3", labels=3),
        lambda: show_examples(store, "L0.mlp_out:3", order="best"),
    ):
        with pytest.raises(ConfigError):
            call()
    graph = nx.DiGraph([("a", "b")])
    with pytest.raises(DataError, match="Give one of Code"):
        show_graph(graph)


def test_labels_may_be_objects_or_a_mapping(store):
    from tl_codebook.describe.label_files import CodeLabels

    for labels in ({"L0.mlp_out:3": "three"}, CodeLabels.from_texts({"L0.mlp_out:3": "three"}), {Code.parse("L0.mlp_out:3"): "three"}):
        assert "L0.mlp_out:3 “three”" in show_examples(store, "L0.mlp_out:3", labels=labels).text


def test_the_words_of_a_tokenizer_are_read_once(model, monkeypatch):
    import tl_codebook.views.reading as reading

    reading._words.clear()
    calls = []
    monkeypatch.setattr(reading, "vocabulary_of", lambda *args: calls.append(1) or vocabulary_of(*args))
    for _ in range(3):
        show_codes(model, ROW, "L0.mlp_out:3")
    assert calls == [1]
