"""The report of a TokFSM run: one safe file, every figure in it, bars as long as what they show."""

import json
import math
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.experiments.tokfsm_figures import made_results
from tl_codebook.errors import CheckpointError
from tl_codebook.experiments.tokfsm.charts import DASH, Bar, bar_chart, column_chart, escape
from tl_codebook.experiments.tokfsm.experiment import RESULTS
from tl_codebook.experiments.tokfsm.page import table
from tl_codebook.experiments.tokfsm.report import REPORT, command_line, write_report
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.tables import demonstration_text, figure_rows

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "</title></pre></style><script>alert(1)</script><img src=x onerror='a()'>\"&\0\ud800"


class Balance(HTMLParser):
    """Which tags and attributes there are; fails where one is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(results, tmp_path):
    write_report(results, tmp_path / REPORT)
    return (tmp_path / REPORT).read_text(encoding="utf-8")


def tree_of(text):
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(element):
    return " ".join("".join(element.itertext()).split())


def section(tree, heading):
    """All elements from a heading of the second level to the next."""
    main, found, inside = tree.find(".//main"), [], False
    for child in main:
        if child.tag == "h2":
            inside = child.text == heading
        elif inside:
            found.append(child)
    assert found, heading
    holder = ElementTree.Element("div")
    holder.extend(found)
    return holder


def bars_of(element):
    """Label -> (width or None, the text beside it, whether there is a published mark), in the first chart."""
    found = {}
    for group in element.find(".//svg").findall("g"):
        rect, label = group.find("rect"), group.find("text[@class='label']").text
        assert label not in found
        shown = group.find("text[@class='value']").text
        found[label] = (None if rect is None else float(rect.get("width")), shown, group.find("path") is not None)
    return found


@pytest.mark.parametrize(
    "setting",
    [TokFSMSetting.mini(), TokFSMSetting.mini(recipe="paper"), TokFSMSetting.paper(), TokFSMSetting.paper(recipe="paper", k=4)],
    ids=lambda setting: f"{setting.name}-{setting.recipe}",
)
def test_the_file_is_whole_and_needs_nothing_else(setting, tmp_path):
    text = written(made_results(setting), tmp_path)
    parser = Balance()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    tree_of(text)  # well-formed
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form", "a"} & set(parser.tags)
    assert not [each for each in parser.attributes if each[1] in ("src", "href", "style") or each[1].startswith("on")]
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src &#x27;none&#x27;" in text
    assert "arXiv:2310.17230" in text
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]
    assert REPORT != RESULTS


def test_every_figure_of_the_table_is_there(tmp_path):
    results = made_results()
    tree = tree_of(written(results, tmp_path))
    found = tree.find(".//table")
    assert found.find("caption").text
    assert [cell.text for cell in found.findall("thead/tr/th")] == ["figure", "published", "no codes", "codes"]
    lines = found.findall("tbody/tr")
    rows = figure_rows(results)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert words(line.find("th")).rstrip(" ↑↓") == row.name.strip()
        assert [cell.text for cell in line.findall("td")] == [value or DASH for value in (row.published, row.base, row.codes)]
        assert words(line.find("th")).endswith({"up": "↑", "down": "↓", "": row.name[-1]}[row.better])


def test_what_it_was_is_told(tmp_path):
    results = made_results(TokFSMSetting.mini(code_steps=900))
    told = words(tree_of(written(results, tmp_path)).find(".//main"))
    for part in ("20 states, 4 successors each", "abc1234", "A Processor", "Python 3.11.7, PyTorch 2.6.0", "another machine", "Tamkin"):
        assert part in told
    assert "tl-codebook tokfsm --preset mini --seed 7 --code_steps 900" in told
    assert "TokFSMSetting.from_dict" not in told
    assert demonstration_text(results) in written(results, tmp_path)


def test_the_command_line():
    def command(setting, **changes):
        return command_line(made_results(setting) | changes)

    assert command(TokFSMSetting.mini()) == ("tl-codebook tokfsm --preset mini --seed 7", {})
    assert command(TokFSMSetting.paper(recipe="paper", batch_size=32, base_steps=5), host="bridge") == (
        "tl-codebook tokfsm --preset paper --seed 7 --recipe paper --base_steps 5 --batch_size 32 --host bridge",
        {},
    )
    assert command(TokFSMSetting.paper(compiled=False)) == ("tl-codebook tokfsm --preset paper --seed 7 --no-compiled", {})
    assert command(TokFSMSetting.mini(compiled=True)) == ("tl-codebook tokfsm --preset mini --seed 7 --compiled", {})
    assert command(TokFSMSetting.mini(k=2)) == ("tl-codebook tokfsm --preset mini --seed 7", {"k": 2})
    mine = TokFSMSetting.mini(name="mine; rm x")
    assert command(mine)[0] is None
    assert command(mine)[1]["name"] == "mine; rm x"


@pytest.mark.parametrize(("setting", "said"), [(TokFSMSetting.mini(k=2), "(k=2)"), (TokFSMSetting.mini(name="mine"), "it is no preset")])
def test_what_no_option_gives_is_said(setting, said, tmp_path):
    told = words(tree_of(written(made_results(setting), tmp_path)).find(".//main"))
    assert said in told
    assert "TokFSMSetting.from_dict" in told


def test_strings_are_escaped_wherever_they_come_from(tmp_path):
    results = made_results()
    results["setting"]["name"] = results["setting"]["recipe"] = HOSTILE
    results["where"] |= {"commit": HOSTILE, "cpu": HOSTILE, "torch": HOSTILE}
    codes = results["codes"]
    codes["automaton"]["site"] = HOSTILE
    for key in ("forcing", "purity", "decode"):
        codes[key][HOSTILE] = codes[key].pop("L1.mlp_out")
    codes["dead"]["sites"][HOSTILE] = codes["dead"]["sites"].pop("L0.z")
    codes["demonstration"]["codes"][HOSTILE] = [3]
    results["stages"][HOSTILE] = results["stages"].pop("base")
    results[HOSTILE] = HOSTILE
    text = written(results, tmp_path)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert not {"script", "img"} & set(parser.tags)
    assert not [each for each in parser.attributes if each[1].startswith("on")]
    tree_of(text)
    assert "\0" not in text
    assert text.count("&lt;script&gt;") > 5


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_what_is_missing_is_a_dash(missing, tmp_path):
    results = made_results()
    codes = results["codes"]
    codes["loss"] = codes["excess"] = codes["valid_transitions"] = results["base"]["accuracy"] = missing
    codes["forcing"]["all MLP"]["normalised_machine"] = codes["forcing"]["none"]["jsd_machine"] = missing
    codes["purity"]["L1.mlp_out"]["bigram"]["codes"] = codes["automaton"]["f1"] = missing
    codes["decode"]["L0.mlp_out"]["codes_per_state"] = codes["state_codes"]["recall > 1 %"]["precision"] = missing
    codes["dead"]["sites"]["L0.mlp_out"]["perplexity"] = [missing]
    codes["demonstration"]["before"] = [0.5] + [missing] * 19
    results["where"]["commit"] = None
    results["stages"]["base"]["seconds"] = missing
    text = written(results, tmp_path)
    tree = tree_of(text)
    visible = text.split("Raw results (JSON)")[0]
    for word in ("nan", "None", "inf"):
        assert not re.search(rf"[>\s(]{word}[<\s%),.]", visible), word
    assert bars_of(section(tree, "Forcing a state"))["all MLP"][:2] == (None, DASH)
    facts = {item.find("dt").text: words(item.find("dd")) for item in tree.findall(".//dl/div")}
    assert facts["commit"] == DASH
    assert facts["loss over the best possible"].startswith(DASH)
    assert facts["forcing a state at all MLPs"].startswith(DASH)
    raw = json.loads("".join(tree.findall(".//details")[-1].find("pre").itertext()))
    assert raw["codes"]["loss"] is None


def test_hardly_any_figures_at_all(tmp_path):
    results = made_results()
    results["codes"] = {"loss": 1.5}
    del results["where"]
    tree = tree_of(written(results, tmp_path))
    assert "1.5000" in words(tree)


def test_the_paper_recipe_has_no_base(tmp_path):
    results = made_results(TokFSMSetting.paper(recipe="paper"))
    assert "base" not in results
    tree = tree_of(written(results, tmp_path))
    assert {line.findall("td")[1].text for line in tree.find(".//table").findall("tbody/tr")} == {DASH}
    assert "--recipe paper" in words(tree)
    assert "training: base" not in words(tree)


def test_raw_results_are_the_results(tmp_path):
    results = made_results()
    tree = tree_of(written(results, tmp_path))
    assert json.loads("".join(tree.findall(".//details")[-1].find("pre").itertext())) == results


def test_published_marks_stand_only_beside_the_same_machine_and_model(tmp_path):
    paper = tree_of(written(made_results(TokFSMSetting.paper(architecture="gpt_neox")), tmp_path))
    bars = bars_of(section(paper, "Forcing a state"))
    assert {label for label, bar in bars.items() if bar[2]} == {"L0.z", "L1.mlp_out", "all MLP", "all attention", "all"}
    assert len(section(paper, "Purity by layer").findall(".//g/path")) == 8
    assert len(section(paper, "Codes of states").findall(".//g/path")) == 2
    two = TokFSMSetting.paper(architecture="gpt_neox", n_layers=2, z_codes=(8, 8), mlp_codes=(8, 8))
    shallow = tree_of(written(made_results(two), tmp_path))
    for heading, n in (("Forcing a state", 0), ("Purity by layer", 0), ("Codes of states", 2)):
        assert len(section(shallow, heading).findall(".//g/path")) == n
    mini = tree_of(written(made_results(), tmp_path))
    assert mini.findall(".//g/path") == []
    assert mini.find(".//span[@class='legend']") is None
    assert paper.find(".//span[@class='legend']") is not None


def test_a_mark_stands_where_its_value_is():
    chart = ElementTree.fromstring(
        bar_chart("t", [Bar("a", 0.5, "0.5", published=0.5), Bar("b", 1.5, "1.5", published=0.75)], reference=(1.0, "r"))
    )
    (first, second), line = chart.findall("g"), chart.find("line[@class='reference']")
    start, half = float(first.find("rect").get("x")), float(first.find("rect").get("width"))
    marks = [float(re.match(r"M([\d.]+) ", group.find("path").get("d"))[1]) for group in (first, second)]
    assert marks == pytest.approx([start + half, start + 1.5 * half], abs=0.01)
    assert float(line.get("x1")) == pytest.approx(start + 2 * half, abs=0.01)
    assert float(second.find("rect").get("width")) == pytest.approx(3 * half, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 0.01, 40.0])
def test_lengths_of_bars_are_in_proportion_and_fit(scale, tmp_path):
    results = made_results()
    forced = results["codes"]["forcing"]
    for figures in forced.values():
        figures["normalised_machine"] *= scale
    bars = bars_of(section(tree_of(written(results, tmp_path)), "Forcing a state"))
    assert set(bars) == set(forced) - {"none"}
    unit = bars["all MLP, random"][0] / forced["all MLP, random"]["normalised_machine"]
    for label, (width, shown, _) in bars.items():
        value = forced[label]["normalised_machine"]
        assert width == pytest.approx(unit * value, abs=0.002)
        assert shown == f"{value:.3f}"
        assert width < 400


def test_bars_of_the_other_charts(tmp_path):
    tree = tree_of(written(made_results(), tmp_path))
    used = bars_of(section(tree, "Codes in use"))
    full = used["L0.z head 0"][0] / 0.75
    assert {label: (round(width / full, 3), shown) for label, (width, shown, _) in used.items()} == {
        "L0.z head 0": (0.75, "30 of 40"),
        "L0.z head 1": (0.5, "10 of 20"),
        "L0.mlp_out": (0.875, "35 of 40"),
    }
    groups = section(tree, "Codes of states").find(".//svg").findall("g")
    widths = [float(group.find("rect").get("width")) for group in groups]
    assert [width / widths[0] * 0.91 for width in widths] == pytest.approx([0.91, 0.61, 0.71, 0.92, 0.62, 0.72], abs=1e-4)
    purity = section(tree, "Purity by layer").find(".//svg").findall("g")
    assert [group.find("text[@class='value']").text for group in purity] == ["0.0 %", "0.0 %", "20.0 %", "10.0 %"]


def test_the_distributions_before_and_after(tmp_path):
    results = made_results()
    charts = section(tree_of(written(results, tmp_path)), "One state forced").findall(".//svg")
    story = results["codes"]["demonstration"]
    expected = [[0.5, 0.5] + [0.0] * 18, story["before"], story["after"], [0.0, 0.0, 0.5, 0.5] + [0.0] * 16]
    heights = [[float(rect.get("height")) for rect in chart.findall("rect")] for chart in charts]
    unit = max(heights[2]) / 0.75
    for found, values in zip(heights, expected, strict=True):
        assert found == pytest.approx([unit * value for value in values], abs=0.002)
    assert [len(chart.findall("path[@class='mark']")) for chart in charts] == [2, 2, 2, 2]


def test_charts_are_told_to_who_does_not_see_them(tmp_path):
    tree = tree_of(written(made_results(TokFSMSetting.paper(architecture="gpt_neox")), tmp_path))
    charts = tree.findall(".//svg")
    assert len(charts) > 7
    assert all(chart.get("role") == "img" and chart.get("aria-label") for chart in charts)
    forcing = section(tree, "Forcing a state").find(".//svg").get("aria-label")
    assert "all MLP 0.125 (published 0.255)" in forcing
    for each in tree.findall(".//table"):
        assert each.find("caption").text
        assert {cell.get("scope") for cell in each.iter("th")} == {"col", "row"}
    kinds = {rect.get("class") for rect in tree.iter("rect")}
    assert {"bar own", "bar control", "bar second"} <= kinds


def contrast(one, other):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark(tmp_path):
    text = written(made_results(), tmp_path)
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{([^}]*)\}", text)]
    light, dark = schemes[:2]
    for scheme in (light, dark):
        for ground in ("paper", "panel"):
            assert contrast(scheme["ink"], scheme[ground]) >= 7
            assert contrast(scheme["soft"], scheme[ground]) >= 4.5
        assert contrast(scheme["own"], scheme["paper"]) >= 4.5
        assert contrast(scheme["mark"], scheme["paper"]) >= 4.5
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / REPORT
    before = written(made_results(), tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_report(made_results(TokFSMSetting.paper()), path)
    assert path.read_text(encoding="utf-8") == before
    assert [each.name for each in tmp_path.iterdir()] == [REPORT]


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        write_report(made_results(), tmp_path / "none" / REPORT)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 1.0, 1.0001, 3.45, 99.0, 1e6])
def test_axes_have_few_round_marks_and_hold_the_bar(value):
    chart = ElementTree.fromstring(bar_chart("t", [Bar("a", value, "v")], least=0.0))
    lines = chart.findall("line[@class='grid']")
    assert 3 <= len(lines) <= 6
    rect = chart.find("g/rect")
    assert float(rect.get("x")) + float(rect.get("width")) <= float(lines[-1].get("x1")) + 0.01


def test_charts_of_nothing():
    ElementTree.fromstring(bar_chart("t", []))
    ElementTree.fromstring(bar_chart("t", ["heading", Bar("a", None, ""), Bar("b", math.nan, "", published=math.nan)]))
    ElementTree.fromstring(column_chart("t", [], [], top=1.0))
    chart = ElementTree.fromstring(column_chart("t", [None, math.nan, 0.5], ["0", "1", "2"], top=1.0, marked={2}))
    assert [rect.get("class") for rect in chart.findall("rect")] == ["bar own"]


def test_escaping_and_dashes():
    assert escape("a\0b\n") == "a b\n"
    assert escape("\ud800") == "?"
    assert escape(0) == "0"
    assert table("c", ["n", "v"], [("x", 0), ("y", ""), ("z", None), ("w", math.nan)]).count(f'<td class="last">{DASH}</td>') == 3
