"""The views in headless Chromium: the text is there, it looks as it should, nothing leaves, and no token or label runs."""

import re
import struct
import zlib

import networkx as nx
import numpy as np
import pytest
import torch

import tl_codebook as tlc
from tests.browser.chromium import NAMES, OWNED, PAYLOADS, Elements, find, picture, visit
from tests.unit.coded_texts import coded_model
from tests.unit.test_views import hostile_views
from tl_codebook.views import View, show_attention, show_code_heatmap, show_codes, show_examples, show_graph
from tl_codebook.views.circuitsvis import NO_SCRIPT_POLICY
from tl_codebook.views.visible import shown

pytestmark = pytest.mark.skipif(find() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

ROW = torch.tensor([[1, 5, 9, 13, 17, 21, 25]])
WORDS = ["<bos>", "w5", "w9", "w13", "w17", "w21", "w25"]
FULL, FULL_DARK = (0xE2, 0x6C, 0x1A), (0xFA, 0xA0, 0x48)
"""The last colours of the scale."""
THEIRS = (0xF2, 0x8C, 0x38)
"""The full colour that CircuitsVis is given."""


@pytest.fixture(scope="module")
def model():
    return coded_model(n_codes=8)


@pytest.fixture(scope="module")
def views(model, tmp_path_factory):
    store = tlc.collect_codes(model, ["w3 w4 w5 w6 w7", "w8 w9 w3 w4"], tmp_path_factory.mktemp("views") / "store", progress=False)
    graph = nx.DiGraph()
    graph.add_edge(tlc.Code(0, "mlp_out", None, 1), tlc.Code(1, "mlp_out", None, 2), weight=0.5)
    busy = f"L0.mlp_out:{int(store.counts('L0.mlp_out')[0].argmax())}"
    return [
        show_codes(model, ROW, busy),
        show_codes(model, ROW, [busy, "L0.z.1:3"]),
        show_codes(model, ROW, "L0.z.2"),
        show_examples(store, busy, n=3),
        show_attention(model, ROW, 0),
        show_code_heatmap(model, ROW, "L0.mlp_out"),
        show_graph(graph),
    ]


def together(views):
    """Put several views into one page: a start of the browser takes longer than a page."""
    return View("Several views", "", "\n".join(view.spans for view in views), tuple(c for view in views for c in view.components))


def written(page, folder, name="page.html"):
    (folder / name).write_text(page, encoding="utf-8")
    return folder / name


def notebook(*outputs, body=""):
    """Return what nbconvert makes of outputs: HTML among other HTML, with no policy of its own."""
    cells = "\n".join(f'<div class="jp-OutputArea-output jp-RenderedHTMLCommon">{output}</div>' for output in outputs)
    return f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>Notebook</title></head><body {body}>{cells}</body></html>'


def pixels(png):
    """Read an eight-bit PNG as an array [row column channel]."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed, width, height, channels = 8, b"", 0, 0, 0
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        chunk = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunk)
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        packed += chunk if kind == b"IDAT" else b""
        place += 12 + length
    flat, wide = zlib.decompress(packed), width * channels
    before, found = bytearray(wide), []
    for start in range(0, len(flat), 1 + wide):
        line = bytearray(flat[start + 1 : start + 1 + wide])
        undo(flat[start], line, before, channels)
        found.append(np.frombuffer(bytes(line), np.uint8).reshape(width, channels)[:, :3])
        before = line
    assert len(found) == height
    return np.stack(found)


def undo(kind, line, above, step):
    """Undo the filter of a line of a PNG in place."""
    if kind == 2:
        line[:] = (np.frombuffer(line, np.uint8) + np.frombuffer(above, np.uint8)).tobytes()  # bytes: modulo 256
    elif kind in (1, 3, 4):
        for i in range(len(line)):
            left, corner = (line[i - step], above[i - step]) if i >= step else (0, 0)
            up = above[i]
            if kind == 4:
                sums = left + up - corner
                near = (abs(sums - left), abs(sums - up), abs(sums - corner))
                guess = left if near[0] <= near[1] and near[0] <= near[2] else up if near[1] <= near[2] else corner
            else:
                guess = left if kind == 1 else (left + up) // 2
            line[i] = (line[i] + guess) & 255


def share(picture_of, colour):
    """Return how much of a picture has a colour, 0 to 1."""
    return float((picture_of == np.array(colour)).all(-1).mean())


def test_the_check_sees_what_it_looks_for(tmp_path):
    page = f"<!DOCTYPE html><img src=http://127.0.0.1:1/canary><p>{PAYLOADS[2]}</p><script>fetch('https://unpkg.com/x')</script>"
    seen = visit(written(page, tmp_path), tmp_path)
    assert Elements(seen.dom).named("html")[0]["data-owned"] == "2"
    assert {"http://127.0.0.1:1/canary", "https://unpkg.com/x"} <= set(seen.asked)


def test_everything_is_there_offline(views, tmp_path):
    view = together(views)
    seen = visit(written(view.page(), tmp_path), tmp_path)
    assert seen.asked == []
    assert not [line for line in seen.console if "error" in line.lower() or "refused" in line.lower() or "violates" in line.lower()]
    spans, *places = re.split(r'<div id="cv-\d+">', seen.dom)
    assert len(places) == len(view.components) == 5
    for word in WORDS:
        assert word in Elements(spans).text
    for component, place in zip(view.components[:3], places, strict=False):
        said = Elements(place.split("<section")[0]).text.replace("\u2060", "")
        for word in WORDS:
            assert word in said, component.name
    assert "w4" in Elements(places[3]).text
    assert places[4].count("<canvas") == 5  # four heads, and one of them in full
    assert all(f"L0H{head}" in places[4] for head in range(4))


@pytest.mark.parametrize("policy", [True, False])
def test_no_payload_runs_in_a_page(model, tmp_path, policy):
    """Also without the policy, which would stop most of them by itself."""
    view = together(hostile_views(model))
    page = view.page()
    if not policy:
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        assert "Content-Security-Policy" not in page
    seen = visit(written(page, tmp_path), tmp_path)
    dom = Elements(seen.dom)
    assert "data-owned" not in dom.named("html")[0]
    assert seen.asked == []
    assert not dom.named("img", "iframe", "base", "link", "details")
    assert not [own for _, own in dom.found if any(name.startswith("on") for name in own)]
    assert seen.dom.count("<title>Several views</title>") == 1
    assert len(dom.named("script")) == 2
    places = re.split(r'<div id="cv-\d+">', seen.dom)
    assert len(places) == 1 + len(view.components)
    assert OWNED in Elements(places[1]).text  # the tokens are shown, as text
    for payload in PAYLOADS:
        assert shown(payload) in dom.text
        assert shown(payload) in Elements(places[1]).text.replace("\u2060", "").replace("\xa0", " ")


def test_no_payload_runs_in_a_notebook(model, tmp_path):
    views = hostile_views(model)
    outputs = [view._repr_html_() for view in views] + [views[0].interactive()._repr_html_().replace("<details>", "<details open>")]
    seen = visit(written(notebook(*outputs), tmp_path), tmp_path)
    dom = Elements(seen.dom)
    assert "data-owned" not in dom.named("html")[0]
    assert seen.asked == []
    assert not dom.named("script", "img", "base", "link")
    assert [own["sandbox"] for own in dom.named("iframe")] == ["allow-scripts"]
    assert "<title>Notebook</title>" in seen.dom


def test_a_notebook_shows_the_spans_without_scripts(views, tmp_path):
    page = notebook(*(view._repr_html_() for view in views))
    assert Elements(page).named("script", "iframe") == []
    # With scripts forbidden altogether it is the same: GitHub, nbviewer and untrusted notebooks run none.
    none = f'<meta http-equiv="Content-Security-Policy" content="{NO_SCRIPT_POLICY}">'
    path = written(page.replace("<title>", f"{none}<title>"), tmp_path)
    assert all(word in Elements(visit(path, tmp_path).dom).text for word in WORDS)
    light = pixels(picture(path, tmp_path / "light.png", tmp_path))
    assert share(light, (255, 255, 255)) > 0.5
    assert share(light, FULL) > 1e-4
    dark = notebook(*(view._repr_html_() for view in views), body='data-jp-theme-light="false" style="background:#111111;color:#dddddd"')
    night = pixels(picture(written(dark, tmp_path), tmp_path / "dark.png", tmp_path))
    assert share(night, (0x11, 0x11, 0x11)) > 0.5
    assert share(night, FULL_DARK) > 1e-4
    assert share(night, FULL) == 0


def test_the_frame_of_a_notebook_shows_circuitsvis(views, tmp_path):
    closed = views[0].interactive()._repr_html_()
    spans = views[0]._repr_html_()
    opened = closed.replace(spans, "").replace("<details>", "<details open>")
    assert share(pixels(picture(written(notebook(opened), tmp_path), tmp_path / "open.png", tmp_path)), THEIRS) > 1e-4
    assert share(pixels(picture(written(notebook(closed), tmp_path), tmp_path / "closed.png", tmp_path)), THEIRS) == 0


def test_a_page_follows_the_system(views, tmp_path):
    path = views[0].save(tmp_path / "codes.html")
    light = pixels(picture(path, tmp_path / "light.png", tmp_path))
    assert share(light, FULL) > 1e-4
    assert share(light, THEIRS) > 1e-4
    dark = pixels(picture(path, tmp_path / "dark.png", tmp_path, "--blink-settings=preferredColorScheme=0"))
    assert share(dark, FULL_DARK) > 1e-4
    assert share(dark, FULL) == 0
    assert dark[-1, -1].max() < 60
