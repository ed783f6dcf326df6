"""The figures of a TokFSM run as text: each in its column, empty where there is none."""

import math

import pytest

from tests.experiments.tokfsm_figures import made_results
from tl_codebook.experiments.tokfsm.setting import TokFSMSetting
from tl_codebook.experiments.tokfsm.tables import (
    demonstration_text,
    figure_at,
    figure_notes,
    figure_rows,
    figure_table,
    is_of_the_paper,
    state_name,
)


def rows_of(results):
    """Values (published, base, codes, better) by name; a name that says more about the row above comes after its name."""
    found, above = {}, ""
    for row in figure_rows(results):
        above = above if row.name.startswith(" ") else row.name
        name = f"{above} / {row.name.strip()}" if row.name.startswith(" ") else row.name
        assert name not in found
        found[name] = tuple(row[1:])
    return found


def test_every_figure_is_in_its_column():
    loose, strict = "state codes, precision (recall > 1 %)", "state codes, precision (recall >= 95 %)"
    machine = "forcing, JSD to the machine (none = 1): all MLP"
    assert rows_of(made_results()) == {
        "loss, nats per token": ("1.269", "1.1000", "1.2000", "down"),
        "loss over Bayes": ("0.094", "0.1000", "0.2000", "down"),
        "accuracy": ("45.27 %", "55.00 %", "60.00 %", "up"),
        "valid transitions in its text": ("63.65 %", "36.67 %", "40.00 %", "up"),
        "states whose successors are exactly the most probable": ("97.50 %", "27.50 %", "30.00 %", "up"),
        "dead codes, of attainable": ("93.5 to 99.7 %", "", "25.00 %", "down"),
        loose: ("97.10 %", "", "91.00 %", "up"),
        f"{loose} / their recall": ("", "", "31.00 %", "up"),
        f"{loose} / best neuron at the same recall": ("70.50 %", "", "61.00 %", ""),
        f"{loose} / TopK dictionary": ("", "", "71.00 %", ""),
        strict: ("", "", "92.00 %", "up"),
        f"{strict} / states that have such a code": ("", "", "97.00 %", "up"),
        f"{strict} / best neuron at the same recall": ("", "", "62.00 %", ""),
        f"{strict} / TopK dictionary": ("", "", "72.00 %", ""),
        "state read off one code, best MLP": ("", "", "81.00 %", "up"),
        "state read off one code, best MLP / codes that a state takes there": ("", "", "2.50", "down"),
        "purity, best layer, bigrams": ("99.00 %", "", "20.00 %", "up"),
        "purity, best layer, trigrams": ("91.00 %", "", "10.00 %", "up"),
        machine: ("0.255", "", "0.125", "down"),
        f"{machine} / best single MLP": ("0.710", "", "0.600", "down"),
        f"{machine} / all sites": ("0.000", "", "0.030", "down"),
        f"{machine} / all MLP, codes of a wrong state": ("", "", "1.300", "up"),
        f"{machine} / all MLP, random codes": ("", "", "2.500", "up"),
        "forcing, JSD to the model's own (none = 1): all MLP": ("", "", "0.062", "down"),
        "successors after forcing all MLP": ("", "", "87.50 %", "up"),
        "automaton read from the codes, F1": ("", "", "0.495", "up"),
        "tokens of training": ("1,310,720,000", "1,000", "4,321", "down"),
    }


def test_columns_of_the_text_are_aligned():
    lines = figure_table(made_results()).split("\n")
    head, rule, loss, excess = lines[:4]
    assert head.split() == ["published", "no", "codes", "codes"]
    assert set(rule) == {"-"}
    for line, values in ((loss, ("1.269", "1.1000", "1.2000")), (excess, ("0.094", "0.1000", "0.2000"))):
        for value, end in zip(values, (head.index("published") + 9, head.index("no codes") + 8, len(head)), strict=True):
            assert line[:end].endswith(f" {value}")
    dead = next(line for line in lines if line.startswith("dead codes"))
    assert dead[head.index("no codes") : head.index("no codes") + 8].strip() == ""
    assert all(line == line.rstrip() for line in lines)


def test_notes_tell_the_machine_and_what_the_published_figures_are_of():
    mini, paper = made_results(), made_results(TokFSMSetting.paper())
    notes = figure_notes(mini)
    assert notes[0] == (
        "Machine of 20 states, 4 successors each; model gpt_neox, recipe default, k=1, seed 7; trained in 1.0 minutes. The best possible "
        "loss is 1.0000."
    )
    assert "another machine" in notes[1]
    assert figure_notes(paper)[1] == (
        "The published model without codes: loss 1.179, accuracy 46.36 %, valid transitions 96.77 %. Published models are gpt_neox."
    )
    assert figure_table(paper).endswith(figure_notes(paper)[1])


def test_the_paper_recipe_has_no_model_without_codes():
    results = made_results(TokFSMSetting.mini(recipe="paper"))
    assert "base" not in results
    assert {values[1] for values in rows_of(results).values()} == {""}
    assert "recipe paper" in figure_table(results)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_what_is_missing_is_left_empty(missing):
    results = made_results()
    codes = results["codes"]
    codes["loss"] = codes["bayes_loss"] = codes["automaton"]["f1"] = missing
    codes["forcing"]["L1.mlp_out"]["normalised_machine"] = codes["forcing"]["all MLP"]["normalised_machine"] = missing
    codes["decode"]["L1.mlp_out"]["codes_per_state"] = codes["purity"]["L1.mlp_out"]["bigram"]["codes"] = missing
    codes["state_codes"]["controls"] = {}
    rows = rows_of(results)
    assert rows["loss, nats per token"][:3] == ("1.269", "1.1000", "")
    assert rows["forcing, JSD to the machine (none = 1): all MLP / best single MLP"][2] == "0.700"  # of those that there are
    assert rows["purity, best layer, bigrams"][2] == "0.00 %"
    assert "nan" not in figure_table(results)
    assert "inf" not in figure_table(results)
    assert "None" not in figure_table(results)
    assert "best possible" not in figure_table(results)


def test_hardly_any_figures_at_all():
    results = made_results()
    results["codes"] = {"loss": 1.5}
    rows = rows_of(results)
    assert rows.pop("loss, nats per token")[2] == "1.5000"
    assert rows.pop("tokens of training")[2] == "4,321"
    assert {values[2] for values in rows.values()} == {""}


def test_with_several_codes_a_position_the_row_says_what_it_is():
    rows = rows_of(made_results(TokFSMSetting.mini(k=2)))
    assert rows["state read off the first code, best MLP"][2] == "81.00 %"


def test_demonstration():
    assert demonstration_text(made_results(), n_shown=2).split("\n") == [
        "After state 00 the machine goes to 00 01.",
        "  the model says         00 50.0 %  01 25.0 %",
        "With the codes of state 01 forced (L0.mlp_out:5, L1.mlp_out:6), whose successors are 02 03:",
        "  the model says         03 75.0 %  00 12.5 %",
    ]
    assert "L0.mlp_out:5+3, L1.mlp_out:6+3" in demonstration_text(made_results(TokFSMSetting.mini(k=2)))
    assert demonstration_text(made_results(), n_shown=100).count(" %") == 40  # as many as there are


def test_states_are_written_as_the_machine_writes_them():
    for n_states, base in ((2, 2), (5, 2), (10, 10), (11, 10), (100, 10), (101, 10), (40, 36)):
        setting = TokFSMSetting.mini(n_states=n_states, base=base, n_edges=2, n_tokens=120)
        digits = setting.machine().n_digits
        for state in range(n_states):
            name = state_name(setting.to_dict(), state)
            assert len(name) == digits
            assert int(name, base) == state


def test_which_machine_is_the_papers():
    paper = TokFSMSetting.paper(architecture="gpt_neox")
    shallow = TokFSMSetting.paper(architecture="gpt_neox", n_layers=1, z_codes=(8,), mlp_codes=(8,)).to_dict()
    assert is_of_the_paper(paper.to_dict())
    assert is_of_the_paper(paper.to_dict(), model=True)
    assert is_of_the_paper(shallow)
    assert not is_of_the_paper(shallow, model=True)
    assert is_of_the_paper(TokFSMSetting.paper().to_dict())
    assert not is_of_the_paper(TokFSMSetting.paper().to_dict(), model=True)  # a gpt2
    for other in ({"n_edges": 9}, {"n_states": 99}, {"machine_seed": 1}, {"base": 11}):
        assert not is_of_the_paper(TokFSMSetting.paper(**other).to_dict())


def test_figure_at():
    assert figure_at({"a": {"b": 0}}, "a", "b") == 0
    assert figure_at({"a": None}, "a", "b") is None
    assert figure_at([1], "a") is None
